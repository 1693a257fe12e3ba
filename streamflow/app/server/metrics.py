"""Counters, gauges and histograms in Prometheus' text format. Knows numbers and their names only."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
COUNTERS = {
    "frames": "pictures sent to viewers",
    "drops": "pictures that a newer one replaced, in or out",
    "refused": "connections and messages turned away",
    "errors": "draws that failed",
}
HISTOGRAMS = {
    "tick_seconds": "one turn of a viewer in the model's thread",
    "end_to_end_seconds": "from a picture's arrival (of text: a frame's start) to its sending",
}


class Metrics:
    """All numbers of a server; any thread may write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, int]] = {name: defaultdict(int) for name in COUNTERS}
        self._buckets = {name: [0] * (len(SECONDS) + 1) for name in HISTOGRAMS}
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)
        self._gauges: dict[str, tuple[str, Callable[[], float]]] = {}

    def count(self, name: str, kind: str = "") -> None:
        """One more."""
        with self._lock:
            self._counts[name][kind] += 1

    def observe(self, name: str, seconds: float) -> None:
        """A duration."""
        with self._lock:
            self._buckets[name][bisect_left(SECONDS, seconds)] += 1
            self._sums[name] += seconds

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        self._gauges[name] = text, read

    def text(self) -> str:
        """Everything, in the text format of version 0.0.4."""
        with self._lock:
            lines = [line for name in COUNTERS for line in self._counter(name)]
            lines += [line for name in HISTOGRAMS for line in self._histogram(name)]
        for name, (text, read) in self._gauges.items():
            lines += [*_head(f"streamflow_{name}", text, "gauge"), f"streamflow_{name} {read():g}"]
        return "\n".join(lines) + "\n"

    def _counter(self, name: str) -> list[str]:
        full, counts = f"streamflow_{name}_total", self._counts[name] or {"": 0}
        values = [f'{full}{{kind="{kind}"}} {n}' if kind else f"{full} {n}" for kind, n in sorted(counts.items())]
        return [*_head(full, COUNTERS[name], "counter"), *values]

    def _histogram(self, name: str) -> list[str]:
        full, lines, total = f"streamflow_{name}", [], 0
        for bound, n in zip((*map(str, SECONDS), "+Inf"), self._buckets[name], strict=True):
            total += n
            lines.append(f'{full}_bucket{{le="{bound}"}} {total}')
        return [
            *_head(full, HISTOGRAMS[name], "histogram"),
            *lines,
            f"{full}_sum {self._sums[name]:g}",
            f"{full}_count {total}",
        ]


def _head(full: str, text: str, kind: str) -> list[str]:
    return [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
