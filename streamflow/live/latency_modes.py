"""Modes to draw from a live source, and the choice of one: the ring fed by the source, the ring ticking freely on the
newest frame, or the sequential loop. An image passes through S ticks of a ring, so the mode of the highest rate is seldom
that of the lowest latency. Knows ticks and clocks; no stream, no image, no device.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger(__name__)
TOLERANCE = 0.02  # a mode holds a rate if it falls short of it by no more than this share
MEASURED_FOR = 2.0  # seconds, of all modes together
LONGEST = 4  # times as long a slow mode may take to be measured


class Clock(Protocol):
    """Seconds from any origin."""

    def now(self) -> float:
        """The time in seconds."""
        ...

    def sleep_until(self, t: float) -> None:
        """Return when `now()` is t or later."""


class RealClock(Clock):
    """The machine's own, `time.perf_counter()`."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, t: float) -> None:
        while (left := t - time.perf_counter()) > 0:
            time.sleep(left)


@dataclass(frozen=True, eq=False)
class Mode:
    """One mode to draw from a source.

    tick: takes the number of the input frame that goes in, and returns when the image that comes out is finished, some
        time later by the clock. Several modes may share a ring's tick.
    depth: how many ticks an image passes through.
    waits: a tick starts only when there is an input frame that has not been taken yet; otherwise it starts at once, with
        the newest frame, again if need be.
    """

    name: str
    tick: Callable[[int], object]
    depth: int = 1
    waits: bool = True


def fed(tick: Callable[[int], object], stages: int) -> Mode:
    """The ring fed by the source: one tick an input frame."""
    return Mode("fed", tick, stages)


def free(tick: Callable[[int], object], stages: int) -> Mode:
    """The ring ticking freely on the newest input frame."""
    return Mode("free", tick, stages, waits=False)


def sequential(tick: Callable[[int], object]) -> Mode:
    """The sequential loop: all steps of one frame in one tick."""
    return Mode("sequential", tick)


@dataclass(frozen=True)
class Measured:
    """The measured rate and latency of a mode. rate: input frames drawn a second. p50, p95: seconds from an input frame's
    arrival to its finished image. images: how many were timed."""

    name: str
    rate: float
    p50: float
    p95: float
    images: int = 0

    def holds(self, target_rate: float) -> bool:
        """Whether the rate is the target's, within `TOLERANCE`."""
        return self.rate >= (1 - TOLERANCE) * target_rate

    def __str__(self) -> str:
        return f"{self.name}: {self.rate:.1f} images/s, latency {1e3 * self.p50:.1f} ms (p95 {1e3 * self.p95:.1f})"


def play(mode: Mode, clock: Clock, period: float, seconds: float) -> Measured:
    """Draw from a source that gives a frame every `period` seconds, for so many seconds of the clock, and on until two
    images are out, or for `LONGEST` times as long; then the rate is that of the ticks. Frames that a mode has no time for
    are left out. The image of a frame that went in several times counts once, when it first comes out."""
    mode.tick(0)  # an empty ring fills
    start, newest, shown = clock.now(), -1, -1
    under_way: deque[int] = deque(maxlen=mode.depth)
    waits: list[float] = []
    ends: list[float] = []
    ticks, longest = 0, LONGEST * max(seconds, mode.depth * period)
    while clock.now() - start < seconds or (len(ends) < 2 and clock.now() - start < longest):
        wanted = newest + 1 if mode.waits else max(newest, 0)
        clock.sleep_until(start + wanted * period)
        newest = max(wanted, int((clock.now() - start) / period))
        under_way.append(newest)
        mode.tick(newest)
        ticks += 1
        if len(under_way) == mode.depth and under_way[0] != shown:
            shown = under_way[0]
            ends.append(clock.now())
            waits.append(ends[-1] - (start + shown * period))
    if len(ends) < 2:
        each = (clock.now() - start) / ticks
        return Measured(mode.name, min(1 / each, 1 / period), mode.depth * each, mode.depth * each, len(ends))
    rate = (len(ends) - 1) / (ends[-1] - ends[0])
    return Measured(mode.name, rate, percentile(waits, 0.5), percentile(waits, 0.95), len(ends))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all does not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def choose_mode(measured: Iterable[Measured], target_rate: float) -> Measured:
    """The mode of the lowest latency among those that hold the target rate (images a second, within `TOLERANCE`); the
    fastest where none does. Logs rate and latency of the chosen one and of the runner-up."""

    def order(m: Measured) -> tuple:
        return (0, m.p50, -m.rate) if m.holds(target_rate) else (1, -m.rate, m.p50)

    found = sorted(measured, key=order)
    if not found:
        raise ValueError("no mode was measured: give at least one")
    how = "holds" if found[0].holds(target_rate) else "is the fastest, and none holds"
    logger.info("mode %s; it %s %.1f a second", found[0], how, target_rate)
    if len(found) > 1:
        logger.info("runner-up %s", found[1])
    return found[0]


class ModeChooser:
    """Chooses a mode for a live source, and chooses again when the stream's size or number of stages changes.

    target_rate: images a second to hold; source_rate: input frames a second (None: the target rate). `seconds`: of
    measuring by the clock, shared by all modes; slow ones take what two images take.
    """

    def __init__(
        self,
        target_rate: float,
        source_rate: float | None = None,
        seconds: float = MEASURED_FOR,
        clock: Clock | None = None,
    ):
        source_rate = target_rate if source_rate is None else source_rate
        for name, value in (("target_rate", target_rate), ("source_rate", source_rate), ("seconds", seconds)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        self.target_rate, self.source_rate, self.seconds = target_rate, source_rate, seconds
        self.clock = RealClock() if clock is None else clock
        self.measured: tuple[Measured, ...] = ()
        self._chosen: tuple[tuple[int, int, int], Mode] | None = None

    def choose(self, width: int, height: int, stages: int, modes: Callable[[], Sequence[Mode]]) -> Mode:
        """The mode to draw in. `modes` gives those there are for a stream of this size and so many stages; it is called,
        and they are measured, only where there was another size or number of stages before."""
        shape = width, height, stages
        if self._chosen is None or self._chosen[0] != shape:
            there = {mode.name: mode for mode in modes()}
            share = self.seconds / max(1, len(there))
            self.measured = tuple(play(mode, self.clock, 1 / self.source_rate, share) for mode in there.values())
            self._chosen = shape, there[choose_mode(self.measured, self.target_rate).name]
        return self._chosen[1]
