"""Two small real noise methods and a step method, to try the pipeline's side of the contract with."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from diffalign.types import Evaluation, NoiseResult, Trace


class Ascend:
    """Gradient steps on the noise towards brighter images. Remembers what it was given."""

    name = "ascend"

    def __init__(self, iterations: int = 2, lr: float = 50.0) -> None:
        self.iterations, self.lr = iterations, lr
        self.problem = None

    def search(self, problem):
        self.problem = problem
        rows = range(len(problem.prompts))
        noise, scores, images = problem.noise, [], []
        for iteration in range(self.iterations):
            leaf = noise.clone().requires_grad_()
            image = problem.generate(leaf, rows)
            score = image.mean(dim=(1, 2, 3))
            (gradient,) = torch.autograd.grad(score.sum(), leaf)
            images.append(image.detach())
            scores.append(score.tolist())
            if problem.progress is not None:
                problem.progress(Evaluation(iteration, list(rows), {"total": scores[-1]}, images[-1]))
            last, noise = noise, noise + self.lr * gradient
        trace = Trace(self.name, {"total": [list(series) for series in zip(*scores, strict=True)]}, [self.iterations - 1] * len(rows))
        return NoiseResult(images[-1], last, images[0], trace)


class Redraw:
    """Evaluates the start and one fresh noise from each sample's seed, both samples of a pair in one call; returns the fresh one."""

    name = "redraw"

    def search(self, problem):
        count = len(problem.prompts)
        shape = problem.noise.shape[1:]
        fresh = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000)) for seed in problem.seeds])
        images = problem.generate(torch.cat([problem.noise, fresh]), [*range(count), *range(count)])
        trace = Trace(self.name, {"total": [[0.0, 1.0]] * count}, [1] * count)
        return NoiseResult(images[count:], fresh, images[:count], trace)


class Dim:
    """A step method: scales what the U-Net predicts, and counts its evaluations."""

    name = "dim"

    def __init__(self, factor: float = 0.5) -> None:
        self.factor, self.calls = factor, 0

    @contextmanager
    def attach(self, pipeline):
        def hook(module, args, output):
            self.calls += 1
            return (output[0] * self.factor, *output[1:])

        handle = pipeline.unet.register_forward_hook(hook)
        try:
            yield self
        finally:
            handle.remove()
