"""diffalign.train from a folder of pairs to a LoRA that the stock pipeline loads, in Python and on the command line."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file

import diffalign
from diffalign.cli import build_parser, main
from diffalign.commands.tune import SUMMARIES, WITH_BETA, objective_settings
from diffalign.training.loop import LoopSettings
from diffalign.training.objectives.sft import SFT
from diffalign.training.policy import Adaptation
from diffalign.tuning import OBJECTIVES, build_objective
from tests.families.tiny import ROWS
from tests.training.test_data import folder_of_pairs, write_image

STOCK = {"sd15": StableDiffusionPipeline, "sd3-medium": StableDiffusion3Pipeline}
QUICK = LoopSettings(steps=2, batch_size=4, micro_batch=2, lr=1e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Winners are light and losers dark, of sixteen prompts."""
    folder = folder_of_pairs(tmp_path_factory.mktemp("pairs"), 32)
    for i in range(32):
        write_image(folder / "images" / f"{i}-winner.png", 200 + i, (32, 32))
        write_image(folder / "images" / f"{i}-loser.png", 20 + i, (32, 40))
    return folder


def pipeline(name: str):
    return ROWS[name].pipeline(ROWS[name].aligned_class())


def image(pipe, name: str):
    return pipe("1", **ROWS[name].call, output_type="np", generator=torch.Generator().manual_seed(3)).images


@pytest.mark.parametrize(("name", "method"), [("sd15", "dpo"), ("sd3-medium", "dpo"), ("sd15", "sft"), ("sd3-medium", SFT())])
def test_the_stock_pipeline_loads_the_result_and_makes_the_same_image(name, method, data, tmp_path):
    done = diffalign.train(method, pipeline=pipeline(name), data=data, out=tmp_path, settings=QUICK, adaptation=Adaptation(rank=2))
    stock = ROWS[name].pipeline(STOCK[name])
    before = image(stock, name)
    stock.load_lora_weights(tmp_path)
    assert abs(image(stock, name) - image(done.pipeline, name)).max() < 1e-5
    assert abs(before - image(stock, name)).max() > 1e-5
    assert done.trained.step == 2
    if method == "dpo":
        first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)  # the policy is the reference


