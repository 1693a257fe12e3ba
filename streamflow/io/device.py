"""What the sources and sinks of a library share: an object of it that is open, and how that is closed."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from streamflow.io.protocols import Source, SourceLost, TimedImage, as_source_lost

Handle = Any  # an object of a library that has no types
NAP = 0.002  # seconds between two looks for an image


class Device:
    """A source or sink around one object of a library.

    what: the device in messages, such as "camera 0". A subclass has `_open`.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._handle: Handle | None = None
        self._closing = ExitStack()

    def _open(self, closing: ExitStack) -> object:
        """Open the library's object and return it. What ends it goes into `closing`, also where this raises."""
        raise NotImplementedError

    def open(self) -> None:
        """Open it, or open it again."""
        self.close()
        with ExitStack() as closing:
            self._handle = self._open(closing)
            self._closing = closing.pop_all()

    @property
    def handle(self) -> Handle:
        """The library's object. RuntimeError: it is not open."""
        if self._handle is None:
            raise RuntimeError(f"{self.what} is not open: call open() first")
        return self._handle

    def close(self) -> None:
        """Close it. May be called twice."""
        self._handle = None
        self._closing.close()


class DeviceSource(Device, Source):
    """A source around one object of a library, whose errors become SourceLost.

    timeout: seconds to wait for an image. A subclass has `_open` and `_pixels`.
    """

    def __init__(self, what: str, timeout: float = 0) -> None:
        super().__init__(what)
        self.timeout = timeout

    def open(self) -> None:
        with as_source_lost(self.what):
            super().open()

    def _pixels(self, handle: Handle) -> np.ndarray | None:
        """RGB, uint8 `[H, W, 3]`, of a new image; None where there is none yet."""
        raise NotImplementedError

    def read(self) -> TimedImage:
        handle = self.handle
        end = time.monotonic() + self.timeout
        while True:
            with as_source_lost(self.what):
                if (pixels := self._pixels(handle)) is not None:
                    return TimedImage(np.ascontiguousarray(pixels), time.monotonic())
            if time.monotonic() >= end:
                raise SourceLost(f"{self.what} has sent nothing for {self.timeout:g} s")
            time.sleep(NAP)
