"""The training loop: resumed equals uninterrupted, accumulated equals at once, stops that lose nothing, guards, early stop."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffalign.training.loop import METRICS, STATE, LoopSettings, train
from diffalign.training.objectives.preference import DPO
from diffalign.training.objectives.sft import SFT
from tests.training.toy import Toy, ToyPairs, same, toy_policy

SETTINGS = LoopSettings(steps=8, lr=1e-2, warmup=2, batch_size=4, save_every=100)


class Stop(Exception):
    pass


def run(folder: Path, settings: LoopSettings = SETTINGS, objective=None, policy=None, data=None, **more):
    policy = policy or toy_policy()
    out = train(policy, objective or DPO(beta=50.0), data or ToyPairs(policy.backbone), settings, folder, **more)
    return policy, out


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def figures(folder: Path) -> list[dict]:
    """But for the time, which is another each time."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics(folder)]


# ---- what is the same ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, schedule="cosine", average=0.9, micro_batch=2, weight_decay=0.1)])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, settings):
    """Stopped by SIGTERM in the middle: the step is finished and saved."""
    whole, out = run(tmp_path / "whole", settings)

    def stop(step, _):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="step 4"):
        run(tmp_path / "parts", settings, on_step=stop)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [1, 2, 3, 4]
    resumed, again = run(tmp_path / "parts", settings, resume=True)
    assert same(whole.weights(), resumed.weights())
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert out.step == again.step == 8
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_killed_between_checkpoints_goes_on_from_the_last(tmp_path):
    """Metrics beyond the checkpoint are taken back; nothing else is left of the steps that were lost."""
    whole, _ = run(tmp_path / "whole")

    def die(step, _):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "parts", replace(SETTINGS, save_every=2), on_step=die)
    with (tmp_path / "parts" / METRICS).open("a") as file:
        file.write('{"step": 6, "lo')
    resumed, _ = run(tmp_path / "parts", replace(SETTINGS, save_every=2), resume=True)
    assert same(whole.weights(), resumed.weights())
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_a_longer_run_begins_as_a_shorter_one(tmp_path):
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "parts", replace(SETTINGS, steps=3))
    longer, _ = run(tmp_path / "parts", resume=True)
    assert same(whole.weights(), longer.weights())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    policies = [run(tmp_path / str(i), replace(SETTINGS, seed=seed))[0] for i, seed in enumerate((0, 0, 1))]
    assert same(policies[0].weights(), policies[1].weights())
    assert not same(policies[0].weights(), policies[2].weights())


def test_accumulated_gradients_are_those_of_the_micro_batches(tmp_path):
    """One step of plain numbers: the mean of the micro-batches' gradients, each with random numbers of its own."""
    seen = {}

    class Watched(DPO):
        def loss(self, policy, reference, batch, generator):
            loss, found = super().loss(policy, reference, batch, generator)
            seen.setdefault(generator.initial_seed(), torch.autograd.grad(loss, list(params), retain_graph=True))
            return loss, found

    policy = toy_policy()
    params = policy.parameters.values()
    data = ToyPairs(policy.backbone)
    _, out = run(tmp_path, replace(SETTINGS, steps=1, micro_batch=1), Watched(beta=50.0), policy, data)
    assert data.asked == [[0], [1], [2], [3]]
    assert len(seen) == 4
    mean = [torch.stack(parts).mean(0) for parts in zip(*seen.values(), strict=True)]
    assert out.figures["gradient_norm"] == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in mean)), rel=1e-5)
    assert out.figures["loss"] == pytest.approx(math.log(2), rel=1e-6)


TWO = """
import json, sys
from dataclasses import replace
from pathlib import Path
from accelerate import PartialState
from safetensors.torch import save_file
from tests.training.test_loop import SETTINGS, run
state = PartialState(cpu=True)
assert state.num_processes == 2, state
policy, out = run(Path(sys.argv[1]), replace(SETTINGS, micro_batch=1))
save_file(policy.weights(), f"{sys.argv[1]}/{state.process_index}.safetensors")
"""


