"""Every file in configs/noise is valid for the command that stands in it."""

from __future__ import annotations

import shlex

import pytest

from diffalign.cli import parse
from tests.places import ROOT

FILES = sorted((ROOT / "configs" / "noise").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_the_command_in_a_file_runs_with_it(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    (line,) = [line for line in file.read_text().splitlines() if "--config" in line]
    program, *arguments = shlex.split(line.removeprefix("#"))
    assert program == "diffalign"
    assert arguments[-1] == f"configs/noise/{file.name}"
    _, options = parse(arguments)
    options.check()
    assert options.mix()
