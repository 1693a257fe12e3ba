"""The screen. Knows mss."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from streamflow.io.device import DeviceSource, Handle
from streamflow.io.protocols import InvalidSource, TimedImage, check_rate, need


class ScreenSource(DeviceSource):
    """A monitor, 1 being the first and 0 all of them together, `rate` times a second. region: (left, top, width, height)
    in pixels of that monitor, the whole by default.

    Raises SourceLost where no screen can be read; InvalidSource, from open, where there is no such monitor.
    """

    def __init__(self, monitor: int | str = 1, rate: float = 30, region: tuple[int, int, int, int] | None = None) -> None:
        check_rate(rate)
        self.monitor, self.rate, self.region = int(monitor), rate, region
        self._due = 0.0
        super().__init__(f"screen {self.monitor}")

    def _open(self, closing: ExitStack) -> object:
        screen = need("mss", "mss").MSS()
        closing.callback(screen.close)
        monitors = screen.monitors
        if not 0 <= self.monitor < len(monitors):
            raise InvalidSource(f"no monitor {self.monitor}: there are 0 (all) to {len(monitors) - 1}")
        self._area, self._due = monitors[self.monitor], time.monotonic()
        if self.region is not None:
            left, top, width, height = self.region
            self._area = {
                "left": self._area["left"] + left,
                "top": self._area["top"] + top,
                "width": width,
                "height": height,
            }
        return screen

    def read(self) -> TimedImage:
        time.sleep(max(0.0, self._due - time.monotonic()))
        now = time.monotonic()
        self._due = max(self._due + 1 / self.rate, now)
        return replace(super().read(), time=now)

    def _pixels(self, handle: Handle) -> np.ndarray:
        shot = handle.grab(self._area)
        return np.frombuffer(shot.raw, dtype=np.uint8).reshape(shot.height, shot.width, 4)[..., 2::-1]
