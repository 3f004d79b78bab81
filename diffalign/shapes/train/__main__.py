"""Train what the shapes world ships: `python -m diffalign.shapes.train STAGE`. A stopped stage resumes; a finished one is not repeated."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from diffalign.shapes.train import loop, rewards_judged
from diffalign.shapes.train.plan import QUICK, Plan
from diffalign.shapes.train.stages import STAGES, Job

WEIGHTS = Path(__file__).parent.parent / "weights"
RUN = Path("runs/shapes")
ALL = "all"
TABLES = ("table-rewards", "table-times")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffalign.shapes.train", description=__doc__)
    names = f"in this order: {', '.join(STAGES)}; `{ALL}` is every one of them; {' and '.join(TABLES)} print what the docs show"
    parser.add_argument("stages", nargs="+", choices=[*STAGES, ALL, *TABLES], metavar="STAGE", help=names)
    parser.add_argument("--run", type=Path, help=f"where training state is kept (default: {RUN})")
    parser.add_argument("--weights", type=Path, help="where finished models go (default: inside the package)")
    parser.add_argument("--steps", type=int, help="train for this many steps instead of each stage's own number")
    parser.add_argument(
        "--quick", action="store_true", help="a rehearsal: about a minute a stage, for folders named by --run and --weights"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.quick and not (args.run and args.weights):
        parser.error("--quick needs --run and --weights: its folders are no place for a training in earnest, which would resume from them")
    logging.basicConfig(level=logging.INFO)
    torch.set_flush_denormal(True)
    job = Job(args.run or RUN, args.weights or WEIGHTS, args.device, _plan(args.quick, args.steps), _flags(args.quick, args.steps))
    for stage in (name for given in args.stages for name in (STAGES if given == ALL else (given,))):
        if stage == "table-rewards":
            print(rewards_judged.auc_table(job.weights))
        elif stage == "table-times":
            print(times_table(job.run))
        else:
            logging.getLogger(__name__).info("stage %s", stage)
            STAGES[stage](job)


def _plan(quick: bool, steps: int | None) -> Plan:
    plan = QUICK if quick else Plan()
    return plan.with_steps(steps) if steps else plan


def _flags(quick: bool, steps: int | None) -> str:
    return (" --quick" if quick else "") + (f" --steps {steps}" if steps else "")


def times_table(run: Path) -> str:
    """Steps and minutes of every training state under a run's folder, as a Markdown table."""
    lines = ["| training | steps | minutes |", "|---|---|---|"]
    for path in sorted(run.glob("*.safetensors")):
        if path.stem != "pairs":  # the teacher's results, which are data
            steps, seconds = loop.progress(path)
            lines.append(f"| `{path.stem}` | {steps:,} | {seconds / 60:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
