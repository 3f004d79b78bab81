"""What searches cost beyond what they cannot do without, on the embedded one-step model, in one run.

    python scripts/search_overhead.py --out docs/results/search_overhead.json

1. ReNO at batch 1: seconds of an iteration, beside the bare forward and backward pass of network, decoder and reward called by hand.
2. Best-of-N on one prompt, its candidates at once, beside one by one.

Seconds are of the process, by one thread, so that a busy machine does not decide; of ReNO the median iteration, blocks in turn.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import diffalign
from diffalign.evaluation import machine
from diffalign.files import write_json

PROMPT = "a red circle left of a blue square"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=15, help="of ReNO, in each block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=48)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 24, 48])
    parser.add_argument("--out", type=Path, default=Path("outputs/search_overhead.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    pipe, reward = diffalign.load_pipeline("shapes-turbo"), diffalign.load_reward("shapes-reward")
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    ours, bare = [], []
    for block in range(args.blocks + 1):  # the first warms up
        times = reno(pipe, reward, args.iterations), by_hand(pipe, reward, args.iterations)
        if block:
            ours, bare = ours + times[0], bare + times[1]
    climb = {"reno": statistics.median(ours), "bare": statistics.median(bare)}
    climb["ratio"] = climb["reno"] / climb["bare"]
    print(climb, flush=True)
    one = best_of(pipe, reward, args.candidates, 1)
    at_once = {size: best_of(pipe, reward, args.candidates, size) for size in args.batch_sizes}
    drawn = {"one by one": one, **{f"{size} at once": seconds / one for size, seconds in at_once.items()}}
    print(drawn)
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **machine.machine(pipe.device),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        args.out, {**facts, "an iteration at batch 1, seconds": climb, f"best of {args.candidates}, seconds and shares of them": drawn}
    )


def reno(pipe: Any, reward: Any, iterations: int) -> list[float]:
    """Seconds from one evaluation of the climb to the next."""
    heard: list[float] = []
    method = diffalign.ReNO.paper(reward, budget=iterations + 2)
    pipe(PROMPT, seed=0, plugins=[method], progress=lambda event: heard.append(time.process_time()))
    return [after - before for before, after in pairwise(heard[:-1])]  # the last evaluation has no backward pass


def by_hand(pipe: Any, reward: Any, iterations: int) -> list[float]:
    """The same without a library around it: the network predicts the clean latents, and a step is taken along the gradient."""
    conditioning = pipe.encode([PROMPT], unconditional=False)
    states, times = conditioning.tensors["prompt_embeds"], []
    timestep = torch.tensor([pipe.schedule(1).timesteps[0]])
    reward.prepare([PROMPT])
    noise = torch.randn(1, *pipe.noise_shape(), generator=torch.Generator().manual_seed(0))
    for _ in range(iterations):
        began = time.process_time()
        x = noise.requires_grad_()
        latents = pipe.unet(x, timestep, encoder_hidden_states=states).sample
        images = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        (gradient,) = torch.autograd.grad(reward(images, [PROMPT]).total.sum(), x)
        noise = x.detach() + 0.1 * gradient / gradient.norm()
        times.append(time.process_time() - began)
    return times


def best_of(pipe: Any, reward: Any, candidates: int, size: int) -> float:
    """Seconds of the whole call; the better of two."""
    method, times = diffalign.BestOfN(reward, budget=candidates, batch_size=size), []
    for _ in range(2):
        began = time.process_time()
        pipe(PROMPT, seed=0, plugins=[method])
        times.append(time.process_time() - began)
    return min(times)


if __name__ == "__main__":
    main()
