"""The same samples again and again under different guidance: what a search over guidance policies is fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from diffalign.guidance import GuidanceMethod
from diffalign.pipelines import inputs, state

Sample = Callable[[int, GuidanceMethod | None], Tensor]
"""sample(i, method): latents of batch i under a guidance method, differentiable in it; None guides in full."""


@contextmanager
def fixed_batches(
    pipeline: Any,
    prompts: Sequence[str],
    size: int,
    seed: int,
    arguments: Mapping[str, Any],
    negative_prompt: str | None = None,
) -> Iterator[Sample]:
    """Batches of `size` prompts, sample n from seed + n, as many as the prompts fill; after the last comes the first again.

    What full guidance makes of a batch is made once. The pipeline is as it was when the block ends.
    """
    batches = max(1, len(prompts) // size)
    targets: dict[int, Tensor] = {}

    def sample(i: int, method: GuidanceMethod | None) -> Tensor:
        batch = i % batches
        if method is None and batch in targets:
            return targets[batch]
        numbers = range(batch * size, (batch + 1) * size)
        conditioning = pipeline.encode([prompts[n % len(prompts)] for n in numbers], negative_prompt)
        noise = pipeline.draw_noise(inputs.make_generators([seed + n for n in numbers]))
        with ExitStack() as inner:
            if method is not None:
                inner.enter_context(pipeline.guide(method))
            latents = pipeline.noise_to_images(noise, conditioning, arguments, output_type="latent")
        if method is None:
            targets[batch] = latents
        return latents

    with state.frozen(pipeline), state.own_scheduler(pipeline):
        yield sample