@pytest.mark.processes
def test_two_processes_give_what_one_gives(tmp_path):
    from safetensors.torch import load_file

    one, _ = run(tmp_path / "one", replace(SETTINGS, micro_batch=1))
    script = tmp_path / "two.py"
    script.write_text(TWO)
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(script),
        str(tmp_path / "two"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [load_file(tmp_path / "two" / f"{i}.safetensors") for i in (0, 1)]
    assert same(*both)
    for name, weight in one.weights().items():
        torch.testing.assert_close(both[0][name], weight, rtol=1e-5, atol=1e-6)
    for line, other in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert other == pytest.approx(line, rel=1e-3, abs=1e-6)


# ---- what it does --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [SFT(), DPO(beta=20.0)])
def test_it_learns(tmp_path, objective):
    """Afterwards winners are denoised better than losers; the policy as it was knows no difference to speak of."""
    settings = LoopSettings(steps=60, lr=2e-2, batch_size=16)
    policy, _ = run(tmp_path, settings, objective)
    batch = ToyPairs(policy.backbone).take(range(1000, 1064))
    judge = DPO(beta=1.0)
    with torch.no_grad():
        _, found = judge.loss(policy.denoiser(), policy.reference(), batch, torch.Generator().manual_seed(0))
    assert found["implicit_accuracy"] > 0.9


def test_the_learning_rate_is_absolute_and_warms_up():
    settings = LoopSettings(steps=110, lr=0.1, warmup=10, schedule="cosine", batch_size=64, micro_batch=1)
    assert settings.learning_rate(0) == pytest.approx(0.01)
    assert settings.learning_rate(9) == settings.learning_rate(10) == 0.1
    assert settings.learning_rate(60) == pytest.approx(0.05)
    assert settings.learning_rate(110) == pytest.approx(0, abs=1e-12)
    assert replace(settings, schedule="constant").learning_rate(109) == 0.1


def test_gradients_are_clipped_and_their_norm_is_logged_as_it_was(tmp_path):
    """Plain steps are proportional to the gradient, so the longest is as long as `clip` allows; Adam hides that, its moments show it."""
    policy, out = run(tmp_path, replace(SETTINGS, steps=1, clip=1e-3), DPO(beta=1e4))
    assert out.figures["gradient_norm"] > 1
    assert math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters.values())) == pytest.approx(1e-3, rel=1e-3)


def test_the_weights_stay_within_their_budget(tmp_path):
    free, _ = run(tmp_path / "free", replace(SETTINGS, weight_budget=1e6))
    far = float(free.weight_distance().detach().sqrt())
    bound, _ = run(tmp_path / "bound", replace(SETTINGS, weight_budget=far / 3))
    assert float(bound.weight_distance().detach().sqrt()) == pytest.approx(far / 3, rel=1e-4)
    assert same(free.weights(), run(tmp_path / "none")[0].weights())
    logged = [line["weight_distance"] for line in metrics(tmp_path / "free")]
    assert len(logged) == 8
    assert logged[-1] == pytest.approx(far)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(tmp_path):
    class Broken(SFT):
        def loss(self, policy, reference, batch, generator):
            loss, found = super().loss(policy, reference, batch, generator)
            return (loss * math.nan if len(calls) == 3 else loss), (calls.append(0) or found)

    calls: list[int] = []
    policy, before = toy_policy(), {}
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 4, with a learning rate of 0\.01"):
        run(tmp_path, SETTINGS, Broken(), policy, on_step=lambda step, _: before.update(policy.weights()))
    assert same(before, policy.weights())
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_the_best_evaluation_is_kept_and_stops_the_run(tmp_path):
    """The score rises until step 4 and falls from there: two worse evaluations end the run, and step 4's weights come back."""
    settings = replace(SETTINGS, steps=50, evaluate_every=2, patience=2)
    at = {}

    def evaluate(policy, step):
        at[step] = policy.weights()
        return {"score": -abs(step - 4.0), "other": 1.0}

    policy, out = run(tmp_path / "a", settings, evaluate=evaluate)
    assert (out.step, out.kept_step) == (8, 4)
    assert [line["step"] for line in out.evaluations] == [0, 2, 4, 6, 8]
    assert same(policy.weights(), at[4])
    again, finished = run(tmp_path / "a", settings, evaluate=evaluate, resume=True)
    assert (finished.step, finished.kept_step) == (8, 4)
    assert same(again.weights(), at[4])
    assert [line["step"] for line in finished.evaluations] == [0, 2, 4, 6, 8]


