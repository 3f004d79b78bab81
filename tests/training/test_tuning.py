"""diffalign.train from a folder of pairs to a LoRA that the stock pipeline loads, in Python and on the command line."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file

import diffalign
from diffalign.cli import main, parse, tune
from diffalign.cli.train_commands import Loop, TrainNoise, Tune, chosen_reward
from diffalign.cli.values import setting
from diffalign.noise_policy import FORMS
from diffalign.training.loop import LoopSettings
from diffalign.training.objectives.sft import SFT
from diffalign.training.policy import ATTENTION, Adaptation
from diffalign.training.table import TABLE, Rewards, build_objective, find_row, markdown
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


CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"
ON_DATA = [row.name for row in TABLE if row.data != "prompts"]
REWARDED = [row.name for row in TABLE if row.data == "prompts"]
FEW = {"rollouts.images": 2, "rollouts.steps": 2, "rollouts.guidance_scale": 2.0}
BACK = {"sampling.steps": 2, "sampling.guidance_scale": 2.0}
SMALL = {**dict.fromkeys(("d3po", "ddpo", "parrot"), FEW), "dpok": {**FEW, "rollouts.trained": 1}, "draft": BACK,
         "flow-grpo": {**FEW, "rollouts.steps": 3}, "alignprop": BACK, "refl": {**BACK, "earliest": 1}, "r0": {"steps": 2},
         "r0+": {"steps": 2, "weight_penalty": 0.1}}  # fmt: skip
"""Settings that make a step of each objective on prompts quick."""


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def green(images, prompts):
    return images[:, 1].mean((1, 2))


REDS = Rewards({"red": red, "green": green}, {"red": 1.0, "green": 0.5}, {"blue": lambda images, prompts: images[:, 2].mean((1, 2))})


@pytest.mark.parametrize("method", ON_DATA)
def test_every_objective_on_data_can_be_named_in_python_and_on_the_command_line(method, tmp_path):
    data = folder_of_pairs(tmp_path / "data", 4, winner_caption="2")
    done = diffalign.train(method, pipeline=pipeline("sd15"), data=data, out=tmp_path / "out", settings=QUICK, steps=1)
    assert math.isfinite(done.trained.figures["loss"])
    _, options = parse(["train", method, "--data", str(data)])
    assert (options.objective, options.source.data) == (method, data)


@pytest.mark.parametrize("method", REWARDED)
def test_every_objective_on_rewards_trains_by_name(method, tmp_path):
    name = "sd3-medium" if method == "flow-grpo" else "sd15"
    settings = LoopSettings(steps=2, batch_size=2, lr=1e-3, evaluate_every=1)
    done = diffalign.train(method, pipeline=pipeline(name), data=["1", "2"], out=tmp_path, reward=REDS, held_out_prompts=["3", "4"],
                           watch=(), settings=settings, adaptation=Adaptation(rank=2), objective_settings=SMALL[method])  # fmt: skip
    assert math.isfinite(done.trained.figures["loss"])
    first, *others = done.trained.evaluations
    assert first["score"] == 0
    assert len(others) == 2
    assert {"held_out/red", "held_out/green", "held_out/blue"} <= first.keys()
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["settings"]["rewards"] == {"red": 1.0, "green": 0.5}
    assert card["settings"]["watched"] == ["blue"]
    assert parse(["train", method, "--reward", "shapes-clip=2"])[1].source.reward == (("shapes-clip", 2.0),)


def test_a_run_on_rewards_resumes_to_the_bit(tmp_path):
    def run(out, steps, **more):
        settings = LoopSettings(steps=steps, batch_size=2, lr=1e-3, updates_per_batch=2)
        return diffalign.train("d3po", pipeline=pipeline("sd15"), data=["1", "2", "3"], out=tmp_path / out, reward=REDS, settings=settings,
                               adaptation=Adaptation(rank=2), objective_settings=FEW, **more)  # fmt: skip

    run("whole", 2)
    run("parts", 1)
    run("parts", 2, resume=True)
    whole, parts = (load_file(tmp_path / out / "pytorch_lora_weights.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_weights_that_watched_rewards_like_best_are_kept(tmp_path):
    """Red is climbed and watched is its opposite, so that every step makes the score worse: the weights before step 1 are kept."""
    rewards = Rewards({"red": red}, {"red": 1.0}, {"not-red": lambda images, prompts: -red(images, prompts)})
    settings = LoopSettings(steps=3, batch_size=4, lr=1e-2, warmup=0, evaluate_every=1, patience=2)
    done = diffalign.train("draft", pipeline=pipeline("sd15"), data=["1", "2"], out=tmp_path, reward=rewards, held_out_prompts=["3", "4"],
                           settings=settings, adaptation=Adaptation(rank=None), objective_settings=BACK)  # fmt: skip
    red_scores = [each["held_out/red"] for each in done.trained.evaluations]
    assert red_scores[1] > red_scores[0]
    assert [each["score"] < 0 for each in done.trained.evaluations] == [False, True, True]
    assert (done.trained.kept_step, done.trained.step) == (0, 2)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*_shapes.yaml")), ids=lambda path: path.name)
def test_a_config_says_what_the_method_knows(file):
    method = file.name.removesuffix("_shapes.yaml")
    if method in ("guidance_search", "linear_ag"):
        pytest.skip("not an objective")
    row = find_row(method)
    data = [] if row.data == "prompts" else ["--data", "x"]
    _, options = parse(["train", method, "--config", str(file), *data])
    weights = {} if row.rewards == "none" else chosen_reward(options.source.reward, "shapes")
    given = Rewards(dict.fromkeys(weights, red), weights, {}) if weights else None
    objective = build_objective(row, dict(options.set), given)
    assert objective.settings() != build_objective(row, None, given).settings() or not options.set
    assert tune.adaptation(options.weights).targets == (ATTENTION if options.weights.full else tune.TARGETS["linear"])
    assert tune.settings(options).evaluate_every
    assert options.watching.watch
    assert not set(options.watching.watch) & set(weights)


def test_the_command_line_has_the_defaults_of_python(tmp_path):
    """The loop's, the adapter's and the noise policy's: the command line starts before torch is there, so it states them again."""
    assert tune.settings(Tune()) == LoopSettings()
    assert tune.adaptation(Tune().weights) == Adaptation()
    python = {name: each.default for name, each in inspect.signature(diffalign.train_noise).parameters.items()}
    for name in ("form", "width", "blocks", "patch", "clip", "pull", "pipeline", "resume", "track"):
        assert getattr(TrainNoise(), name) == python[name], name
    assert {name: getattr(TrainNoise().loop, name) for name in ("steps", "lr", "batch_size", "seed")} == {
        name: python[name] for name in ("steps", "lr", "batch_size", "seed")
    }
    for form in FORMS:
        assert parse(["train", "find", "--form", form])[1].form == form
    assert {each.name for each in fields(Loop)} < {each.name for each in fields(LoopSettings)}


