"""Measures how long calls take, by device events on CUDA, and the spread of figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

Call = Callable[[], object]


def wait(device: torch.device) -> None:
    """Wait until the device, and every other GPU in use, has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        for other in range(torch.cuda.device_count()):
            if other != device.index and torch.cuda.memory_reserved(other):
                torch.cuda.synchronize(other)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Round:
    """Consecutive calls: `total` seconds of host time until the device had finished, and the seconds of `each` call, from
    the end of the call before to its own, by device events on CUDA."""

    total: float
    each: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Seconds a call."""
        return self.total / len(self.each)


def timed(call: Call, count: int, device: torch.device) -> Round:
    """`count` calls back to back. On CUDA the host waits for the device once, at the end."""
    if device.type != "cuda":
        wait(device)
        times = [time.perf_counter()]
        for _ in range(count):
            call()
            wait(device)
            times.append(time.perf_counter())
        return Round(times[-1] - times[0], tuple(b - a for a, b in pairwise(times)))
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        wait(device)
        began = time.perf_counter()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        wait(device)
        total = time.perf_counter() - began
    return Round(total, tuple(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)))


def latencies(call: Call, depth: int, count: int, device: torch.device) -> list[float]:
    """Seconds from the start of the call that takes an image to the end of the call that returns it, which is call number
    `depth` from there. The host waits for every call, as a program does that shows every image."""
    starts, ends = [], []
    wait(device)
    for _ in range(count + depth - 1):
        starts.append(time.perf_counter())
        call()
        wait(device)
        ends.append(time.perf_counter())
    return [end - start for start, end in zip(starts, ends[depth - 1 :], strict=False)]


def ticks_within(seconds: float, call: Call, most: int, device: torch.device) -> int:
    """The number of calls that fit in so many seconds: at least 3, and at most `most`."""
    once = timed(call, min(2, most), device).mean
    return min(most, max(3, int(seconds / max(once, 1e-9))))


@dataclass(frozen=True)
class Spread:
    """A figure and its spread: median, least and most over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of these values."""
        return cls(median(values), min(values), max(values))
