"""What is shipped: declared dependencies, the weights and their cards, the documents and the commands that they name."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import diffalign
from tests.places import ROOT, WEIGHTS, linked, sources

MODELS = ("shapes", "shapes-turbo", "shapes-clip", "shapes-preference", "shapes-aesthetic", "shapes-reward", "shapes-watch")
MOST_BYTES = 40_000_000
TEXT = {".json", ".txt", ".md"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]

# Needed by what we import rather than by our own lines.
INDIRECT = {
    "peft": "diffusers loads tuned weights (LoRA) through it",
    "accelerate": "diffusers and transformers load weights through it",
    "torchvision": "open_clip and transformers' image processors need it",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def imported() -> dict[str, set[str]]:
    """Distribution -> the files of ours that import it, the standard library and ourselves left out."""
    distributions = metadata.packages_distributions()
    found: dict[str, set[str]] = {}
    for place, path in {**sources(), "app.py": ROOT / "app.py"}.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"diffalign"}:
                for distribution in distributions.get(top, [top]):
                    found.setdefault(normal(distribution), set()).add(place)
    return found


def test_everything_imported_is_declared():
    """The app may use its extra; everything else only the core, and some other extras inside functions."""
    core, extras = required(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    app, inside = required(extras["app"]), set().union(*(required(extras[name]) for name in ("track", "bench", "xformers", "measures")))
    for distribution, files in imported().items():
        allowed = core | (app if all(file.startswith("diffalign/app/") for file in files) else inside)
        assert distribution in allowed, f"{distribution}, imported by {', '.join(sorted(files))}"


def test_everything_declared_is_used():
    assert required(PROJECT["dependencies"]) - set(imported()) <= set(INDIRECT)


def test_the_list_of_packages_is_complete():
    """A folder that the list lacks would be left out of an installation."""
    found = {place.rpartition("/")[0].replace("/", ".") for place in sources()}
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_the_version_is_told_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", diffalign.__version__)
    assert "version" in PROJECT["dynamic"]
    try:
        installed = metadata.version("diffalign")
    except metadata.PackageNotFoundError:
        pytest.skip("diffalign is not installed here, only found on the path")
    assert installed == diffalign.__version__
    assert f"## {diffalign.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# --- weights ------------------------------------------------------------------------------------------------------------------


def weights() -> Path:
    if not WEIGHTS.is_dir():
        pytest.skip("the models are not trained yet: there is no diffalign/shapes/weights")
    return WEIGHTS


def test_the_weights_are_small_and_in_safetensors_alone():
    files = [path for path in weights().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    assert {path.suffix for path in files} <= {".safetensors", *TEXT}
    assert not [path for path in files if path.suffix in TEXT and path.stat().st_size > 2_000_000]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_there_with_a_card_that_says_how_it_was_made(name):
    folder = weights() / name
    assert list(folder.rglob("*.safetensors")), f"{name} has no weights"
    card = json.loads((folder / "card.json").read_text())
    assert card["command"].startswith("python -m diffalign.shapes.train")
    assert {"seed", "config", "data", "device", "seconds", "date", "licence", "figures"} <= set(card)
    assert card["figures"]
    page = (folder / "README.md").read_text()
    assert card["command"] in page
    assert f"license: {card['licence'].lower()}" in page


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_finite_and_in_half_precision(name):
    from safetensors.torch import load_file

    for path in (weights() / name).rglob("*.safetensors"):
        for key, tensor in load_file(path).items():
            if tensor.is_floating_point():
                assert tensor.isfinite().all(), f"{path.name}: {key}"
                assert tensor.element_size() == 2, f"{path.name}: {key} is {tensor.dtype}"


# --- documents ----------------------------------------------------------------------------------------------------------------

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_and_make_targets_exist(path):
    text = path.read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.M):
        assert target in targets, f"make {target}"
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not link.startswith(("http://", "https://", "mailto:")):
            assert linked(path, link).exists(), link


def test_the_licence_is_the_declared_one():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
