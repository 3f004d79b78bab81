"""The code in the documents runs: the README's on the embedded models, the example method on a toy, the tour of the shapes world.

Commands are read by the real parser, and what is generated into the README is what its registries and results give today.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from types import ModuleType

import pytest
import torch

from diffalign import cli
from diffalign.cli import program
from diffalign.cli.arguments import read
from diffalign.methods import table
from diffalign.pipelines.presets import FAMILIES, PRESETS
from diffalign.types import NoiseProblem, RewardScores
from tests.places import ROOT, WEIGHTS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"NAME=WEIGHT": "brightness=1", "$n": "4", "colours": "shapes"}  # the last: of docs/adding_a_benchmark.md
NOT_REGISTERED = "--method best-of-n neighbours"  # the example of docs/adding_a_method.md, whose row the reader adds


def code(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)


def commands() -> list[str]:
    """Every `diffalign ...` that a page shows, in a block or in a line of text, that has more than a command's name."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = page.read_text()
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash", "sh") else ():
                found.update(dict.fromkeys(re.findall(r"(?:^|do |-m )(diffalign(?:\.cli)? [^;]+)", line.strip())))
        found.update(dict.fromkeys(each.replace("\n", " ") for each in re.findall(r"`(diffalign \w[^`]+)`", text)))
    return [each for each in found if len(shlex.split(each, comments=True)) > 2 and "COMMAND" not in each]


def arguments(command: str) -> list[str]:
    """What follows the program's name, with something in the place of what the reader fills in, and without what `...` leaves out."""
    words = shlex.split(command, comments=True)[1:]
    filled: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if word == "..." and not before.startswith("--"):
            continue
        if word == "NAME":
            word = "shapes" if before == "bench" else "brightness"
        filled.append(PLACEHOLDERS.get(word, word))
    return filled


class Parsed(BaseException):
    """Leaves the command line when its arguments have been read."""


