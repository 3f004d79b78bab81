"""Where things lie, for tests that read files: the documents in the checkout, the packages wherever they are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout, or the folder outside it that holds everything but the packages, from which CI tests the installed package."""

SHARED = next((folder / "shared" / "data" for folder in ROOT.parents[:3] if (folder / "shared" / "data").is_dir()), None)
"""Recorded answers of other projects, beside the checkout; None where they are not."""


def package(name: str) -> Path:
    """The folder of an installed package, such as "diffalign.pipelines"."""
    return Path(importlib.util.find_spec(name).origin).parent


PACKAGE = package("diffalign")
PACKAGES = {name: package(name) for name in ("diffalign", "diffalign.pipelines", "diffalign.reward_models")}
"""Import name -> folder. In an editable installation the last two lie beside the first, otherwise inside it."""
WEIGHTS = PACKAGE / "shapes" / "weights"


def sources() -> dict[str, Path]:
    """Every source file of the packages: where it is in the installed layout ("diffalign/pipelines/aligned.py") -> where it is."""
    found: dict[str, Path] = {}
    for name, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            found[f"{name.replace('.', '/')}/{path.relative_to(folder).as_posix()}"] = path
    return found


def copy_installed_layout(target: Path) -> None:
    """The packages' sources under `target` as an installation lays them out, and pyproject.toml beside them."""
    for place, path in sources().items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / place)
    shutil.copy(ROOT / "pyproject.toml", target)


def linked(document: Path, link: str) -> Path:
    """What a relative link in a document means: a file of the checkout, or of a package, wherever that is installed."""
    path = Path(os.path.normpath(document.parent / link))
    inside = path.relative_to(ROOT)
    folder = {"diffalign": PACKAGE, **{name.rpartition(".")[2]: PACKAGES[name] for name in PACKAGES if "." in name}}.get(inside.parts[0])
    return path if folder is None else folder.joinpath(*inside.parts[1:])
