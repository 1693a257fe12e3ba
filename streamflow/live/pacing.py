"""Pictures at even intervals: finished ones wait in an outbox, and a clock shows one at every multiple of a period.

Knows clocks and counts; no stream, no sink, nothing of what is in a picture.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from streamflow.live.latency_modes import Clock

POLICIES = ("newest", "every")
KEPT = 100_000  # intervals that are kept for statistics

T = TypeVar("T")


class Outbox(Generic[T]):
    """Finished pictures on their way to the clock, for one thread that puts and one that takes.

    "newest": one picture; a newer one replaces it and is counted in `dropped`. "every": up to `depth` of them in order, and
    `put` waits for room.
    """

    def __init__(self, policy: str, depth: int = 2) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: choose one of {', '.join(POLICIES)}")
        self.policy, self.depth, self.dropped = policy, 1 if policy == "newest" else depth, 0
        self._queue: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, picture: T) -> None:
        """Queue one; after `close` it goes nowhere."""
        with self._changed:
            if self.policy == "every":
                self._changed.wait_for(lambda: self._closed or len(self._queue) < self.depth)
            elif self._queue:
                self._queue.popleft()
                self.dropped += 1
            if not self._closed:
                self._queue.append(picture)

    def take(self) -> T | None:
        """The next one; None where there is none now."""
        with self._changed:
            if not self._queue:
                return None
            self._changed.notify_all()
            return self._queue.popleft()

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._queue

    def close(self) -> None:
        """Whoever waits in `put` goes on. What is queued can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Pacer(Generic[T]):
    """Shows a picture at start + k periods, k = 0, 1, 2, ..., so that nothing drifts; the first one starts the clock.

    period: seconds. Where nothing new is there in time, the last one is shown again (`repeated`); the picture that was
    waited for is then `late`. Multiples that went by while `show` or the machine took its time are left out and counted in
    `skipped`: they are not made up for. `intervals`: seconds from one showing to the next, the last 100,000.
    """

    def __init__(self, period: float, clock: Clock) -> None:
        if not 0 < period < math.inf:
            raise ValueError(f"a period is a positive number of seconds, not {period!r}")
        self.period, self.clock = period, clock
        self.shown = self.repeated = self.late = self.skipped = 0
        self.intervals: deque[float] = deque(maxlen=KEPT)

    def run(self, take: Callable[[], T | None], show: Callable[[T], object], going: Callable[[], bool]) -> None:
        """Until `going` says no. take: the next picture or None. show: must return quickly."""
        last = None
        while going() and (last := take()) is None:
            self.clock.sleep_until(self.clock.now() + min(self.period / 4, 0.02))
        if last is None:
            return
        start = before = self.clock.now()
        show(last)
        self.shown, slot, missed = self.shown + 1, 0, False
        while going():
            slot = self._next(start, slot)
            self.clock.sleep_until(start + slot * self.period)
            new = take()
            self.repeated += new is None
            self.late += missed and new is not None
            missed = new is None
            last = last if new is None else new
            now = self.clock.now()
            show(last)
            self.shown += 1
            self.intervals.append(now - before)
            before = now

    def _next(self, start: float, slot: int) -> int:
        """The next multiple that is not over yet."""
        reached = math.floor((self.clock.now() - start) / self.period + 1e-9)
        self.skipped += max(0, reached - slot - 1)
        return max(slot + 1, reached)