def test_the_page_has_the_table_of_objectives():
    assert markdown() in (CONFIGS.parents[1] / "docs" / "tuning.md").read_text()


def test_settings_reach_fields_of_fields_and_names_are_checked():
    rewards = Rewards({"red": red, "green": green}, {"red": 2.0, "green": -1.0}, {})
    assert build_objective(find_row("dcpo-inpo"), {"objective.preference.beta": 7.0}).objective.preference.beta == 7.0
    assert build_objective(find_row("parrot"), {"rollouts.images": 3}, REDS).weights == {"red": 1.0, "green": 0.5}
    images = torch.rand(2, 3, 4, 4)
    summed = build_objective(find_row("ddpo"), None, rewards).score(images, ["1", "2"])
    assert torch.allclose(summed, 2 * red(images, []) - green(images, []))
    assert build_objective(find_row("dpo"), {"beta": 9.0}, paper=True).settings() == {
        **build_objective(find_row("dpo"), paper=True).settings(), "beta": 9.0}  # fmt: skip
    assert setting("beta=5e2") == ("beta", 500.0)
    assert setting("window=(0,2)") == ("window", (0, 2))
    assert setting("form=hinge") == ("form", "hinge")
    for arguments, said in (
        (("dpo", {"bta": 1}), "beta"),
        (("dcpo", {"objective.bta": 1}), "beta"),
        (("dpo", {"beta.x": 1}), "beta has no settings"),
        (("dpo", None, rewards), "takes no reward"),
        (("d3po",), "learns from rewards"),
        (("dpo", {"beta": -1.0}), "above 0"),
    ):
        name, *others = arguments
        with pytest.raises(ValueError, match=said):
            build_objective(find_row(name), *others)
    with pytest.raises(ValueError, match="no published settings"):
        build_objective(find_row("sft"), paper=True)


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
               "--set", "beta=100", "--lr", "1e-3"]  # fmt: skip
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
    assert main(["train", "dpo", "--data", str(tmp_path / "nothing")]) == 1
    assert "diffalign pairs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rewards"):
        diffalign.train("d3po", data=["a"], out=tmp_path / "out")
    with pytest.raises(ValueError, match="evaluate_every"):
        diffalign.train("dpo", data=tmp_path, out=tmp_path / "out", watch=["shapes-reward"])
    with pytest.raises(ValueError, match="held_out_prompts"):
        diffalign.train("dpo", data=tmp_path, out=tmp_path / "out", held_out_prompts=["a"])
    with pytest.raises(ValueError, match="dpo"):
        diffalign.train("dop", data=tmp_path, out=tmp_path / "out")
    with pytest.raises(ValueError, match="gamma"):
        diffalign.train("dpo", data=tmp_path, out=tmp_path / "out", objective_settings={"gamma": 1})
