"""NDI, images over the local network, in and out. Knows cyndilib, whose wheels bring the NDI library."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import numpy as np

from streamflow.io.protocols import Sink, Source, SourceLost, TimedImage, as_source_lost, check_rate, need, rgba


class NdiSource(Source):
    """The NDI source of that name, "MACHINE (NAME)" or NAME alone; the first that is found where it is empty.
    timeout: seconds to look for it, and to wait for an image.

    Raises SourceLost where it is not found or sends nothing for so long.
    """

    def __init__(self, name: str = "", timeout: float = 5) -> None:
        self.name, self.timeout = name, timeout
        self._finder: Any = None
        self._receiver: Any = None
        self._frame: Any = None

    def open(self) -> None:
        finder_module, receiver_module = need("cyndilib.finder", "cyndilib"), need("cyndilib.receiver", "cyndilib")
        settings, video = need("cyndilib.wrapper.ndi_recv", "cyndilib"), need("cyndilib.video_frame", "cyndilib")
        self.close()
        try:
            with as_source_lost(f"NDI {self.name!r}"):
                self._finder = finder_module.Finder()
                self._finder.open()
                found = self._find()
                self._kind = receiver_module.ReceiveFrameType
                self._frame = video.VideoRecvFrame()
                self._receiver = receiver_module.Receiver(
                    color_format=settings.RecvColorFormat.RGBX_RGBA,
                    bandwidth=settings.RecvBandwidth.highest,
                    allow_video_fields=False,
                )
                self._receiver.set_video_frame(self._frame)
                self._receiver.set_source(found)
        except SourceLost:
            self.close()
            raise

    def read(self) -> TimedImage:
        if self._receiver is None:
            raise RuntimeError("the NDI source is not open: call open() first")
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            with as_source_lost(f"NDI {self.name!r}"):
                if self._receiver.receive(self._kind.recv_video, 100) & self._kind.recv_video:
                    return self._image()
        raise SourceLost(f"NDI {self.name!r} has sent nothing for {self.timeout:g} s")

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.disconnect()
        if self._finder is not None:
            self._finder.close()
        self._receiver = self._finder = self._frame = None

    def _find(self) -> Any:
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            self._finder.wait_for_sources(0.2)
            self._finder.update_sources()
            names = self._finder.get_source_names()
            wanted = [name for name in names if not self.name or name == self.name or name.endswith(f"({self.name})")]
            if wanted:
                return self._finder.get_source(wanted[0])
        raise SourceLost(f"no NDI source {self.name!r} within {self.timeout:g} s; found: {', '.join(names) or 'none'}")

    def _image(self) -> TimedImage:
        data = np.empty(self._frame.get_buffer_size(), dtype=np.uint8)
        self._frame.fill_p_data(data)
        width, height = self._frame.get_resolution()
        rows = data.reshape(height, self._frame.get_line_stride())[:, : 4 * width]
        return TimedImage(np.ascontiguousarray(rows.reshape(height, width, 4)[..., :3]), time.monotonic())


class NdiSink(Sink):
    """Sends under that name. rate: what is announced; when images go out is the writer's matter."""

    def __init__(self, name: str = "StreamFlow", rate: float = 30) -> None:
        check_rate(rate)
        self.name, self.rate = name or "StreamFlow", Fraction(rate).limit_denominator(1001)
        self._sender: Any = None
        self._shape: tuple[int, ...] | None = None

    def open(self) -> None:
        need("cyndilib.sender", "cyndilib")
        self.close()

    def write(self, image: TimedImage) -> None:
        if image.pixels.shape != self._shape:
            self._begin(image.pixels.shape)
        self._sender.write_video(rgba(image.pixels).reshape(-1))

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._sender = self._shape = None

    def _begin(self, shape: tuple[int, ...]) -> None:
        """Open the sender at a size; NDI takes it on with the frame, so another size is a new sender of the same name."""
        self.close()
        frame = need("cyndilib.video_frame", "cyndilib").VideoSendFrame()
        frame.set_resolution(shape[1], shape[0])
        frame.set_frame_rate(self.rate)
        frame.set_fourcc(need("cyndilib.wrapper.ndi_structs", "cyndilib").FourCC.RGBX)
        sender = need("cyndilib.sender", "cyndilib").Sender(self.name, clock_video=False)
        sender.set_video_frame(frame)
        sender.open()
        self._sender, self._shape = sender, shape
