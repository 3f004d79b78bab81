"""The answers of the benchmarks' original code, recorded outside this repository. Tests are skipped where they are absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.places import SHARED


def path(name: str) -> Path:
    """The file or folder, or a visible skip."""
    if SHARED is None or not (SHARED / name).exists():
        pytest.skip(f"the recorded answers of the original code are not here: ../shared/data/{name}")
    return SHARED / name


def load(name: str) -> Any:
    return json.loads(path(name).read_text(encoding="utf-8"))
