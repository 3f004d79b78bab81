"""The cards of the shipped rewards: what they promise, and that the reward for watching shares nothing with those that are optimised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import diffalign.shapes
from diffalign.benchmarks.geneval_rules import TASKS

WEIGHTS = Path(diffalign.shapes.__file__).parent / "weights"
OPTIMISED = ("shapes-clip", "shapes-preference", "shapes-reward")
WATCHED = "shapes-watch"


def card(name: str) -> dict:
    path = WEIGHTS / name / "card.json"
    if not path.is_file():
        pytest.skip(f"{name} is not trained yet")
    return json.loads(path.read_text(encoding="utf-8"))


def tensors(name: str) -> dict[str, bytes]:
    with safe_open(WEIGHTS / name / "model.safetensors", "np") as file:
        return {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", [*OPTIMISED, WATCHED])
def test_each_card_says_what_the_reward_sees_by_task(name):
    figures = card(name)["figures"]
    section = figures.get("judged", figures).get("test, shapes-turbo")
    if section is None:
        pytest.skip(f"{name} is not judged yet")
    auc = section["AUC"]
    assert set(auc) == {*TASKS, "overall"}
    assert all(0 <= one["low"] <= one["value"] <= one["high"] <= 1 and one["n"] > 0 for one in auc.values())
    best = section["best of 32"]
    assert best["random image"]["overall"] < best["by the judge"]["overall"]
    assert best["by the reward"]["overall"] <= best["by the judge"]["overall"]


@pytest.mark.parametrize("name", OPTIMISED)
def test_the_watched_reward_shares_no_seed_no_architecture_and_no_weights(name):
    watched, other = card(WATCHED), card(name)
    assert watched["seed"] != other["seed"]
    assert watched["command"] != other["command"]
    mine, theirs = tensors(WATCHED), tensors(name)
    assert not set(mine) & set(theirs)  # not a part of the same name
    long = {value for value in theirs.values() if len(value) > 64}
    assert not any(value in long for value in mine.values())
