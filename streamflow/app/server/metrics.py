"""The server's numbers for Prometheus: counters, gauges and histograms, in a registry of the server's own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
COUNTERS = {
    "frames": ("images sent to viewers", ()),
    "drops": ("images that a newer one replaced, by direction", ("kind",)),
    "refused": ("connections and messages turned away, by reason", ("kind",)),
    "errors": ("draws that failed", ()),
}
HISTOGRAMS = {
    "tick_seconds": "one turn of a viewer in the model's thread",
    "end_to_end_seconds": "from an image's arrival (without an input image: a frame's start) to its sending",
}


class Metrics:
    """All numbers of a server; any thread may write."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters = {
            name: Counter(f"streamflow_{name}", text, labels, registry=self._registry)
            for name, (text, labels) in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(f"streamflow_{name}", text, buckets=SECONDS, registry=self._registry)
            for name, text in HISTOGRAMS.items()
        }

    def count(self, name: str, *kind: str) -> None:
        """Add one to a counter. kind: the label's value, of a counter that has one."""
        counter = self._counters[name]
        (counter.labels(*kind) if kind else counter).inc()

    def observe(self, name: str, seconds: float) -> None:
        """Add a duration to a histogram."""
        self._histograms[name].observe(seconds)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a number that `read` returns whenever the metrics are requested."""
        Gauge(f"streamflow_{name}", text, registry=self._registry).set_function(read)

    def text(self) -> str:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry).decode()
