"""The parts that several processes have in one run: shards by hand, or those of `accelerate launch`, each on its own device."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from accelerate import PartialState

from diffalign.evaluation.store import WHOLE, Shard


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with the sentence to leave the user with."""


@dataclass(frozen=True)
class Share:
    """One process's part of a run, and its part in what is common to all."""

    shard: Shard
    reports: bool = True
    """Whether this process sums up."""
    opens: bool = True
    """Whether it starts and deletes folders; of the processes of one launcher the main one alone."""
    wait: Callable[[], None] = lambda: None
    """Returns when all processes of the launcher have called it."""
    device: str | None = None
    """Where it runs; None: wherever a process alone would."""

    def main_first(self, act: Callable[[bool], None]) -> None:
        """Calls act(True) in the process that opens folders while the others wait, then act(False) in those.

        Where the first one fails the others go on and find the reason themselves, rather than wait for ever.
        """
        self.wait()  # all have looked at what there is before anything is deleted
        try:
            if self.opens:
                act(True)
        finally:
            self.wait()
        if not self.opens:
            act(False)


def share_of(shard: Shard | None, device: str | None) -> Share:
    """The given shard, or under `accelerate launch` (torchrun, ...) the process's own part; else everything."""
    if shard:
        return Share(shard, reports=shard.count == 1, device=device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Share(WHOLE, device=device)
    state = PartialState(cpu=device == "cpu")
    own = Shard(state.process_index, state.num_processes)
    return Share(own, state.is_main_process, state.is_main_process, state.wait_for_everyone, device or str(state.device))
