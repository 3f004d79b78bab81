"""ReNO against arithmetic worked by hand, against torch.optim.SGD, and against the paper's rules."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from diffalign.methods import BestOfN, ReNO
from diffalign.noise import norm_log_density, sample_norm
from diffalign.types import RewardScores

PLAIN = {"lr_unit": "absolute", "sphere": False, "patience": None, "starts": 1}


def path_of(problem):
    """The problem with a generator that notes the noise of every evaluation."""
    path = []

    def generate(noise, rows):
        path.append(noise.detach().clone())
        return problem.generate(noise, rows)

    return replace(problem, generate=generate), path


def test_two_steps_by_hand(plane):
    """eps_0 = (3, 4), goal (3, 10), R = -|eps - goal|^2 / 2, lr 5, mu 0.9, clip 0.1, no regulariser.

    g_0 = (0, 6), clipped (0, 0.1); v_1 = 0.1;                   eps_1 = 4    + 5 (0.1 + 0.9 * 0.1)  = 4.95
    g_1 = (0, 5.05), clipped (0, 0.1); v_2 = 0.9 * 0.1 + 0.1 = 0.19;  eps_2 = 4.95 + 5 (0.1 + 0.9 * 0.19) = 6.305
    R: -36/2 = -18;  -5.05^2/2 = -12.75125;  -3.695^2/2 = -6.8265125
    Heavy ball instead: eps_1 = 4 + 5 * 0.1 = 4.5,  eps_2 = 4.5 + 5 * 0.19 = 5.45.
    """
    problem, path = path_of(plane.problem([[3.0, 4.0]], ["3 10"]))
    search = ReNO(plane.reward(), budget=3, lr=5.0, momentum=0.9, clip=0.1, regularizer=0.0, **PLAIN)
    result = search.search(problem)
    torch.testing.assert_close(torch.cat(path), torch.tensor([[3, 4], [3, 4.95], [3, 6.305]]), atol=1e-5, rtol=0)
    assert result.trace.rewards["total"][0] == pytest.approx([-18, -12.75125, -6.8265125], abs=1e-4)
    assert result.trace.rewards["near"] == result.trace.rewards["total"]
    assert result.trace.rewards["norm"][0] == pytest.approx([5, math.hypot(3, 4.95), math.hypot(3, 6.305)], abs=1e-5)
    assert result.trace.diagnostics["gradient_norm"][0] == pytest.approx([6, 5.05], abs=1e-5)  # before clipping; none after the last
    assert result.trace.best == [2]
    torch.testing.assert_close(result.noise, path[2])

    problem, path = path_of(plane.problem([[3.0, 4.0]], ["3 10"]))
    replace(search, nesterov=False).search(problem)
    torch.testing.assert_close(torch.cat(path), torch.tensor([[3, 4], [3, 4.5], [3, 5.45]]), atol=1e-5, rtol=0)


def test_a_gradient_below_the_clip_is_left_as_it_is_unless_normalised(plane):
    """Goal 0.05 away: |g| = 0.05 < 0.1, so eps_1 = 4 + 1 * (0.05 + 0.9 * 0.05) = 4.095; normalised: 4 + 0.1 + 0.09 = 4.19."""
    for normalize, expected in ((False, 4.095), (True, 4.19)):
        problem, path = path_of(plane.problem([[3.0, 4.0]], ["3 4.05"]))
        ReNO(plane.reward(), budget=2, lr=1.0, regularizer=0.0, normalize=normalize, **PLAIN).search(problem)
        assert path[1][0].tolist() == pytest.approx([3, expected], abs=1e-4)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_whole_path_is_that_of_torch_sgd(nesterov, curved):
    """The regulariser is written here as the paper writes it; samples are optimised one at a time, as torch's clipping needs."""
    samples = [3, 1, 4]
    problem, path = path_of(curved.problem(samples))
    search = replace(ReNO.paper(curved.reward()), lr=0.7, budget=9, nesterov=nesterov, regularizer=0.05)
    search.search(problem)
    for i in range(len(samples)):
        eps = problem.noise[i : i + 1].clone().requires_grad_()
        optimizer = torch.optim.SGD([eps], lr=0.7, momentum=0.9, nesterov=nesterov)
        for t in range(9):
            torch.testing.assert_close(path[t][i : i + 1], eps.detach(), atol=2e-6, rtol=1e-5)
            total = curved.reward()(curved.generate(eps, [i]), [problem.prompts[i]]).total.sum()
            density = (eps.numel() - 1) * eps.norm().log() - eps.norm() ** 2 / 2
            optimizer.zero_grad()
            (-(total + 0.05 * density)).backward()
            torch.nn.utils.clip_grad_norm_([eps], 0.1)
            optimizer.step()


