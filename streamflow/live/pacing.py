"""Images at even intervals: a clock shows one at every multiple of a period.

Knows clocks and counts; no stream, no sink, nothing of what is in an image.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from streamflow.live.latency_modes import Clock

KEPT = 100_000  # intervals that are kept for statistics

T = TypeVar("T")


class Pacer(Generic[T]):
    """Shows an image at start + k periods, k = 0, 1, 2, ..., so that nothing drifts; the first one starts the clock.

    period: seconds. A new one may be assigned from any thread; it acts from the next image on. Where nothing new is there in
    time, the last image is shown again (`repeated`), and the one that was waited for is then `late`. Multiples that went by
    while `show` or the machine took its time are left out and counted in `skipped`: they are not made up for. `intervals`:
    seconds from one showing to the next, the last 100,000.
    """

    def __init__(self, period: float, clock: Clock) -> None:
        if not 0 < period < math.inf:
            raise ValueError(f"a period is a positive number of seconds, not {period!r}")
        self.period, self.clock = period, clock
        self.shown = self.repeated = self.late = self.skipped = 0
        self.intervals: deque[float] = deque(maxlen=KEPT)

    def run(self, take: Callable[[], T | None], show: Callable[[T], object], going: Callable[[], bool]) -> None:
        """Run while `going()` is true. take: returns the next image or None. show: must return quickly."""
        last = None
        while going() and (last := take()) is None:
            self.clock.sleep_until(self.clock.now() + min(self.period / 4, 0.02))
        if last is None:
            return
        start = before = self.clock.now()
        show(last)
        self.shown, slot, missed, period = self.shown + 1, 0, False, self.period
        while going():
            if period != self.period:
                start, slot, period = start + slot * period, 0, self.period
            slot = self._next(start, slot, period)
            self.clock.sleep_until(start + slot * period)
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

    def _next(self, start: float, slot: int, period: float) -> int:
        """The next multiple that is not over yet."""
        reached = math.floor((self.clock.now() - start) / period + 1e-9)
        self.skipped += max(0, reached - slot - 1)
        return max(slot + 1, reached)
