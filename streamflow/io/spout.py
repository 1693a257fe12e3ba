"""Spout, textures between programs of one Windows machine, in and out. Knows SpoutGL."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import ModuleType

import numpy as np

from streamflow.io.device import Device, DeviceSource, Handle
from streamflow.io.protocols import Sink, SourceLost, TimedImage, need, rgba

GL_RGBA = 0x1908


def _library() -> ModuleType:
    if sys.platform != "win32":
        raise ImportError(f"Spout exists on Windows only, and this is {sys.platform}: use ndi or virtualcam")
    return need("SpoutGL", "SpoutGL")


class SpoutSource(DeviceSource):
    """The Spout sender of that name, the active one where it is empty. timeout: seconds to wait for an image.

    Raises SourceLost where it sends nothing for so long.
    """

    def __init__(self, name: str = "", timeout: float = 5) -> None:
        super().__init__(f"Spout {name!r}", timeout)
        self.name = name

    def _open(self, closing: ExitStack) -> object:
        receiver = _library().SpoutReceiver()
        closing.callback(receiver.closeOpenGL)
        closing.callback(receiver.releaseReceiver)
        if not receiver.createOpenGL():
            raise SourceLost("Spout has got no OpenGL context")
        if self.name:
            receiver.setReceiverName(self.name)
        self._buffer: np.ndarray | None = None
        return receiver

    def _pixels(self, handle: Handle) -> np.ndarray | None:
        received = handle.receiveImage(self._buffer, GL_RGBA, False, 0)
        if handle.isUpdated():
            self._buffer = np.zeros((handle.getSenderHeight(), handle.getSenderWidth(), 4), dtype=np.uint8)
        elif received and self._buffer is not None and handle.isFrameNew():
            return self._buffer[..., :3]
        return None


class SpoutSink(Device, Sink):
    """Sends under that name.

    Raises OSError, from open where there is no OpenGL, from write where the image was not taken.
    """

    def __init__(self, name: str = "StreamFlow") -> None:
        super().__init__("the Spout sink")
        self.name = name or "StreamFlow"

    def _open(self, closing: ExitStack) -> object:
        sender = _library().SpoutSender()
        closing.callback(sender.closeOpenGL)
        closing.callback(sender.releaseSender)
        if not sender.createOpenGL():
            raise OSError("Spout has got no OpenGL context")
        sender.setSenderName(self.name)
        return sender

    def write(self, image: TimedImage) -> None:
        height, width = image.pixels.shape[:2]
        if not self.handle.sendImage(rgba(image.pixels), width, height, GL_RGBA, False, 0):
            raise OSError(f"Spout did not take an image of {width}x{height}")
