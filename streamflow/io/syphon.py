"""Syphon, textures between programs of one Mac, in and out. Knows syphon-python, and Metal through it."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from types import ModuleType

import numpy as np

from streamflow.io.device import Device, DeviceSource, Handle
from streamflow.io.protocols import Sink, SourceLost, TimedImage, need, rgba

BGRA8 = 80  # MTLPixelFormatBGRA8Unorm


def _library(part: str = "") -> ModuleType:
    if sys.platform != "darwin":
        raise ImportError(f"Syphon exists on macOS only, and this is {sys.platform}: use ndi or virtualcam")
    return need(f"syphon{part}", "syphon-python")


class SyphonSource(DeviceSource):
    """The Syphon server of that name, the first where it is empty. timeout: seconds to wait for it and for an image.

    Raises SourceLost where there is none, or it has ended or sends nothing for so long.
    """

    def __init__(self, name: str = "", timeout: float = 5) -> None:
        super().__init__(f"Syphon {name!r}", timeout)
        self.name = name

    def _open(self, closing: ExitStack) -> object:
        library = _library()
        directory = library.SyphonServerDirectory()
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            found = [server for server in directory.servers if not self.name or server.name == self.name]
            if found:
                client = library.SyphonMetalClient(found[0])
                closing.callback(client.stop)
                return client
            time.sleep(0.1)
        raise SourceLost(f"no Syphon server {self.name!r} within {self.timeout:g} s")

    def _pixels(self, handle: Handle) -> np.ndarray | None:
        if not handle.is_valid:
            raise SourceLost(f"{self.what} has ended")
        if not handle.has_new_frame:
            return None
        texture = handle.new_frame_image
        pixels = _library(".utils.numpy").copy_mtl_texture_to_image(texture)
        return pixels[..., [2, 1, 0] if texture.pixelFormat() == BGRA8 else [0, 1, 2]]


class SyphonSink(Device, Sink):
    """Serves under that name."""

    def __init__(self, name: str = "StreamFlow") -> None:
        super().__init__("the Syphon sink")
        self.name = name or "StreamFlow"

    def _open(self, closing: ExitStack) -> object:
        server = _library().SyphonMetalServer(self.name)
        closing.callback(server.stop)
        self._texture = None
        return server

    def write(self, image: TimedImage) -> None:
        server = self.handle
        height, width = image.pixels.shape[:2]
        if self._texture is None or (self._texture.width(), self._texture.height()) != (width, height):
            self._texture = _library(".utils.raw").create_mtl_texture(server.device, width, height)
        _library(".utils.numpy").copy_image_to_mtl_texture(rgba(image.pixels), self._texture)
        server.publish_frame_texture(self._texture, is_flipped=True)