def test_the_regulariser_by_hand():
    """d = 2: K(r) = ln r - r^2/2, mode at r = 1 where K = -1/2. At eps = (3, 4): r = 5, K = ln 5 - 12.5, less the mode: ln 5 - 12.

    Its gradient is ((d - 1)/r^2 - 1) eps = (1/25 - 1) (3, 4) = (-2.88, -3.84). At r = sqrt(d - 1) both are zero, for every d.
    """
    eps = torch.tensor([[3.0, 4.0], [0.6, 0.8]], requires_grad=True)
    density = norm_log_density(eps)
    assert density.tolist() == pytest.approx([math.log(5) - 12, 0], abs=1e-6)
    density.sum().backward()
    torch.testing.assert_close(eps.grad, torch.tensor([[-2.88, -3.84], [0.0, 0.0]]), atol=1e-6, rtol=1e-6)
    for shape in ((4, 64, 64), (32, 32, 32)):
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        d = noise.numel()
        noise = (noise * (math.sqrt(d - 1) / noise.double().norm())).float().requires_grad_()
        density = norm_log_density(noise)
        (gradient,) = torch.autograd.grad(density.sum(), noise)
        assert abs(density.detach()) < 1e-2  # the two terms of K are about 10^5
        assert gradient.norm() < 1e-3
        assert norm_log_density(1.01 * noise).detach() == pytest.approx((d - 1) * math.log(1.01) - (d - 1) * (1.01**2 - 1) / 2, rel=1e-2)


def test_the_regulariser_alone_brings_the_norm_to_its_mode(plane):
    search = ReNO(plane.reward(scale=0.0), budget=60, lr=1.0, clip=1.0, momentum=0.5, regularizer=0.2, **PLAIN)
    result = search.search(plane.problem([[3.0, 4.0]], ["0 0"]))
    assert result.trace.diagnostics["noise_norm"][0][-1] == pytest.approx(1, abs=1e-3)
    assert result.trace.diagnostics["norm_log_density"][0][-1] == pytest.approx(0, abs=1e-5)


def test_the_best_image_is_chosen_without_the_regulariser_and_may_be_the_first(plane):
    """The start is the goal, where R is greatest; the regulariser pulls inwards, so R + K rises later and must not be what chooses."""
    search = ReNO(plane.reward(), budget=8, lr=0.5, regularizer=0.5, **PLAIN)
    result = search.search(plane.problem([[3.0, 4.0]], ["3 4"]))
    total, density = result.trace.rewards["total"][0], result.trace.diagnostics["norm_log_density"][0]
    assert total[0] == 0
    assert total[1] < 0
    assert total[1] + 0.5 * density[1] > total[0] + 0.5 * density[0]
    assert result.trace.best == [0]
    assert torch.equal(result.noise, torch.tensor([[3.0, 4.0]]))


def test_the_paper_preset_is_the_published_setting(curved):
    asked = []

    def generate(noise, rows):
        asked.append(noise.requires_grad)
        return curved.generate(noise, rows)

    search = ReNO.paper(curved.reward())
    settings = {f.name: getattr(search, f.name) for f in fields(ReNO)}
    published = {"budget": 50, "lr": 5.0, "lr_unit": "absolute", "momentum": 0.9, "nesterov": True, "clip": 0.1, "regularizer": 0.01}
    assert published.items() <= settings.items()
    assert (search.sphere, search.normalize, search.patience, search.target, search.starts) == (False, False, None, None, 1)
    trace = search.search(curved.problem([3], generate=generate)).trace
    assert asked == [True] * 49 + [False]  # 50 evaluations, of which 49 are followed by an update
    assert len(trace.rewards["total"][0]) == 50
    assert len(trace.diagnostics["gradient_norm"][0]) == 49


def test_the_default_step_is_the_papers_fraction_of_the_radius(curved):
    """lr 5 with clip 0.1 at d = 4*64*64 moves by 1/256 of sqrt(d) = 128; so does lr 10 at d = 4*128*128; the default does it at any d."""
    assert 5 * 0.1 / 128 == 10 * 0.1 / 256 == ReNO(curved.reward()).lr
    problem, path = path_of(curved.problem([3]))
    ReNO(curved.reward(), budget=2, momentum=0.0, sphere=False, normalize=True).search(problem)
    assert sample_norm(path[1] - path[0]).tolist() == pytest.approx([math.sqrt(18) / 256], rel=1e-4)


