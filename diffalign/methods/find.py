"""FIND: learn, for one prompt, a normal distribution of the initial noise under which images score well; no gradient is needed.

Paper: Chen et al., "FIND: Fine-tuning Initial Noise Distribution with Policy Optimization for Diffusion Models", ACM MM 2024 (2407.19453).

One decision an episode: the prompt is the state, the noise z the action, the frozen sampler the world, the reward of the image the return.

    pi(z) = N(mu, diag(sigma^2)),  begins at N(0, I)
    rho   = exp(l(z) - l_b(z)),  l the mean over entries of ln pi, l_b the same when z was drawn
    loss  = - w_r A clamp(rho, 1 - eps, 1 + eps) + w_kl mean(mu^2 + (sigma - 1)^2),  A = r - baseline

mu, sigma -> `NoiseDistribution.mean`, `std`;  eps -> `clip`;  w_kl / w_r -> `pull`;  A's baseline -> `baseline`;
noises drawn at once -> `candidates`;  evaluations of the generator -> `budget`;  reuse of what was drawn before -> `replays`, `history`.

The public code reads rewards and noises from different rows of its buffer and learns nothing (a test here fails where they are mixed up).
`FIND.paper(reward)` is what the paper describes: one noise an iteration, the ratio against N(0, I) throughout, which makes the clip a
trust region around the prior, and a small network as baseline, its "reward calibration". The default differs so:

1. Several candidates an iteration with the mean of the others as baseline, divided by their spread: with one prompt the network would learn
   one slowly moving number, from far too few samples.
2. The ratio is against the distribution that a noise was really drawn from, which corrects replays, and the trust region is explicit:
   `kl_budget` nats an entry, into which mu is scaled back after each update. Adam's step is larger: 50 images cannot pay for small ones.
3. sigma is not learned; `sphere` keeps mean(mu^2) + sigma^2 = 1, so that noises stay on the shell where the model knows them.

The best image that was made is returned, and the distribution, from which as many more can be drawn as are wanted.
"""

from __future__ import annotations

import logging
import math
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.methods.checks import check_flag, check_integer, check_number
from diffalign.methods.search import score_noises
from diffalign.methods.tracking import Tracker, evaluation_limit
from diffalign.noise import NoiseDistribution, seeded_noise, spread
from diffalign.types import NoiseProblem, NoiseResult, Reward

logger = logging.getLogger(__name__)
LEAST_STD = 1e-4  # as in the public code


