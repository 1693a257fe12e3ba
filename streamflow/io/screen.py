"""The screen. Knows mss."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from streamflow.io.protocols import InvalidSource, Source, TimedImage, as_source_lost, check_rate, need


class ScreenSource(Source):
    """A monitor, 1 being the first and 0 all of them together, `rate` times a second. region: (left, top, width, height)
    in pixels of that monitor, the whole by default.

    Raises SourceLost where no screen can be read; InvalidSource, from open, where there is no such monitor.
    """

    def __init__(self, monitor: int | str = 1, rate: float = 30, region: tuple[int, int, int, int] | None = None) -> None:
        check_rate(rate)
        self.monitor, self.rate, self.region = int(monitor), rate, region
        self._screen: Any = None

    def open(self) -> None:
        mss = need("mss", "mss")
        self.close()
        with as_source_lost("no screen can be read"):
            self._screen = mss.MSS()
            monitors = self._screen.monitors
        if not 0 <= self.monitor < len(monitors):
            self.close()
            raise InvalidSource(f"no monitor {self.monitor}: there are 0 (all) to {len(monitors) - 1}")
        area = monitors[self.monitor]
        if self.region is not None:
            left, top, width, height = self.region
            area = {"left": area["left"] + left, "top": area["top"] + top, "width": width, "height": height}
        self._area, self._due = area, time.monotonic()

    def read(self) -> TimedImage:
        if self._screen is None:
            raise RuntimeError("the screen is not open: call open() first")
        time.sleep(max(0.0, self._due - time.monotonic()))
        now = time.monotonic()
        self._due = max(self._due + 1 / self.rate, now)
        with as_source_lost(f"screen {self.monitor}"):
            shot = self._screen.grab(self._area)
            pixels = np.frombuffer(shot.raw, dtype=np.uint8).reshape(shot.height, shot.width, 4)
        return TimedImage(np.ascontiguousarray(pixels[..., 2::-1]), now)

    def close(self) -> None:
        if self._screen is not None:
            self._screen.close()
        self._screen = None
