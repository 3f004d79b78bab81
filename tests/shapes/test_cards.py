"""The cards of the shipped rewards: what they promise, and that the reward for watching shares nothing with those that are optimised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import diffalign.shapes
from diffalign.rules import TASKS
from diffalign.shapes.train import card as cards
from diffalign.shapes.train import rewards_judged
from diffalign.shapes.train.loop import LoopConfig
from tests.places import ROOT

WEIGHTS = Path(diffalign.shapes.__file__).parent / "weights"
OPTIMISED = ("shapes-clip", "shapes-preference", "shapes-reward")
WATCHED = "shapes-watch"


def card(name: str) -> dict:
    path = WEIGHTS / name / "card.json"
    if not path.is_file():
        pytest.skip(f"{name} is not trained yet")
    return json.loads(path.read_text(encoding="utf-8"))


def tensors(name: str) -> dict[str, np.ndarray]:
    with safe_open(WEIGHTS / name / "model.safetensors", "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


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
    shapes = [{(key, one.shape) for key, one in these.items() if one.ndim > 1} for these in (mine, theirs)]
    assert not shapes[0] & shapes[1]  # not one layer of the same name and size
    mine, theirs = ({key: one.tobytes() for key, one in these.items()} for these in (mine, theirs))
    long = {value for value in theirs.values() if len(value) > 64}
    assert not any(value in long for value in mine.values())


@pytest.mark.parametrize("name", ["shapes", "shapes-turbo", "shapes-flow"])
def test_each_generator_is_measured_beside_what_its_autoencoder_can_draw(name):
    drawn = list(card(name)["figures"].values())[-1]
    if "finish" not in drawn:
        pytest.skip(f"{name} was judged before there were measures beside the judge")
    assert 0 <= drawn["test"]["overall"] <= 1
    for one in (drawn["finish"]["colour deviation"], drawn["finish"]["template overlap"]):
        assert one["ratio"] == pytest.approx(one["generated"] / one["decoded renders"], abs=2e-3)
    assert drawn["Frechet distance"]["renders"] < drawn["Frechet distance"]["generated"]
    assert all(0 <= drawn["near-duplicates"][kind] <= 1 for kind in ("generated", "renders"))
    assert all(1 <= score <= drawn["diversity"]["images of each"] for score in drawn["diversity"]["Vendi score"].values())


def test_a_section_is_put_into_a_card_that_stands_and_replaces_its_former_self(tmp_path):
    folder = tmp_path / "shapes-clip"
    cards.write_card(folder, title="x", command="c", config=LoopConfig(steps=1, lr=0.1), seconds=1.0, figures={"a": 1})
    for value in (2, 3):
        rewards_judged.add_to_card(folder, "judged", {"b": value}, note="what it is")
    content = json.loads((folder / "card.json").read_text())
    assert content["figures"] == {"a": 1, "judged": {"b": 3}}
    assert content["notes"] == ["what it is"]
    assert "| judged: b | 3 |" in (folder / "README.md").read_text()


def test_a_section_for_a_card_that_is_not_there_names_the_stage(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run `python -m diffalign\.shapes\.train shapes-clip` first"):
        rewards_judged.add_to_card(tmp_path / "shapes-clip", "judged", {})


def test_climbs_are_told_by_their_stations(tmp_path):
    folder = tmp_path / "reward_images" / "climbed1"
    folder.mkdir(parents=True)
    right = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1]], dtype=torch.bool)  # two climbs of four stations
    save_file({"right": right}, folder / "0000.safetensors")
    assert list(rewards_judged.climb_figures(tmp_path)["before round 1"].values()) == [0.0, 0.5, 1.0, 1.0]


def test_the_table_of_the_page_is_that_of_the_cards():
    if not all("judged" in card(name)["figures"] for name in ("shapes-clip", "shapes-preference")):
        pytest.skip("not all rewards are judged yet")
    page = (ROOT / "docs" / "shapes.md").read_text(encoding="utf-8")
    assert rewards_judged.auc_table(WEIGHTS) in page
