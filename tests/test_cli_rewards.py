"""`diffalign rewards`: every reward with its facts, at any width, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from diffalign.cli import main, rewards
from diffalign.hub import reward_specs
from tests.places import ROOT

SPECS = reward_specs()


@pytest.fixture
def shown(capsys, monkeypatch):
    def run(*arguments, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["rewards", *arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("columns", [20, 64, 80, 100, 120, 500])
def test_the_table_fits_and_says_everything(shown, columns):
    text = shown(columns=columns)
    assert max(map(len, text.splitlines())) <= max(min(columns, rewards.WIDEST), rewards.NARROWEST)
    flat = " ".join(text.split())
    for name, spec in SPECS.items():
        assert name in text
        for fact in (spec.paper, spec.licence, spec.unit, *map(rewards.short, spec.checkpoint.values())):
            assert fact in flat


def test_long_addresses_are_shortened_and_nothing_else():
    assert rewards.short("https://host.org/a/b/head.pth#sha256=0123") == "host.org/.../head.pth"
    assert rewards.short("org/name:file.pt") == "org/name:file.pt"
    assert rewards.short("package:shapes/weights/x") == "package:shapes/weights/x"


@pytest.mark.parametrize("name", SPECS)
def test_one_reward_with_all_its_facts(shown, name):
    spec = SPECS[name]
    text = shown(name)
    flat = " ".join(text.split())
    assert text.splitlines()[0] == name
    assert max(map(len, text.splitlines())) <= 80 or any(len(place) > 50 for place in spec.checkpoint.values())
    for fact in (spec.paper, spec.licence, spec.unit, spec.target, *spec.checkpoint, *spec.checkpoint.values()):
        assert fact in flat or fact == "model"
    assert ("reaches the images" in flat) == spec.differentiable
    assert ("prompt changes nothing" in flat) == (not spec.needs_prompt)


def test_json_is_the_table(shown):
    rows = json.loads(shown("--json"))
    assert [row["name"] for row in rows] == list(SPECS)
    for row in rows:
        spec = SPECS[row["name"]]
        assert (row["licence"], row["differentiable"], row["memory"]) == (spec.licence, spec.differentiable, spec.memory)
        assert tuple(row["range"]) == spec.range
        assert row["checkpoint"] == dict(spec.checkpoint)
    assert json.loads(shown("brightness", "--json")) == next(row for row in rows if row["name"] == "brightness")


def test_unknown_names_get_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["rewards", "hpsv2.2"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "did you mean 'hpsv2.1'?" in err or "did you mean 'hpsv2'?" in err
    assert len(err.splitlines()) == 1


def test_it_answers_without_torch_and_at_once():
    code = "import sys\nfrom diffalign.cli import main\nmain(['rewards'])\nprint({'torch', 'numpy', 'PIL'} & {*sys.modules})"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert time.perf_counter() - began < 5  # a fraction of a second where the machine has nothing else to do