@pytest.mark.parametrize(("name", "beta"), [("sd15", 1000.0), ("sd3-medium", 100.0)])
def test_it_learns_what_is_preferred_on_prompts_that_it_never_saw(name, beta, data, tmp_path):
    """All weights, since those are random here, and an adapter of attention alone can do little with them."""
    settings = LoopSettings(steps=12, batch_size=8, lr=1e-3, warmup=2, evaluate_every=12)
    done = diffalign.train("dpo", pipeline=pipeline(name), data=data, out=tmp_path, settings=settings, held_out=0.3,
                           adaptation=Adaptation(rank=None), objective_settings={"beta": beta})  # fmt: skip
    first, last = done.trained.evaluations
    assert first["held_out_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert last["held_out_loss"] < 0.45
    assert last["held_out_implicit_accuracy"] > 0.8
    assert done.trained.kept_step == 12


@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_every_objective_on_pairs_can_be_named_in_python_and_on_the_command_line(method, tmp_path):
    data = folder_of_pairs(tmp_path / "data", 4, winner_caption="2")
    done = diffalign.train(method, pipeline=pipeline("sd15"), data=data, out=tmp_path / "out", settings=QUICK, steps=1)
    assert math.isfinite(done.trained.figures["loss"])
    assert build_parser().parse_args(["train", method, "--data", str(data)]).objective == method


def test_the_command_knows_the_objectives_and_where_beta_goes():
    assert SUMMARIES.keys() == OBJECTIVES.keys()
    for method in WITH_BETA:
        args = build_parser().parse_args(["train", method, "--data", "x", "--beta", "7"])
        assert "7.0" in str(build_objective(method, objective_settings(args)).settings())


def test_the_card_is_made_from_the_run(data, tmp_path):
    settings = LoopSettings(steps=2, batch_size=4, evaluate_every=1)
    diffalign.train(
        "dpo", pipeline=pipeline("sd15"), data=data, out=tmp_path, seed=5, settings=settings, held_out=0.3, command="how | ever"
    )
    card, page = json.loads((tmp_path / "card.json").read_text()), (tmp_path / "README.md").read_text()
    assert card["seed"] == card["settings"]["seed"] == card["settings"]["adaptation"]["seed"] == 5
    assert card["command"] == "how | ever"
    assert card["data"]["pairs"] + card["data"]["held_out_pairs"] == 32
    assert card["settings"]["objective"]["name"] == "dpo"
    assert len(card["evaluations"]) == 3
    assert {"torch", "diffusers", "peft", "diffalign"} <= set(card["versions"])
    for told in ("how \\| ever", "load_lora_weights", "held_out_loss", card["date"], card["versions"]["torch"], "library_name: diffusers"):
        assert told in page


def test_resumed_equals_uninterrupted_and_other_data_are_refused(data, tmp_path):
    def run(out, steps, **more):
        return diffalign.train("dpo", pipeline=pipeline("sd15"), out=tmp_path / out, settings=QUICK, steps=steps, **{"data": data, **more})

    run("whole", 3)
    run("parts", 1)
    run("parts", 3, resume=True)
    # the tensors to the bit, not the file: safetensors writes its header's entries in any order
    whole, parts = (load_file(tmp_path / out / "pytorch_lora_weights.safetensors") for out in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    other = folder_of_pairs(tmp_path / "other")
    with pytest.raises(ValueError, match="data"):
        run("parts", 4, resume=True, data=other)


def test_all_weights(data, tmp_path):
    done = diffalign.train("sft", pipeline=pipeline("sd15"), data=data, out=tmp_path, settings=QUICK, adaptation=Adaptation(rank=None))
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    stock.set_progress_bar_config(disable=True)
    assert abs(image(stock, "sd15") - image(done.pipeline, "sd15")).max() < 1e-5


def test_prompts_for_objectives_that_make_their_own_images(tmp_path):
    class OfPrompts(SFT):
        """Learns the noise that it is given, whatever it is."""

        def collect(self, policy, batch, generator):
            seen.append(batch)
            return batch

        def loss(self, policy, reference, batch, generator):
            noise = policy.backbone.draw_noise([torch.Generator().manual_seed(seed) for seed in batch.seeds])
            return policy(noise, 500.0, batch.conditioning, 2.0).square().mean(), {}

    seen: list = []
    done = diffalign.train(OfPrompts(), pipeline=pipeline("sd15"), data=["1", "2", "3"], out=tmp_path, settings=QUICK)
    assert done.trained.step == 2
    assert [len(batch) for batch in seen] == [2, 2, 2, 2]


def test_the_command_leaves_a_lora_that_generate_takes(data, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", "dpo", "--pipeline", str(tiny_folder), "--data", str(data), "--out", str(out), "--batch-size", "4", "--rank", "2",
               "--beta", "100", "--lr", "1e-3"]  # fmt: skip
    assert main([*command, "--steps", "1"]) == 0
    assert main([*command, "--steps", "2"]) == 1
    assert "resume" in capsys.readouterr().err
    assert main([*command, "--steps", "2", "--resume"]) == 0
    assert f"--lora {out}" in capsys.readouterr().out
    card = json.loads((out / "card.json").read_text())
    assert card["steps"] == 2
    assert card["command"].startswith("diffalign train dpo --pipeline")
    assert card["settings"]["objective"]["beta"] == 100
    assert [path.name for path in out.glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]  # what --lora DIR asks for
    diffalign.load_pipeline(tiny_folder).load_lora_weights(out)


def test_a_run_that_diverges_ends_with_a_sentence(data, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", "sft", "--pipeline", str(tiny_folder), "--data", str(data), "--out", str(out), "--rank", "2", "--batch-size", "2"]
    assert main([*command, "--lr", "1e30", "--warmup", "0", "--steps", "5"]) == 1
    assert "learning rate of 1e+30" in capsys.readouterr().err
    assert not list(out.glob("*.safetensors"))


def test_what_is_amiss_is_named_before_anything_is_loaded(tmp_path, capsys):
    assert main(["train", "dpo", "--data", str(tmp_path)]) == 1
    assert "pairs.jsonl" in capsys.readouterr().err
    with pytest.raises(ValueError, match="dpo"):
        diffalign.train("dop", data=tmp_path, out=tmp_path / "out")
    with pytest.raises(ValueError, match="gamma"):
        diffalign.train("dpo", data=tmp_path, out=tmp_path / "out", objective_settings={"gamma": 1})
