"""What every benchmark of the table owes, whatever it measures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from diffalign.benchmarks.base import Benchmark, Item
from diffalign.benchmarks.context import Context
from diffalign.benchmarks.table import BENCHMARKS
from diffalign.options import options_of
from diffalign.reports.run_files import write_official
from diffalign.reports.summary import columns, measures
from tests.benchmarks.prompt_files import write_prompt_files
from tests.benchmarks.test_t2i_compbench import PROMPTS
from tests.places import ROOT

ROWS = list(BENCHMARKS.values())
SCORES = {
    "shapes": {"correct": True, "reason": "", "details": {}},
    "geneval": {"correct": False, "reason": "expected dog>=1, found 0", "details": {"dog": [[0, 0, 1, 1, 0.5]]}},
    "dpg": {"values": {"dpg": 0.5}, "answers": [[1, "yes"]]},
    "geneval2": {"values": {"soft-tifa-gm": 0.5, "soft-tifa-am": 0.6}, "probabilities": [["object", 0.5]]},
}
"""What a judge says of an image, where it is more than {"value": number}."""


@dataclasses.dataclass(frozen=True)
class Said:
    """Stands for a benchmark's scorer."""

    name: str = "judge"
    version: str = "judge 1"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Benchmark -> a small list of its prompts, where the user has to bring it."""
    folder = tmp_path_factory.mktemp("prompts")
    clone = folder / "t2i" / "examples" / "dataset"
    clone.mkdir(parents=True)
    for category, prompts in PROMPTS.items():
        (clone / f"{category}_val.txt").write_text("\n".join(prompts) + "\n")
    return {**write_prompt_files(folder), "t2i-compbench": folder / "t2i"}


@pytest.fixture
def build(sources):
    def made(row, limit=None, samples=None, **more) -> Benchmark:
        brought = {"prompts": str(sources[row.name])} if row.name in sources else {}
        context = Context(row.name, samples or row.samples, limit, **more)
        return row.load().build(row.options(**brought), context)

    return made


def rows(test):
    return pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)(test)


@rows
def test_the_row_says_what_it_is(row):
    assert BENCHMARKS[row.name] is row
    assert row.paper
    assert row.summary
    assert row.samples >= 1
    assert Benchmark in row.load().__mro__
    assert f"## `diffalign bench` `{row.name}`" in (ROOT / "docs" / "options.md").read_text()


@rows
def test_its_options_are_a_frozen_dataclass_with_a_line_of_help_each(row):
    options = row.options()
    found = list(options_of(row.options))
    assert [each.name for each in found] == [field.name for field in dataclasses.fields(options)]
    for each in found:
        assert each.option.help
        assert "\n" not in each.option.help
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, each.name, None)


@rows
def test_what_it_needs_is_asked_for_before_anything_is_made(row):
    """With no options at all a benchmark runs, or says which one it needs."""
    if row.name == "shapes":
        row.options().check(Context(row.name, row.samples))
        return
    with pytest.raises(ValueError, match=r"^--\w+ is needed"):
        row.options().check(Context(row.name, row.samples))


@rows
def test_items_have_names_and_seeds_of_their_own_that_a_limit_does_not_change(row, build):
    samples = 1 if row.name == "hpsv2" else 2
    whole = build(row, samples=samples).items()
    assert len({item.name for item in whole}) == len(whole)
    assert len({item.seed for item in whole}) == len(whole)
    assert all(item.prompt.strip() and item.task for item in whole)
    kept: list[Item] = []
    for limit in (1, 2, 3):
        few = build(row, limit, samples).items()
        assert len(few) == min(limit * samples, len(whole))
        assert set(map(repr, kept)) <= set(map(repr, few)) <= set(map(repr, whole))
        kept = few
    other = build(row, samples=samples, seed=1).items()
    assert [item.name for item in other] == [item.name for item in whole]
    assert not {item.seed for item in other} & {item.seed for item in whole}


@rows
@pytest.mark.parametrize("facts", [{"samples": 0}, {"limit": 0}])
def test_counts_below_one_are_refused(row, build, facts):
    with pytest.raises(ValueError, match=f"{next(iter(facts))} must be at least 1"):
        build(row, **{"samples": 1, **facts}) if facts.get("samples", 1) else dataclasses.replace(build(row, samples=1), samples=0)


@rows
def test_a_limited_run_says_so_and_a_whole_one_does_not(row, build):
    limited, whole = build(row, limit=1, samples=1), build(row, samples=1)
    assert limited.limited().startswith("limited to ")
    assert whole.limited() is None
    assert limited.protocol()["limited"] == limited.limited()
    assert not whole.protocol().get("limited")
    for benchmark in (limited, whole):
        json.dumps({**benchmark.protocol(), **benchmark.settings()}, allow_nan=False)
        assert benchmark.protocol()["images per prompt"]


@rows
def test_its_rows_have_what_reports_read(row, build):
    benchmark = build(row, samples=1)
    item = benchmark.items()[0]
    made = benchmark.row(item, {"judge": (Said(), SCORES.get(row.name, {"value": 0.5}))})
    json.dumps(made, allow_nan=False)
    assert (made["filename"], made["tag"], made["prompt"]) == (item.name, item.task, item.prompt)
    assert ("correct" in made) == row.verdicts
    values, prompts, tasks = columns([made], measures([made])[0])
    assert 0 <= values[0] <= 1
    assert (len(prompts), tasks) == (1, [item.task])


@rows
def test_limited_stands_beside_the_files_of_its_evaluator_until_the_run_is_whole(row, build, tmp_path):
    for benchmark in (build(row, limit=1, samples=1), build(row, samples=1)):
        judged = {"judge": (Said(), SCORES.get(row.name, {"value": 0.5}))}
        made = [benchmark.row(item, judged) for item in benchmark.items() if item.task != "complex"]  # those need a language model
        write_official(benchmark, tmp_path, made)
        limited = benchmark.limited()
        assert json.loads((tmp_path / "protocol.json").read_text()).get("limited") == limited
        assert (tmp_path / "LIMITED.txt").is_file() == bool(limited)
        if limited:
            assert limited in (tmp_path / "LIMITED.txt").read_text()
            assert limited in (tmp_path / "failures.html").read_text()


@rows
def test_without_judges_it_can_only_say_what_to_generate(row, build):
    benchmark = build(row, samples=1)
    if row.name == "shapes":
        assert [task.items for task in benchmark.tasks()] == [benchmark.items()]
        return
    with pytest.raises(ValueError, match="needs"):
        benchmark.tasks()


@rows
def test_images_made_elsewhere_are_judged_where_they_lie(row, build, tmp_path):
    assert build(row, samples=1).bring(tmp_path, Path("out")) == tmp_path
