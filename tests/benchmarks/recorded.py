"""The answers of the benchmarks' original code, recorded outside this repository. Tests are skipped where they are absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "shared" / "data"


def path(name: str) -> Path:
    """The file or folder, or a visible skip."""
    found = FOLDER / name
    if not found.exists():
        pytest.skip(f"the recorded answers of the original code are not here: ../shared/data/{name}")
    return found


def load(name: str) -> Any:
    return json.loads(path(name).read_text(encoding="utf-8"))
