"""A search that runs while a page watches: a thread of its own, its events, and what they add up to."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from diffalign.types import Evaluation, Progress

State = Literal["running", "stopped", "finished"]


class Stopped(Exception):
    """Raised inside a search when the user presses Stop or leaves."""


@dataclass
class Search:
    """One search in a thread of its own."""

    run: Callable[[Progress], Any]
    """Does the search, telling the given function of every evaluation."""
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    """Every Evaluation, and in the end an Exception, or None where all went well."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set: the search ends at its next evaluation."""
    output: Any = None
    """What `run` returned, once it has."""

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        return thread

    def _work(self) -> None:
        try:
            self.output = self.run(self._progress)
            self.events.put(None)
        except Exception as error:  # handed to the page's thread, which raises it
            self.events.put(error)

    def _progress(self, event: Evaluation) -> None:
        if self.stop.is_set():
            raise Stopped
        self.events.put(event)


@dataclass
class Seen:
    """What the events of one sample's search add up to."""

    scores: list[dict[str, float]] = field(default_factory=list)
    """Every reward's score, one dictionary for each evaluation."""
    first: Tensor | None = None
    """The image that the search started from, "3 h w"."""
    best: Tensor | None = None
    """The image that the search would return now: of the greatest finite total, the earliest of equals; else the first."""
    best_total: float = -math.inf
    state: State = "running"
    seconds: float = 0.0

    def add(self, event: Evaluation) -> None:
        scores = {name: values[0] for name, values in event.scores.items()}
        if self.first is None:
            self.first = self.best = event.images[0]
        if math.isfinite(scores["total"]) and scores["total"] > self.best_total:
            self.best, self.best_total = event.images[0], scores["total"]
        self.scores.append(scores)


def follow(search: Search, refresh: float) -> Iterator[Seen]:
    """What was seen of a search of one sample, at most every `refresh` seconds while it runs, and at its end.

    Starts it, and ends it also where nobody asks for more. Raises what the search raised.
    """
    began, shown, seen = time.perf_counter(), 0.0, Seen()
    thread = search.start()
    try:
        while (event := search.events.get()) is not None:
            if isinstance(event, Stopped):
                break
            if isinstance(event, Exception):
                raise event
            seen.add(event)
            seen.seconds = time.perf_counter() - began
            if time.perf_counter() - shown > refresh:
                shown = time.perf_counter()
                yield seen
        seen.state = "stopped" if search.output is None else "finished"
        yield seen
    finally:
        search.stop.set()  # also when the browser has gone: nobody would see the rest
        thread.join()
