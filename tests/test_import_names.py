"""Only `diffalign` is installed, and a user's own folders and files of our old names do not matter."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

TAKEN = ("pipelines/__init__.py", "reward_models/__init__.py", "app.py", "rewards.py", "methods.py")


@pytest.fixture
def folder(tmp_path):
    """Where a user has files of these names already, each of which fails when it is imported."""
    for name in TAKEN:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"raise SystemExit('the user\\'s own {name} was imported')\n")
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`python ...` there. The folder comes first on Python's path, as with `python -m`."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


def test_the_folder_is_a_trap(folder):
    assert "own app.py was imported" in run(folder, "-c", "import app").stderr


@pytest.mark.parametrize("command", [["--help"], ["demo", "--help"], ["rewards"]], ids=" ".join)
def test_commands_run_beside_a_users_own_names(command, folder):
    done = run(folder, "-m", "diffalign", *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_generate_runs_beside_a_users_own_names(folder, tiny_folder):
    options = f"--steps 1 --guidance-scale 0 --budget 4 --device cpu --reward brightness=1 --pipeline {tiny_folder} --out out"
    done = run(folder, "-m", "diffalign", "generate", "a star", *options.split())
    assert done.returncode == 0, done.stderr
    (trace,) = (folder / "out").glob("*/trace.json")
    assert json.loads(trace.read_text())["method"] == "reno"


def test_the_app_opens_beside_a_users_own_names(folder):
    pytest.importorskip("gradio", reason="the app is an extra: pip install 'diffalign[app]'")
    done = run(folder, "-c", "from diffalign.app import improve; improve.build_app()")
    assert done.returncode == 0, done.stderr


def test_only_diffalign_is_at_the_top_of_the_installation():
    """Of a plain installation by its files, of an editable one by what its finder answers to."""
    # a build's egg-info in the checkout is no installation
    installed = [found.files for found in metadata.distributions(name="diffalign") if found.read_text("RECORD")]
    if not installed:
        pytest.skip("diffalign is not installed here, only found on the path")
    files = installed[0]
    finders = [file for file in files if file.name.startswith("__editable__") and file.suffix == ".py"]
    if finders:
        (finder,) = finders
        (mapping,) = (
            ast.literal_eval(node.value)
            for node in ast.parse(finder.locate().read_text()).body
            if isinstance(node, ast.AnnAssign) and node.target.id == "MAPPING"
        )
        names = {name.partition(".")[0] for name in mapping}
    else:
        tops = {file.parts[0] for file in files}
        names = {top for top in tops if top != ".." and not top.endswith(".dist-info")}
    assert names == {"diffalign"}
    assert all(util.find_spec(f"diffalign.{name}") for name in ("pipelines", "reward_models"))
