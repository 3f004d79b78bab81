"""The code in the documents runs: the README's on the embedded models, the example method on a toy, the tour of the shapes world."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
import torch

from diffalign.types import NoiseProblem, RewardScores
from tests.places import ROOT, WEIGHTS


def code(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)


def test_the_readme_runs(tmp_path, monkeypatch):
    if not all((WEIGHTS / name).is_dir() for name in ("shapes-turbo", "shapes-clip", "shapes-preference")):
        pytest.skip("the models are not trained yet: there is no diffalign/shapes/weights")
    monkeypatch.chdir(tmp_path)
    (block,) = code("README.md")
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