def parse(argv: list[str]) -> None:
    """Reads the arguments as the program would, and stops there. Fails with the program's own sentence where they are refused."""

    def stop(args, argv):
        if "row" in args:
            read(args.row.takes, args)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "start", stop)
        with pytest.raises(Parsed):
            cli.main(argv)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_documents_is_one(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for tuned in re.findall(r"--lora (\S+)", command):  # what an earlier command of the page has written
        (tmp_path / tuned).mkdir(parents=True)
        (tmp_path / tuned / "pytorch_lora_weights.safetensors").touch()
    if NOT_REGISTERED in command:
        with pytest.raises(SystemExit):
            parse(arguments(command))
        assert "neighbours" in capsys.readouterr().err
        parse(arguments(command.replace("neighbours", "reno")))
    else:
        parse(arguments(command))


def test_a_command_that_is_none_is_noticed(capsys):
    for wrong in ("diffalign bench shapes --no-such-option", "diffalign generate 'a star' --budget many", "diffalign generat 'a star'"):
        with pytest.raises(SystemExit):
            parse(arguments(wrong))
        assert "error" in capsys.readouterr().err


def test_scripts_and_targets_of_the_documents_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        text = page.read_text()
        for script in re.findall(r"python (scripts/\w+\.py)", text):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
            assert target in targets, f"{page.name}: make {target}"


def test_the_real_model_of_the_readme_is_asked_of_the_hub(capsys, tmp_path):
    """Its command gets as far as the weights, which are not here: the tests may not download."""
    (command,) = (
        each for each in commands() if "--pipeline sd-turbo" in each and "a red bird left of a blue cup" in each and "--out" not in each
    )
    assert cli.main([*arguments(command), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert "stabilityai/sd-turbo" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def readme_text():
    spec = importlib.util.spec_from_file_location("readme_text", ROOT / "scripts" / "readme_text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_in_the_readme_is_current(readme_text):
    page = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / readme_text.RESULT).read_text())
    for name, text in (("measured", readme_text.measured(result)), ("methods", readme_text.methods_by_family())):
        assert readme_text.replaced(page, name, text) == page, f"`python scripts/readme_text.py` has another {name!r} than README.md"
    with pytest.raises(ValueError, match="marks"):
        readme_text.replaced(page, "nothing", "")


def test_the_marks_of_the_table_of_methods(readme_text):
    """Each mark where it is known to belong; and every method and family of the registries is in the table."""
    rows = {row.split(" | ")[0].strip("| `"): row.strip("|").split("|")[1:] for row in readme_text.methods_by_family().splitlines()[2:]}
    assert list(rows) == [row.name for row in table.METHODS]
    column = {name: i + 1 for i, name in enumerate(FAMILIES)}
    assert {len(cells) for cells in rows.values()} == {len(FAMILIES) + 1}
    assert rows["reno"][0].strip() == rows["adaptive"][0].strip() == readme_text.MEASURED
    assert rows["reno"][column["flux"]].strip() == rows["reuse"][column["wan"]].strip() == readme_text.TESTED
    assert rows["find"][column["stable-diffusion"]].strip() == readme_text.WORKS
    assert rows["adaptive"][column["sana-sprint"]].strip() == readme_text.NOT  # one branch: there is nothing to leave out


def test_the_real_model_s_code_names_what_there_is():
    """The README's first example needs weights; its names must be those of the registries, and its calls those of the second."""
    real, embedded = code("README.md")
    assert set(re.findall(r'load_pipeline\("([^"]+)"', real)) <= set(PRESETS)
    from diffalign.reward_models import SPECS

    assert set(re.findall(r'"([a-z0-9.-]+)"(?:: [\d.]+|\])', real)) <= set(SPECS)
    calls = [re.findall(r"diffalign\.(\w+)", block) for block in (real, embedded)]
    assert calls[0] == calls[1]


def test_the_readme_runs(tmp_path, monkeypatch):
    if not all((WEIGHTS / name).is_dir() for name in ("shapes-turbo", "shapes-reward")):
        pytest.skip("the models are not trained yet: there is no diffalign/shapes/weights")
    monkeypatch.chdir(tmp_path)
    _, block = code("README.md")
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "after.png").stat().st_size > 0
    out = scope["out"]
    assert out.noise.shape[0] == len(out.images) == len(out.initial_images) == 1
    totals = out.trace.rewards["total"][0]
    assert max(totals) == totals[out.trace.best[0]] >= totals[0]


def test_the_tour_of_the_shapes_world_runs():
    (block,) = code("docs/shapes.md")
    scope: dict = {}
    exec(compile(block, "docs/shapes.md", "exec"), scope)
    assert scope["image"].shape == (64, 64, 3)


def test_an_image_is_scored_as_the_page_on_scoring_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = code("docs/score.md")
    scope: dict = {}
    exec(compile(block, "docs/score.md", "exec"), scope)
    assert 0 < scope["scores"].item() < 1


def test_the_mix_of_the_page_on_mixing_climbs():
    if not all((WEIGHTS / name).is_dir() for name in ("shapes-turbo", "shapes-clip", "shapes-preference", "shapes-aesthetic")):
        pytest.skip("the models are not trained yet: there is no diffalign/shapes/weights")
    (block,) = code("docs/reward_mixing.md")
    scope: dict = {}
    exec(compile(block, "docs/reward_mixing.md", "exec"), scope)
    rewards = scope["out"].trace.rewards
    totals = rewards["total"][0]
    assert max(totals) > totals[0]
    units = scope["reward"].units({name: torch.tensor(rewards[name][0]) for name in scope["models"]}, [scope["prompt"]] * len(totals))
    torch.testing.assert_close(torch.stack(list(units.values())).amin(0), torch.tensor(totals), atol=1e-3, rtol=0)


class Nearness:
    """A reward with no gradient: minus the distance of an image's mean from its prompt, read as a number."""

    differentiable = False

    def prepare(self, prompts) -> None:
        self.prepared = list(prompts)

    def __call__(self, images, prompts) -> RewardScores:
        total = -(images.mean(dim=(1, 2, 3)) - torch.tensor([float(p) for p in prompts])).abs()
        return RewardScores(total, {"nearness": total})


def test_the_example_method_climbs_and_keeps_samples_apart(monkeypatch):
    """Noise "b 3 2 2" is turned into an image by a sigmoid; the reward wants a given mean."""
    (block,) = code("docs/adding_a_method.md")
    module = ModuleType("neighbours")
    monkeypatch.setitem(sys.modules, "neighbours", module)  # dataclasses look their module up
    exec(compile(block, "docs/adding_a_method.md", "exec"), module.__dict__)

    def problem(indices) -> NoiseProblem:
        prompts, seeds = ["0.9", "0.1", "0.5"], [3, 4, 5]
        noise = torch.stack([torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(seeds[i])) for i in indices])
        return NoiseProblem(noise, [prompts[i] for i in indices], [seeds[i] for i in indices], lambda noise, rows: noise.sigmoid())

    search = module.Neighbours(Nearness(), budget=60)
    together = search.search(problem([0, 1, 2]))
    for i in range(3):
        totals = together.trace.rewards["total"][i]
        assert len(totals) == 60
        assert max(totals) > totals[0] + 0.02
        alone = search.search(problem([i]))
        torch.testing.assert_close(alone.noise[0], together.noise[i])
        assert alone.trace.best[0] == together.trace.best[i]
    assert together.trace.settings == {"budget": 60, "radius": 0.3}
    with pytest.raises(ValueError, match="radius must be a finite number above 0"):
        module.Neighbours(Nearness(), radius=0.0)