@dataclass(frozen=True, eq=False)
class FIND:
    """FIND(reward, budget=50)."""

    name: ClassVar[str] = "find"

    reward: Reward
    """r. It needs no gradient."""
    _: KW_ONLY
    budget: int = 50
    """Evaluations of the generator for each sample, >= 1. Paper: 150."""
    seconds: float | None = None
    """> 0: learn for so long instead, to the end of a drawing. None: the budget bounds it."""
    candidates: int = 8
    """Noises drawn of each sample between updates, >= 1; >= 2 for the baseline "others". Paper: 1."""
    lr: float = 0.03
    """Adam's step, > 0: how far an entry of mu moves in one update. Paper: 0.001."""
    clip: float = 0.2
    """eps > 0: a noise counts while its ratio lies in 1 - eps ... 1 + eps. Paper: 0.2."""
    pull: float = 0.0
    """w_kl / w_r >= 0, towards N(0, I). Paper: 0.001."""
    kl_budget: float | None = 0.1
    """Nats an entry, > 0, that the distribution may leave N(0, I) by; None: no bound but the clip's. Paper: none."""
    baseline: Literal["others", "network"] = "others"
    """What a reward is compared with: the mean of the other candidates, or a network of (mu, sigma). Paper: network."""
    reference: Literal["behaviour", "prior"] = "behaviour"
    """What the ratio is against: the distribution that drew the noise, or N(0, I). Paper's code: prior."""
    replays: int = 3
    """Updates after each drawing, >= 1, over what was just drawn and the `history` before it. Paper's code: 1."""
    history: int = 3
    """Earlier drawings that are replayed, >= 0. Paper's code: none."""
    learn_std: bool = False
    """Learn sigma too. Paper: yes."""
    sphere: bool = True
    """Keep mean(mu^2) + sigma^2 at 1 by scaling sigma; without effect where sigma is learned. Paper: no."""
    batch_size: int | None = None
    """Images made at once, >= 1; None makes the candidates of every sample at once. Memory and speed only."""

    def __post_init__(self) -> None:
        for name, least in (("budget", 1), ("candidates", 1), ("replays", 1), ("history", 0)):
            check_integer(name, getattr(self, name), least)
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size, 1)
        if self.seconds is not None:
            check_number("seconds", self.seconds, 0.0, above=True)
        for name in ("lr", "clip"):
            check_number(name, getattr(self, name), 0.0, above=True)
        check_number("pull", self.pull, 0.0)
        if self.kl_budget is not None:
            check_number("kl_budget", self.kl_budget, 0.0, above=True)
        for name in ("learn_std", "sphere"):
            check_flag(name, getattr(self, name))
        for name, known in (("baseline", ("others", "network")), ("reference", ("behaviour", "prior"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {getattr(self, name)!r}.")
        if self.baseline == "others" and self.candidates < 2:
            raise ValueError("candidates must be at least 2 for the baseline 'others', got 1; with one, use baseline='network'.")

    @classmethod
    def paper(cls, reward: Reward, *, budget: int = 150) -> FIND:
        """The published setting, with noises and rewards rightly paired."""
        return cls(reward, budget=budget, candidates=1, lr=1e-3, clip=0.2, pull=1e-3, kl_budget=None, baseline="network",
                   reference="prior", replays=1, history=0, learn_std=True, sphere=False)  # fmt: skip

    @torch.enable_grad()
    def search(self, problem: NoiseProblem) -> NoiseResult:
        """Learn every sample's distribution. A candidate whose score is not finite teaches nothing; a warning names it."""
        tracker = Tracker(problem, self.seconds)
        self.reward.prepare(problem.prompts)
        start = problem.noise.detach().float()
        mean = torch.zeros_like(start).requires_grad_()
        log_std = torch.zeros_like(start).requires_grad_(self.learn_std)
        optimizer = torch.optim.Adam([mean, log_std] if self.learn_std else [mean], lr=self.lr)
        network = [Calibration(start[0].numel(), seed) for seed in problem.seeds] if self.baseline == "network" else None
        past: list[Drawing] = []
        made, limit = 0, evaluation_limit(self.budget, self.seconds)
        while made < limit and not tracker.out_of_time:
            policy = self._policy(mean, log_std)
            count = min(self.candidates, limit - made)
            drawing = self._draw(problem, tracker, policy, start, made, count)
            made += count
            past = [*past, drawing][-1 - self.history :]
            drawing.advantages = self._advantages(drawing, network)
            for _ in range(self.replays):
                now = self._policy(mean, log_std)
                loss = sum(self._loss(now, each) for each in past) / len(past)
                loss = loss + self.pull * (now.mean.square() + (now.std - 1).square()).flatten(1).mean(1).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                self._bound(mean, log_std)
        result = tracker.result(self)
        result.distribution = self._policy(mean.detach(), log_std.detach())
        return result

    @torch.no_grad()
    def _draw(self, problem: NoiseProblem, tracker: Tracker, policy: NoiseDistribution, start: Tensor, made: int, count: int) -> Drawing:
        """`count` candidates of every sample, evaluated; the very first is the given noise."""
        b = len(start)
        shape = start.shape[1:]
        draws = [start if made + k == 0 else policy.mean + policy.std * seeded_noise(shape, problem.seeds, made + k, start.device)
                 for k in range(count)]  # fmt: skip
        noise = torch.cat(draws)
        rows = list(range(b)) * count
        kl = policy.kl_per_entry().repeat(count)
        totals = score_noises(problem, tracker, self.reward, rows, noise, {"kl_per_entry": kl}, self.batch_size or len(rows))
        for j, total in enumerate(totals):
            if not math.isfinite(total):
                logger.warning("%s: %s has reward %s at candidate %d, which teaches nothing.",
                               self.name, tracker.describe(rows[j]), total, made + j // b)  # fmt: skip
        behaviour = NoiseDistribution(policy.mean.clone(), policy.std.clone())
        return Drawing(noise.view(count, b, *shape), torch.tensor(totals, device=start.device).view(count, b), behaviour)

    def _advantages(self, drawing: Drawing, network: list[Calibration] | None) -> Float[Tensor, "k b"]:
        """What each candidate is worth beyond its baseline; 0 where its score is not finite."""
        known = drawing.rewards.isfinite()
        rewards = drawing.rewards.nan_to_num(0.0, 0.0, 0.0)
        if network is not None:
            columns = [each.advantages(drawing, i) for i, each in enumerate(network)]
            return torch.where(known, torch.stack(columns, dim=1), torch.zeros_like(rewards))
        counts = known.sum(0)
        others = (rewards.sum(0) - rewards) / (counts - 1).clamp_min(1)
        deviations = torch.where(known, rewards - rewards.sum(0) / counts.clamp_min(1), torch.zeros_like(rewards))
        spread_of_them = (deviations.square().sum(0) / (counts - 1).clamp_min(1)).sqrt().clamp_min(1e-6)
        return torch.where(known & (counts > 1), (rewards - others) / spread_of_them, torch.zeros_like(rewards))

    def _policy(self, mean: Tensor, log_std: Tensor) -> NoiseDistribution:
        if self.learn_std or not self.sphere:
            return NoiseDistribution(mean, log_std.exp().clamp_min(LEAST_STD))
        left = (1 - mean.detach().square().flatten(1).mean(1)).clamp_min(LEAST_STD)
        return NoiseDistribution(mean, spread(left.sqrt(), mean).expand_as(mean))

    def _loss(self, policy: NoiseDistribution, drawing: Drawing) -> Tensor:
        """Minus the clipped objective, mean over candidates, summed over samples; each sample's gradient is its own."""
        count = len(drawing.noise)
        ratios = torch.stack([self.ratio(policy, drawing, k) for k in range(count)])
        return -(drawing.advantages * ratios.clamp(1 - self.clip, 1 + self.clip)).mean(0).sum()

    def ratio(self, policy: NoiseDistribution, drawing: Drawing, k: int) -> Float[Tensor, " b"]:
        """rho of candidate k under `policy`: of the tempered densities, mean over entries, so that it means the same at every size."""
        noise = drawing.noise[k]
        if self.reference == "prior":
            before = NoiseDistribution(torch.zeros_like(noise), torch.ones_like(noise)).log_density_per_entry(noise)
        else:
            before = drawing.behaviour.log_density_per_entry(noise)
        return (policy.log_density_per_entry(noise) - before).exp()

    @torch.no_grad()
    def _bound(self, mean: Tensor, log_std: Tensor) -> None:
        """Scales mu and ln sigma of every sample towards 0 until its KL is within the budget; by bisection, to 1e-3 of the budget."""
        if self.kl_budget is None:
            return
        low, high = torch.zeros(len(mean), device=mean.device), torch.ones(len(mean), device=mean.device)
        if bool((self._policy(mean, log_std).kl_per_entry() <= self.kl_budget).all()):
            return
        for _ in range(20):
            middle = (low + high) / 2
            within = self._policy(spread(middle, mean) * mean, spread(middle, mean) * log_std).kl_per_entry() <= self.kl_budget
            low, high = torch.where(within, middle, low), torch.where(within, high, middle)
        inside = self._policy(mean, log_std).kl_per_entry() <= self.kl_budget
        scale = spread(torch.where(inside, torch.ones_like(low), low), mean)
        mean.mul_(scale)
        log_std.mul_(scale)


@dataclass
class Drawing:
    """Candidates that were drawn together: noise "k b ...", rewards "k b", and the distribution that they came from."""

    noise: Tensor
    rewards: Tensor
    behaviour: NoiseDistribution
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))


class Calibration:
    """The paper's reward calibration for one prompt: a network that predicts the expected reward of (mu, sigma), fitted as it goes."""

    def __init__(self, entries: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            widths = (2 * entries, 256, 256, 256)
            layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
            self.network = nn.Sequential(*layers, nn.Linear(256, 1))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        self.inputs, self.rewards = [], []

    def advantages(self, drawing: Drawing, i: int) -> Float[Tensor, " k"]:
        """Rewards less what was predicted of their distribution, after one more step of the fit on all that was seen."""
        policy = drawing.behaviour.rows([i])
        given = torch.cat([policy.mean.flatten(), policy.std.flatten()]).cpu()
        rewards = drawing.rewards[:, i].cpu()
        self.inputs += [given] * int(rewards.isfinite().sum())
        self.rewards += rewards[rewards.isfinite()].tolist()
        if self.inputs:
            predicted = self.network(torch.stack(self.inputs[-256:])).squeeze(1)
            loss = (predicted - torch.tensor(self.rewards[-256:])).square().mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        with torch.no_grad():
            return (rewards - self.network(given)).to(drawing.rewards.device)
