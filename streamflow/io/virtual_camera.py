"""A camera that other programs see. Knows pyvirtualcam: OBS on Windows and macOS, v4l2loopback on Linux."""

from __future__ import annotations

from contextlib import ExitStack

from streamflow.io.device import Device
from streamflow.io.protocols import Sink, TimedImage, check_rate, need


class VirtualCameraSink(Device, Sink):
    """device: its name, the first that is free by default. The first image's size is the camera's.

    Raises, from write: OSError where no virtual camera is installed; ValueError for an image of another size.
    """

    def __init__(self, device: str | None = None, rate: float = 30) -> None:
        check_rate(rate)
        super().__init__("the virtual camera")
        self.device, self.rate = device or None, rate

    def _open(self, closing: ExitStack) -> object:
        self._camera = None
        return need("pyvirtualcam", "pyvirtualcam")

    def write(self, image: TimedImage) -> None:
        library = self.handle
        height, width = image.pixels.shape[:2]
        if self._camera is None:
            try:
                self._camera = library.Camera(width=width, height=height, fps=self.rate, device=self.device)
            except RuntimeError as error:
                raise OSError(f"no virtual camera: {error}. Install OBS, or on Linux load v4l2loopback") from error
            self._closing.callback(self._camera.close)
        if (width, height) != (self._camera.width, self._camera.height):
            found = f"{width}x{height} for a virtual camera of {self._camera.width}x{self._camera.height}"
            raise ValueError(f"an image of {found}: close and open it to change its size")
        self._camera.send(image.pixels)
