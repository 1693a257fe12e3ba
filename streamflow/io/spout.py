"""Spout, textures between programs of one Windows machine, in and out. Knows SpoutGL."""

from __future__ import annotations

import sys
import time
from types import ModuleType
from typing import Any

import numpy as np

from streamflow.io.protocols import Sink, Source, SourceLost, TimedImage, as_source_lost, need, rgba

GL_RGBA = 0x1908


def _library() -> ModuleType:
    if sys.platform != "win32":
        raise ImportError(f"Spout exists on Windows only, and this is {sys.platform}: use ndi or virtualcam")
    return need("SpoutGL", "SpoutGL")


class SpoutSource(Source):
    """The Spout sender of that name, the active one where it is empty. timeout: seconds to wait for an image.

    Raises SourceLost where it sends nothing for so long.
    """

    def __init__(self, name: str = "", timeout: float = 5) -> None:
        self.name, self.timeout = name, timeout
        self._receiver: Any = None

    def open(self) -> None:
        library = _library()
        self.close()
        self._receiver = library.SpoutReceiver()
        if not self._receiver.createOpenGL():
            self.close()
            raise SourceLost("Spout has got no OpenGL context")
        if self.name:
            self._receiver.setReceiverName(self.name)
        self._pixels: np.ndarray | None = None

    def read(self) -> TimedImage:
        if self._receiver is None:
            raise RuntimeError("the Spout source is not open: call open() first")
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            with as_source_lost(f"Spout {self.name!r}"):
                received = self._receiver.receiveImage(self._pixels, GL_RGBA, False, 0)
                if self._receiver.isUpdated():
                    size = self._receiver.getSenderHeight(), self._receiver.getSenderWidth()
                    self._pixels = np.zeros((*size, 4), dtype=np.uint8)
                elif received and self._pixels is not None and self._receiver.isFrameNew():
                    return TimedImage(np.ascontiguousarray(self._pixels[..., :3]), time.monotonic())
            time.sleep(0.002)
        raise SourceLost(f"Spout {self.name!r} has sent nothing for {self.timeout:g} s")

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.releaseReceiver()
            self._receiver.closeOpenGL()
        self._receiver = None


class SpoutSink(Sink):
    """Sends under that name.

    Raises OSError, from open where there is no OpenGL, from write where the image was not taken.
    """

    def __init__(self, name: str = "StreamFlow") -> None:
        self.name = name or "StreamFlow"
        self._sender: Any = None

    def open(self) -> None:
        library = _library()
        self.close()
        self._sender = library.SpoutSender()
        if not self._sender.createOpenGL():
            self.close()
            raise OSError("Spout has got no OpenGL context")
        self._sender.setSenderName(self.name)

    def write(self, image: TimedImage) -> None:
        if self._sender is None:
            raise RuntimeError("the Spout sink is not open: call open() first")
        height, width = image.pixels.shape[:2]
        if not self._sender.sendImage(rgba(image.pixels), width, height, GL_RGBA, False, 0):
            raise OSError(f"Spout did not take an image of {width}x{height}")

    def close(self) -> None:
        if self._sender is not None:
            self._sender.releaseSender()
            self._sender.closeOpenGL()
        self._sender = None
