"""Cameras. Knows OpenCV, whose wheels bring what each system needs: V4L2, Media Foundation and DirectShow, AVFoundation."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import numpy as np

from streamflow.io.protocols import Source, SourceLost, TimedImage, as_source_lost, need


class CameraSource(Source):
    """A camera by number (0 is the first) or by path, such as /dev/video2. width, height, rate: what to ask it for; it
    gives the nearest that it has.

    Raises SourceLost from open where there is no such camera, from read when it was unplugged.
    """

    def __init__(
        self, device: int | str = 0, width: int | None = None, height: int | None = None, rate: float | None = None
    ) -> None:
        self.device = int(device) if str(device).isdecimal() else device
        self.width, self.height, self.rate = width, height, rate
        self._capture: Any = None

    def open(self) -> None:
        cv2 = need("cv2", "opencv-python-headless")
        self.close()
        with as_source_lost(f"camera {self.device!r}"):
            self._capture = self._opened(cv2)

    def _opened(self, cv2: ModuleType) -> Any:
        capture = cv2.VideoCapture(self.device)
        if not capture.isOpened():
            capture.release()
            raise SourceLost(f"no camera {self.device!r}: is it plugged in, and does another program hold it?")
        wanted = (
            (cv2.CAP_PROP_FRAME_WIDTH, self.width),
            (cv2.CAP_PROP_FRAME_HEIGHT, self.height),
            (cv2.CAP_PROP_FPS, self.rate),
            (cv2.CAP_PROP_BUFFERSIZE, 1),  # the newest image, not a queue of old ones
        )
        for name, value in wanted:
            if value is not None:
                capture.set(name, value)
        return capture

    def read(self) -> TimedImage:
        if self._capture is None:
            raise RuntimeError(f"camera {self.device!r} is not open: call open() first")
        with as_source_lost(f"camera {self.device!r}"):
            found, pixels = self._capture.read()
        if not found:
            raise SourceLost(f"camera {self.device!r} gives no more images: was it unplugged?")
        return TimedImage(np.ascontiguousarray(pixels[..., ::-1]), time.monotonic())

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
        self._capture = None
