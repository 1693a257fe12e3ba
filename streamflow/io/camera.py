"""Cameras. Knows OpenCV, whose wheels bring what each system needs: V4L2, Media Foundation and DirectShow, AVFoundation."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from streamflow.io.device import DeviceSource, Handle
from streamflow.io.protocols import SourceLost, need


class CameraSource(DeviceSource):
    """A camera by number (0 is the first) or by path, such as /dev/video2. width, height, rate: what to ask it for; it
    gives the nearest that it has.

    Raises SourceLost from open where there is no such camera, from read when it was unplugged.
    """

    def __init__(
        self, device: int | str = 0, width: int | None = None, height: int | None = None, rate: float | None = None
    ) -> None:
        self.device = int(device) if str(device).isdecimal() else device
        self.width, self.height, self.rate = width, height, rate
        super().__init__(f"camera {self.device!r}")

    def _open(self, closing: ExitStack) -> object:
        cv2 = need("cv2", "opencv-python-headless")
        capture = cv2.VideoCapture(self.device)
        closing.callback(capture.release)
        if not capture.isOpened():
            raise SourceLost(f"no {self.what}: is it plugged in, and does another program hold it?")
        wanted = {
            cv2.CAP_PROP_FRAME_WIDTH: self.width,
            cv2.CAP_PROP_FRAME_HEIGHT: self.height,
            cv2.CAP_PROP_FPS: self.rate,
            cv2.CAP_PROP_BUFFERSIZE: 1,  # the newest image, not a queue of old ones
        }
        for name, value in wanted.items():
            if value is not None:
                capture.set(name, value)
        return capture

    def _pixels(self, handle: Handle) -> np.ndarray:
        found, pixels = handle.read()
        if not found:
            raise SourceLost(f"{self.what} gives no more images: was it unplugged?")
        return pixels[..., ::-1]
