"""The benchmark of docs/adding_a_benchmark.md, its very code: one folder and one row make a command that generates, judges and reports."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType

import numpy as np
import pytest

from diffalign.benchmarks import table
from diffalign.benchmarks.base import Item
from diffalign.cli import main, program
from diffalign.cli.table import bench_command
from tests.places import ROOT

PACKAGE = "diffalign.benchmarks.colours"


@pytest.fixture
def colours(monkeypatch):
    """The page's modules in their place, and its row in the table."""
    options, benchmark, row = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/adding_a_benchmark.md").read_text(), re.M | re.S)
    for name, source in ((PACKAGE, ""), (f"{PACKAGE}.options", options), (f"{PACKAGE}.benchmark", benchmark)):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, name, "exec"), module.__dict__)
    made = eval(row, {"Row": table.Row, "ColoursOptions": sys.modules[f"{PACKAGE}.options"].ColoursOptions})
    monkeypatch.setattr(table, "BENCHMARKS", {**table.BENCHMARKS, made.name: made})
    monkeypatch.setattr("diffalign.cli.commands.BENCHMARKS", table.BENCHMARKS)
    monkeypatch.setattr(program, "COMMANDS", (*program.COMMANDS, bench_command(made)))
    return sys.modules[f"{PACKAGE}.benchmark"]


@pytest.mark.usefixtures("colours")
def test_it_generates_judges_and_reports(tiny_folder, tmp_path, capsys):
    fixed = ["--pipeline", str(tiny_folder), "--steps", "1", "--guidance-scale", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["bench", "colours", *fixed, "--method", "none", "--thing", "star", "--samples", "2"]) == 0
    assert "Judge accuracy" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "none" / "results.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"a {colour} star" for colour in ("red", "green", "blue") for _ in range(2)]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["benchmark"] == "colours"


@pytest.mark.usefixtures("colours")
def test_its_options_are_its_own(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "colours", "--help"])
    assert "--thing" in capsys.readouterr().out
    assert main(["bench", "colours", "--samples", "101"]) == 1
    assert "--samples of colours goes to 100; got 101" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "colours", "--detector", "hf"])
    assert "not to colours" in capsys.readouterr().err


def test_its_judge_by_hand(colours):
    image = np.full((8, 8, 3), 235, dtype=np.uint8)
    image[2:6, 2:6] = (200, 50, 50)
    judge = colours.NearestColour()

    def verdict(wanted):
        return judge([image], [Item(0, 0, 0, wanted, "", {"colour": wanted})])[0]

    assert verdict("red") == {"correct": True, "reason": ""}
    assert verdict("blue") == {"correct": False, "reason": "expected blue, found red"}
    image[:] = 235
    assert verdict("red")["reason"] == "nothing but background"
