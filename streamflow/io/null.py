"""A sink that keeps nothing: for measuring, and where only a recording is wanted."""

from __future__ import annotations

from streamflow.io.protocols import Sink, TimedImage


class NullSink(Sink):
    """Counts the images it is given in `count`."""

    def __init__(self) -> None:
        self.count = 0

    def open(self) -> None:
        self.count = 0

    def write(self, image: TimedImage) -> None:
        self.count += 1

    def close(self) -> None:
        pass
