"""The table of methods: its rows are right, and Python, the documents and the command line say what it says."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import diffalign
from diffalign import methods
from diffalign.methods import METHODS, BestOfN, ReNO, build_method, find_method, table
from diffalign.noise_policy import NoisePolicy, PolicyShape
from tests.places import ROOT

NOISE = table.names("noise")


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_a_row_leads_to_its_class_and_the_class_is_public(row):
    cls = row.load()
    assert getattr(diffalign, row.class_name) is cls
    assert row.class_name in diffalign.__all__
    assert hasattr(cls, "search" if row.kind == "noise" else "attach")
    assert row.from_budget or cls.name == row.name, "a class's own name is that of its default settings"
    assert (row.from_budget is not None) == (row.kind == "noise")
    assert len(row.summary) <= 120
    assert row.paper


@pytest.mark.parametrize("name", NOISE)
def test_a_search_is_built_at_its_budget_and_needs_what_its_row_says(name, curved, tmp_path, monkeypatch):
    NoisePolicy(PolicyShape((2, 4, 4), 8)).save(tmp_path)
    monkeypatch.setattr("diffalign.methods.amortised.SHIPPED", str(tmp_path))
    search = build_method(name, curved.reward(), 7)
    assert search.budget == 7
    if find_method(name).needs_policy:
        with pytest.raises(ValueError, match="trained for one model"):
            search.search(curved.problem([3]))
        return
    if find_method(name).needs_steps:
        with pytest.raises(ValueError, match="steers a denoising loop of several steps"):
            search.search(curved.problem([3]))
        return
    assert search.search(curved.problem([3])).trace.settings["budget"] == 7
    flat = curved.reward()
    flat.differentiable = False
    if find_method(name).needs_gradient:
        with pytest.raises(ValueError, match=f"'curved' has no gradient.*{name}"):
            build_method(name, flat, 7)
    else:
        build_method(name, flat, 7).search(curved.problem([3]))


def test_reno_is_the_same_in_python_and_by_name_and_the_paper_is_the_paper(curved):
    reward = curved.reward()
    assert vars(build_method("reno", reward, 20)) == vars(ReNO(reward, budget=20))
    assert vars(build_method("reno-paper", reward, 20)) == vars(ReNO.paper(reward, budget=20))
    assert vars(build_method("best-of-n", reward, 20)) == vars(BestOfN(reward, budget=20))


def test_our_own_mistake_is_not_shown_as_the_users(curved, monkeypatch):
    def broken(self):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(BestOfN, "__post_init__", broken)
    with pytest.raises(TypeError, match="a mistake of ours"):
        build_method("best-of-n", curved.reward(), 3)


def test_names_that_are_not_there_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"method 'renoo' is unknown; did you mean 'reno'\?"):
        find_method("renoo")
    with pytest.raises(ValueError, match="known: adaptive, linear"):
        find_method("xyz", "step")
    with pytest.raises(ValueError, match="'adaptive' is unknown"):
        build_method("adaptive", None, 1)  # it guides, it does not search
    assert len({row.name for row in METHODS}) == len(METHODS)
    assert all(getattr(methods, name) is not None for name in methods.__all__)


def test_the_table_is_read_without_torch():
    code = "import sys, diffalign.methods.table; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["noise", "step"])
def test_the_page_on_methods_is_the_table(kind):
    """To bring it up to date: `python -c "from diffalign.methods import table; print(table.markdown('noise'))"`."""
    assert table.markdown(kind) in (ROOT / "docs" / "methods.md").read_text()


def test_every_setting_of_a_search_is_documented_on_its_own():
    """House style: a line of documentation under each field."""
    for name in NOISE:
        cls = find_method(name).load()
        lines = inspect.getsource(import_module(cls.__module__)).splitlines()
        for field in cls.__dataclass_fields__:
            at = [i for i, line in enumerate(lines) if line.startswith(f"    {field}: ")]
            if field != "name":
                assert any(lines[i + 1].startswith('    """') for i in at), f"{cls.__name__}.{field}"
