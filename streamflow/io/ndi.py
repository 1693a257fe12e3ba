"""NDI, images over the local network, in and out. Knows cyndilib, whose wheels bring the NDI library."""

from __future__ import annotations

import time
from contextlib import ExitStack
from fractions import Fraction
from types import ModuleType

import numpy as np

from streamflow.io.device import NAP, Device, DeviceSource, Handle
from streamflow.io.protocols import Sink, SourceLost, TimedImage, check_rate, need, rgba


def _library(part: str) -> ModuleType:
    return need(f"cyndilib.{part}", "cyndilib")


class NdiSource(DeviceSource):
    """The NDI source of that name, "MACHINE (NAME)" or NAME alone; the first that is found where it is empty.
    timeout: seconds to look for it, and to wait for an image.

    Raises SourceLost where it is not found or sends nothing for so long.
    """

    def __init__(self, name: str = "", timeout: float = 5) -> None:
        super().__init__(f"NDI {name!r}", timeout)
        self.name = name

    def _open(self, closing: ExitStack) -> object:
        settings, module = _library("wrapper.ndi_recv"), _library("receiver")
        finder = _library("finder").Finder()
        finder.open()
        closing.callback(finder.close)
        found = self._find(finder)
        receiver = module.Receiver(
            color_format=settings.RecvColorFormat.RGBX_RGBA,
            bandwidth=settings.RecvBandwidth.highest,
            allow_video_fields=False,
        )
        closing.callback(receiver.disconnect)
        self._frame, self._stamp = _library("video_frame").VideoFrameSync(), None
        receiver.frame_sync.set_video_frame(self._frame)
        receiver.set_source(found)
        return receiver

    def _find(self, finder: Handle) -> object:
        end = time.monotonic() + self.timeout
        names: list[str] = []
        while time.monotonic() < end:
            finder.update_sources()
            names = finder.get_source_names()
            wanted = [name for name in names if not self.name or name == self.name or name.endswith(f"({self.name})")]
            if wanted:
                return finder.get_source(wanted[0])
            time.sleep(NAP)
        raise SourceLost(f"no NDI source {self.name!r} within {self.timeout:g} s; found: {', '.join(names) or 'none'}")

    def _pixels(self, handle: Handle) -> np.ndarray | None:
        """A receiver of cyndilib always has a frame synchronizer, which takes the frames out of the queue that `receive`
        reads. So they are captured from it, which returns the newest frame at once, again and again until the next one."""
        frame = self._frame
        handle.frame_sync.capture_video()
        width, height = frame.get_resolution()
        stamp = frame.get_timestamp_posix(), frame.get_timecode_posix()
        if not height or stamp == self._stamp:
            return None
        self._stamp = stamp
        rows = frame.get_array().reshape(height, frame.get_line_stride())[:, : 4 * width]
        return rows.reshape(height, width, 4)[..., :3]


class NdiSink(Device, Sink):
    """Sends under that name. rate: what is announced; when images go out is the writer's matter."""

    def __init__(self, name: str = "StreamFlow", rate: float = 30) -> None:
        check_rate(rate)
        super().__init__("the NDI sink")
        self.name, self.rate = name or "StreamFlow", Fraction(rate).limit_denominator(1001)

    def _open(self, closing: ExitStack) -> object:
        self._shape: tuple[int, ...] | None = None
        return _library("sender")

    def write(self, image: TimedImage) -> None:
        library = self.handle
        if image.pixels.shape != self._shape:
            self._begin(library, image.pixels.shape)
        self._sender.write_video(rgba(image.pixels).reshape(-1))

    def _begin(self, library: Handle, shape: tuple[int, ...]) -> None:
        """Open the sender at a size; NDI takes it on with the frame, so another size is a new sender of the same name."""
        self._closing.close()
        self._shape = None  # until the new sender is open
        frame = _library("video_frame").VideoSendFrame()
        frame.set_resolution(shape[1], shape[0])
        frame.set_frame_rate(self.rate)
        frame.set_fourcc(_library("wrapper.ndi_structs").FourCC.RGBX)
        self._sender = library.Sender(self.name, clock_video=False)
        self._closing.callback(self._sender.close)
        self._sender.set_video_frame(frame)
        self._sender.open()
        self._shape = shape