def test_the_sphere_keeps_every_norm_and_leads_to_the_point_nearest_the_goal(plane):
    """Starts of norm 5 and 1, goals (0, 10) and (-1, 0): the optimum on each circle is the goal's direction, whatever the regulariser."""
    problem, path = path_of(plane.problem([[3.0, 4.0], [0.6, 0.8]], ["0 10", "-1 0"]))
    search = ReNO(plane.reward(), budget=60, starts=1, lr=0.01, momentum=0.8, clip=1.0, patience=None)
    result = search.search(problem)
    for noise in path:
        assert sample_norm(noise).tolist() == pytest.approx([5, 1], rel=1e-5)
    torch.testing.assert_close(result.noise, torch.tensor([[0.0, 5.0], [-1.0, 0.0]]), atol=0.1, rtol=0)
    without = replace(search, regularizer=0.0).search(plane.problem([[3.0, 4.0], [0.6, 0.8]], ["0 10", "-1 0"]))
    torch.testing.assert_close(without.noise, result.noise, atol=1e-3, rtol=0)
    assert result.trace.diagnostics["cosine_to_start"][0][0] == pytest.approx(1)
    assert result.trace.diagnostics["cosine_to_start"][0][result.trace.best[0]] == pytest.approx(0.8, abs=0.02)


def test_normalised_steps_do_not_depend_on_the_rewards_scale(curved):
    noises = [ReNO(curved.reward(scale), budget=8, normalize=True).search(curved.problem([3, 1])).noise for scale in (1.0, 1000.0)]
    torch.testing.assert_close(*noises, atol=1e-4, rtol=1e-4)


def test_the_loss_scale_cancels_out(curved):
    one, two = (ReNO(curved.reward(), budget=8, loss_scale=s).search(curved.problem([3, 1])) for s in (1.0, 1024.0))
    torch.testing.assert_close(one.noise, two.noise)
    assert one.trace.rewards["total"][0] == pytest.approx(two.trace.rewards["total"][0])


def test_a_better_start_is_taken_from_the_candidates_of_best_of_n(curved):
    problem, path = path_of(curved.problem([3, 1]))
    result = ReNO(curved.reward(), budget=9, starts=5, patience=None).search(problem)
    drawn = BestOfN(curved.reward(), budget=5).search(curved.problem([3, 1]))
    torch.testing.assert_close(path[5], drawn.noise)
    for i in range(2):
        totals = result.trace.rewards["total"][i]
        assert totals[:5] == pytest.approx(drawn.trace.rewards["total"][i])
        assert totals[5] == pytest.approx(max(totals[:5]))
        assert len(totals) == 9
        assert max(totals) > max(totals[:5])
    assert torch.equal(result.initial_images, curved.generate(problem.noise, [0, 1]))


def test_a_sample_stops_at_its_target_and_leaves_the_batch(plane):
    """Sample 0 begins at -18 and climbs as worked above (-12.75, -6.83, ...); sample 1 begins at its goal."""
    sizes = []

    def generate(noise, rows):
        sizes.append(list(rows))
        return plane.generate(noise, rows)

    problem = plane.problem([[3.0, 4.0], [1.0, 1.0]], ["3 10", "1 1"], generate=generate)
    result = ReNO(plane.reward(), budget=9, lr=5.0, regularizer=0.0, target=-7.0, **PLAIN).search(problem)
    assert sizes == [[0, 1], [0], [0]]
    assert [len(series) for series in result.trace.rewards["total"]] == [3, 1]


def test_a_plateau_stops_a_sample(plane):
    """No gradient: nothing is gained, so `patience` evaluations after the climb's first the sample stops. A steady climb does not."""
    still = ReNO(plane.reward(scale=0.0), budget=30, starts=1, patience=4).search(plane.problem([[3.0, 4.0]], ["0 0"]))
    assert len(still.trace.rewards["total"][0]) == 5
    drawn = ReNO(plane.reward(scale=0.0), budget=30, starts=7, patience=4).search(plane.problem([[3.0, 4.0]], ["0 0"]))
    assert len(drawn.trace.rewards["total"][0]) == 7 + 5
    climb = ReNO(plane.reward(), budget=30, starts=1, lr=1e-4, patience=4).search(plane.problem([[3.0, 4.0]], ["5 0"]))
    assert len(climb.trace.rewards["total"][0]) == 30


