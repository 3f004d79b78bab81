"""3-in-1: which scores each kind of prompt takes, then the recorded answers of the original code."""

import pytest

from diffalign.benchmarks.t2i_compbench.three_in_one import Kinds, three_in_one
from tests.benchmarks import recorded


@pytest.mark.parametrize(("kind", "expected"), [("spatial", (0.9 + 0.6) / 2), ("action", (0.9 + 0.3) / 2), ("both", (0.9 + 0.6 + 0.3) / 3)])
def test_the_mean_of_what_the_kind_calls_for(kind, expected):
    assert three_in_one(kind, blip_vqa=0.9, spatial_2d=0.6, clip=0.3) == pytest.approx(expected)


def test_kinds_go_by_the_text_before_the_first_full_stop():
    kinds = Kinds.of(spatial=["The cup is on the table.\n"], action=["A dog runs. It barks."])
    assert kinds.kind("the CUP is on the table") == "spatial"
    assert kinds.kind("A dog runs.") == "action"
    assert kinds.kind("A dog runs on the table.") == "both"


def test_unknown_kind():
    with pytest.raises(ValueError, match="spatial, action, both"):
        three_in_one("colour", 1, 1, 1)


def test_agreement_on_scores():
    lists = [recorded.path(f"t2i_compbench/complex_val{name}.txt").read_text().splitlines() for name in ("", "_spatial", "_action")]
    prompts, kinds = [p for p in lists[0] if p.strip()], Kinds.of(lists[1], lists[2])
    found = [kinds.kind(prompt) for prompt in prompts]
    assert len(prompts) == 300
    for row in recorded.load("t2i_3in1_golden.json")["rows"]:
        score = three_in_one(kinds.kind(row["prompt"]), row["blip"], row["spatial2d"], row["clip"])
        assert score == pytest.approx(row["three_in_one"], abs=1e-9), row
    assert {kind: found.count(kind) for kind in set(found)} == {"spatial": 58, "action": 212, "both": 30}
