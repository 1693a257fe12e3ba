"""Syphon, textures between programs of one Mac, in and out. Knows syphon-python, and Metal through it."""

from __future__ import annotations

import sys
import time
from types import ModuleType
from typing import Any

import numpy as np

from streamflow.io.protocols import Sink, Source, SourceLost, TimedImage, as_source_lost, need, rgba

PACKAGE = "syphon-python"
BGRA8 = 80  # MTLPixelFormatBGRA8Unorm


def _library() -> ModuleType:
    if sys.platform != "darwin":
        raise ImportError(f"Syphon exists on macOS only, and this is {sys.platform}: use ndi or virtualcam")
    return need("syphon", PACKAGE)


class SyphonSource(Source):
    """The Syphon server of that name, the first where it is empty. timeout: seconds to wait for it and for an image.

    Raises SourceLost where there is none or it sends nothing for so long.
    """

    def __init__(self, name: str = "", timeout: float = 5) -> None:
        self.name, self.timeout = name, timeout
        self._client: Any = None

    def open(self) -> None:
        library = _library()
        self.close()
        end = time.monotonic() + self.timeout
        with as_source_lost(f"Syphon {self.name!r}"):
            directory = library.SyphonServerDirectory()
            while time.monotonic() < end:
                found = [server for server in directory.servers if not self.name or server.name == self.name]
                if found:
                    self._client = library.SyphonMetalClient(found[0])
                    return
                time.sleep(0.1)
        raise SourceLost(f"no Syphon server {self.name!r} within {self.timeout:g} s")

    def read(self) -> TimedImage:
        if self._client is None:
            raise RuntimeError("the Syphon source is not open: call open() first")
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            with as_source_lost(f"Syphon {self.name!r}"):
                if not self._client.is_valid:
                    break
                if self._client.has_new_frame:
                    return self._image(self._client.new_frame_image)
            time.sleep(0.002)
        raise SourceLost(f"Syphon {self.name!r} has ended, or sent nothing for {self.timeout:g} s")

    def close(self) -> None:
        if self._client is not None:
            self._client.stop()
        self._client = None

    @staticmethod
    def _image(texture: Any) -> TimedImage:
        pixels = need("syphon.utils.numpy", PACKAGE).copy_mtl_texture_to_image(texture)
        order = [2, 1, 0] if texture.pixelFormat() == BGRA8 else [0, 1, 2]
        return TimedImage(np.ascontiguousarray(pixels[..., order]), time.monotonic())


class SyphonSink(Sink):
    """Serves under that name."""

    def __init__(self, name: str = "StreamFlow") -> None:
        self.name = name or "StreamFlow"
        self._server: Any = None
        self._texture: Any = None

    def open(self) -> None:
        library = _library()
        self.close()
        self._server = library.SyphonMetalServer(self.name)

    def write(self, image: TimedImage) -> None:
        if self._server is None:
            raise RuntimeError("the Syphon sink is not open: call open() first")
        height, width = image.pixels.shape[:2]
        if self._texture is None or (self._texture.width(), self._texture.height()) != (width, height):
            self._texture = need("syphon.utils.raw", PACKAGE).create_mtl_texture(self._server.device, width, height)
        need("syphon.utils.numpy", PACKAGE).copy_image_to_mtl_texture(rgba(image.pixels), self._texture)
        self._server.publish_frame_texture(self._texture, is_flipped=True)

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._server = self._texture = None