def test_a_run_that_only_gets_worse_returns_the_model_as_it_was(tmp_path):
    settings = replace(SETTINGS, evaluate_every=1, patience=3)
    policy, out = run(tmp_path, settings, evaluate=lambda policy, step: {"score": -float(step)})
    assert (out.step, out.kept_step) == (3, 0)
    assert same(policy.weights(), toy_policy().weights())


def test_the_average_is_what_is_evaluated_and_kept(tmp_path):
    seen = {}
    settings = replace(SETTINGS, average=0.5, evaluate_every=8)

    def evaluate(policy, step):
        seen[step] = policy.weights()
        return {"score": float(step)}

    policy, _ = run(tmp_path / "a", settings, evaluate=evaluate)
    plain, _ = run(tmp_path / "b")
    assert same(policy.weights(), seen[8])
    assert not same(policy.weights(), plain.weights())


def test_collected_batches_may_be_used_several_times(tmp_path):
    class Collecting(SFT):
        def collect(self, policy, batch, generator):
            assert not torch.is_grad_enabled()
            collected.append(generator.initial_seed())
            return batch

        def loss(self, policy, reference, batch, generator):
            used.append(generator.initial_seed())
            return super().loss(policy, reference, batch, generator)

    collected, used = [], []
    run(tmp_path, replace(SETTINGS, steps=2, updates_per_batch=3, micro_batch=2), Collecting())
    assert len(collected) == 4
    assert len(set(used)) == 12
    assert not set(used) & set(collected)


def test_half_precision_computes_in_half_and_keeps_the_weights(tmp_path):
    dtypes = set()

    class Seen(Toy):
        def predict(self, *arguments):
            output = super().predict(*arguments)
            dtypes.add(output.dtype)
            return output

    from diffalign.training.policy import Adaptation, Policy

    policy = Policy(Seen(), "net", Adaptation(rank=None))
    run(tmp_path, replace(SETTINGS, precision="bf16"), SFT(), policy)
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}


def test_tensorboard_is_written_where_it_is_asked_for(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, replace(SETTINGS, steps=2), track=True)
    assert list(tmp_path.rglob("events.out.tfevents.*"))


# ---- what is refused -----------------------------------------------------------------------------------------------------------


def test_a_folder_with_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="resume"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"lr: 0\.01 -> 0\.5"):
        run(tmp_path, replace(SETTINGS, lr=0.5), resume=True)
    with pytest.raises(ValueError, match="data"):
        run(tmp_path, facts={"data": "other"}, resume=True)
    (tmp_path / STATE).write_bytes(b"half of it")
    with pytest.raises(ValueError, match="checkpoint"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"lr": 0.0}, {"lr": math.nan}, {"micro_batch": 3}, {"schedule": "x"}, {"average": 1.0}, {"patience": 2}, {"clip": 0.0}],
)
def test_settings_name_what_is_wrong(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(SETTINGS, **change)


def test_evaluations_need_a_function(tmp_path):
    with pytest.raises(ValueError, match="evaluate"):
        run(tmp_path, replace(SETTINGS, evaluate_every=2))