def test_what_drawing_starts_gained_is_not_the_climbs(plane):
    """From -1250 a draw near the goal gains more than 1200, beside which a steady climb is nothing; it must go on all the same."""
    search = ReNO(plane.reward(), budget=25, starts=5, lr=1e-4, sphere=False, regularizer=0.0, patience=4)
    totals = search.search(plane.problem([[30.0, 40.0]], ["0 0"])).trace.rewards["total"][0]
    assert max(totals[:5]) - totals[0] > 1200
    assert 0 < totals[-1] - totals[5] < 0.02 * 1200
    assert len(totals) == 25


@pytest.mark.parametrize(("budget", "starts"), [(1, 1), (2, 1), (3, 1), (4, 2), (12, 6)])
def test_half_of_the_budget_draws_starts_and_every_evaluation_counts(budget, starts, curved):
    """The climb's first evaluation makes the best start again, with its gradient: it is one of the budget."""
    asked = []

    def generate(noise, rows):
        asked.append((noise.requires_grad, noise.detach().clone()))
        return curved.generate(noise, rows)

    trace = ReNO(curved.reward(), budget=budget, patience=None).search(curved.problem([3], generate=generate)).trace
    drawn = starts if starts > 1 else 0
    assert [gradient for gradient, _ in asked] == [False] * drawn + [True] * (budget - drawn - 1) + [False]
    assert len(trace.rewards["total"][0]) == budget
    assert trace.settings["starts"] == starts
    if drawn:
        totals = trace.rewards["total"][0]
        best = totals.index(max(totals[:drawn]))
        assert torch.equal(asked[drawn][1], asked[best][1])
        assert totals[drawn] == pytest.approx(totals[best])


class Vanishing:
    """R = sum |x|^(1/2): at x = 0 its value is finite and its gradient is not."""

    name, differentiable = "vanishing", True

    def prepare(self, prompts):
        pass

    def __call__(self, images, prompts):
        total = images[:, 0, 0].abs().sqrt().sum(1)
        return RewardScores(total, {"root": total})


def test_a_gradient_that_is_not_finite_stops_its_sample_alone(plane, caplog):
    result = ReNO(Vanishing(), budget=5, starts=1).search(plane.problem([[1.0, 0.0], [1.0, 2.0]], ["a", "b"]))
    assert [len(series) for series in result.trace.rewards["total"]] == [1, 5]
    assert "sample 0 (prompt 'a', seed 0) has gradient_norm" in caplog.text
    assert torch.equal(result.noise[0], torch.tensor([1.0, 0.0]))
    assert torch.isfinite(result.noise).all()
    alone = ReNO(Vanishing(), budget=5, starts=1).search(plane.problem([[1.0, 2.0]], ["b"]))
    assert torch.equal(alone.noise[0], result.noise[1])


def test_a_reward_without_gradient_is_refused_by_name(plane):
    reward = plane.reward()
    reward.differentiable = False
    with pytest.raises(TypeError, match="'plane' has no gradient"):
        ReNO(reward)

    class Mix(plane.reward):
        differentiable = False
        members = (plane.reward(), reward)

    reward.name = "jpeg"
    with pytest.raises(TypeError, match="reward 'jpeg' has no gradient"):
        ReNO(Mix())


def test_a_lost_gradient_is_reported_by_its_place(plane):
    class Detached(plane.reward):
        def __call__(self, images, prompts):
            return super().__call__(images.detach(), prompts)

    problem = plane.problem([[3.0, 4.0]], ["3 10"])
    with pytest.raises(TypeError, match="reward 'near' has no gradient"):
        ReNO(Detached(), budget=2).search(problem)
    with pytest.raises(RuntimeError, match="generate returned images without a gradient"):
        ReNO(plane.reward(), budget=2).search(replace(problem, generate=lambda noise, rows: plane.generate(noise, rows).detach()))


def test_it_climbs_also_where_the_caller_has_turned_gradients_off(curved):
    problem = curved.problem([3])
    with torch.no_grad():
        result = ReNO(curved.reward(), budget=5).search(problem)
    assert result.trace.best == [4]
    assert torch.equal(result.noise, ReNO(curved.reward(), budget=5).search(problem).noise)


def test_the_text_is_prepared_once(plane):
    reward = plane.reward()
    ReNO(reward, budget=3).search(plane.problem([[3.0, 4.0], [1.0, 0.0]], ["3 10", "0 1"]))
    assert reward.prepared == ["3 10", "0 1"]
