"""Imports point one way, `import diffalign` loads nothing heavy, and no file outgrows its reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.places import ROOT, copy_installed_layout, sources

HEAVY = {"torch", "torchvision", "diffusers", "transformers", "open_clip", "numpy", "scipy", "pandas", "matplotlib", "PIL", "gradio"}
MOST_LINES, MOST_LINES_OF_A_METHOD = 400, 250


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- the contract -------------------------------------------------------------------------------------------------------------

LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"


def lint(root: Path) -> subprocess.CompletedProcess:
    pytest.importorskip("importlinter")
    env = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-c", LINT], cwd=root, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_imports_point_one_way(tmp_path):
    copy_installed_layout(tmp_path)
    done = lint(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


PLANTED = [
    ("diffalign/types.py", "diffalign.rewards"),  # upward
    ("diffalign/methods/reno.py", "diffalign.pipelines.presets"),  # a sibling
    ("diffalign/reward_models/__init__.py", "diffalign.methods.search"),
    ("diffalign/pipelines/__init__.py", "diffalign.hub"),
    ("diffalign/rewards/mix.py", "diffalign.reward_models"),
    ("diffalign/reports/summary.py", "diffalign.methods.reno"),  # more than a protocol
    ("diffalign/shapes/scenes.py", "diffalign.benchmarks.base"),  # more than the rules
    ("diffalign/pipelines/outputs.py", "diffalign.shapes.detector"),  # the judge
    ("diffalign/benchmarks/geneval/detector_reward.py", "diffalign.shapes.detector"),  # a reward from the judge
    ("diffalign/training/contract.py", "diffalign.pipelines.presets"),  # more than a protocol
    ("diffalign/hub.py", "diffalign.app"),
    ("diffalign/evaluation/store.py", "gradio"),
]


def test_forbidden_imports_are_found(tmp_path):
    """All planted at once in a copy, inside functions, where they are easily overlooked."""
    copy_installed_layout(tmp_path)
    for file, forbidden in PLANTED:
        with (tmp_path / file).open("a") as source:
            source.write(f"\n\ndef _planted():\n    import {forbidden}\n\n    return {forbidden}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    for file, forbidden in PLANTED:
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        assert f"{module} -> {forbidden} (l." in told, done.stdout
    assert "Contracts: 0 kept" in told, done.stdout


def test_every_module_of_diffalign_has_a_layer():
    """A new module that no layer names would escape the contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c["type"] == "layers")
    named = {name.strip(" ()") for layer in layers for name in layer.replace("|", ":").split(":")}
    modules = {f"diffalign.{place.split('/')[1].removesuffix('.py')}" for place in sources()} - {"diffalign.__init__"}
    assert modules <= named


# --- what an import costs -----------------------------------------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a statement brings into a fresh interpreter."""
    code = f"import json, sys\nbefore = set(sys.modules)\n{statement}\nprint(json.dumps([*set(sys.modules) - before]))"
    return {name.partition(".")[0] for name in json.loads(run_python(code).splitlines()[-1])}


def test_import_diffalign_loads_nothing_but_the_standard_library():
    assert loaded_by("import diffalign") - set(sys.stdlib_module_names) == {"diffalign"}


def test_help_loads_nothing_heavy():
    statement = "from diffalign.cli import build_parser\nbuild_parser().format_help()"
    assert not loaded_by(statement) & HEAVY


def test_the_heavy_modules_are_seen_when_they_are_loaded():
    """Guards the two tests above: the first public name brings torch."""
    assert "torch" in loaded_by("import diffalign\ndiffalign.BestOfN")


def test_every_public_name_is_there():
    run_python("import diffalign\nfor name in diffalign.__all__:\n    getattr(diffalign, name)")


# --- size ---------------------------------------------------------------------------------------------------------------------


def test_no_file_outgrows_its_reader():
    others = [path for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py")] + [*ROOT.glob("*.py")]
    files = {**sources(), **{path.relative_to(ROOT).as_posix(): path for path in others}}
    lines = {name: path.read_text().count("\n") for name, path in files.items()}
    assert len(lines) > 20
    long = {
        name: count
        for name, count in lines.items()
        if count > (MOST_LINES_OF_A_METHOD if name.startswith("diffalign/methods/") else MOST_LINES)
    }
    assert not long
