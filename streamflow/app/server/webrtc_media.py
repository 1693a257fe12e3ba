"""The video of a WebRTC connection: frames that arrive, decoded within limits, and the newest image for those that leave.
Knows PyAV and aiortc's tracks; no viewer and no model."""

from __future__ import annotations

import asyncio
import contextlib
import fractions
import queue
import time
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import PIL.Image
from aiortc import MediaStreamTrack, RTCRtpReceiver
from aiortc.mediastreams import MediaStreamError

from streamflow.app.server.images import fit
from streamflow.app.server.messages import BadMessage

CLOCK = 90_000  # ticks a second of a video's time
BACKLOG = 30  # encoded frames that wait for the decoder
REPEAT_SECONDS = 0.5  # after which an image is sent again while no newer one is there
FAILING_SECONDS = 1.0  # without a frame that can be decoded, after which it is reported
KEYFRAME_SECONDS = 0.5  # between two requests for a key frame
DECODERS = {"VP8": "vp8", "H264": "h264"}  # FFmpeg's own, which check the size of a frame before they decode it


class Decoder(queue.Queue):
    """Decodes what an aiortc receiver has put together, in the place of the queue before the receiver's own decoder, whose
    thread calls `get` and so decodes here.

    aiortc's queue has no end, and its decoder takes frames of every size. Here a frame of more than `max_pixels` is not
    decoded, and where more than `BACKLOG` frames wait, they are dropped up to the next key frame, which is requested.
    deliver: called in the decoder's thread with each frame while `active`. report: with a message, once nothing could be
    decoded for `FAILING_SECONDS`, and then again after a frame that could.
    """

    def __init__(self, max_pixels: int, deliver: Callable[[av.VideoFrame], object], report: Callable[[str], object]):
        super().__init__(BACKLOG)
        self._max_pixels, self._deliver, self._report = max_pixels, deliver, report
        self._loop = asyncio.get_running_loop()
        self._codec: Any = None
        self._name = ""
        self._behind = self._reported = False
        self._failing_since: float | None = None
        self._asked = 0.0
        self.active = True

    def attach(self, receiver: RTCRtpReceiver) -> None:
        """Decode for this receiver, which has not been started."""
        self._receiver = receiver
        name = "_RTCRtpReceiver__decoder_queue"
        if not isinstance(getattr(receiver, name, None), queue.Queue):
            raise RuntimeError("this version of aiortc has no decoder queue where 1.16 has it: install aiortc==1.16.0")
        setattr(receiver, name, self)

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """In the event loop: an encoded frame, or None at the end."""
        if item is None:
            with self.mutex:
                self.queue.clear()
            return super().put(None)
        if not item[1].data:  # it would end the decoder
            return
        if self.full():
            self._behind = True
        if self._behind:
            if self.full() or not is_key(item[0].name, item[1].data):
                return self._ask_for_a_key_frame()
            self._behind = False
        super().put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> None:
        """In the decoder's thread: decode until the end."""
        while (item := super().get()) is not None:
            self._decode(*item)

    def _decode(self, codec: Any, encoded: Any) -> None:
        if codec.name != self._name:
            self._name = codec.name
            self._codec = av.CodecContext.create(DECODERS[codec.name], "r")
            self._codec.thread_count = 1
            self._codec.options = {"max_pixels": str(self._max_pixels)}
        packet = av.Packet(encoded.data)
        packet.pts, packet.time_base = encoded.timestamp, fractions.Fraction(1, CLOCK)
        try:
            frames = self._codec.decode(packet)
        except av.FFmpegError:
            self._loop.call_soon_threadsafe(self._ask_for_a_key_frame)
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            if not self._reported and now - self._failing_since >= FAILING_SECONDS:
                self._reported = True
                what = f"VP8 or H.264 with at most {self._max_pixels} pixels a frame"
                self._report(f"the video cannot be decoded: send {what}")
            return
        for frame in frames:
            self._failing_since, self._reported = None, False
            if self.active:
                self._deliver(frame)

    def _ask_for_a_key_frame(self) -> None:
        now = time.monotonic()
        if now - self._asked > KEYFRAME_SECONDS and (sources := self._receiver.getSynchronizationSources()):
            self._asked = now
            asyncio.ensure_future(self._receiver._send_rtcp_pli(sources[-1].source))


def is_key(codec: str, data: bytes) -> bool:
    """Whether an encoded frame needs no frame before it."""
    if codec == "VP8":
        return bool(data) and not data[0] & 1
    return any(part[:1] and part[0] & 31 == 7 for part in data.split(b"\0\0\1"))  # H.264: with its parameters


def fitted(frame: av.VideoFrame, width: int, height: int) -> PIL.Image.Image:
    """A decoded frame as RGB, cut to the middle and scaled as an uploaded image is. BadMessage: it has no RGB."""
    try:
        return fit(frame.to_image(), width, height)
    except av.FFmpegError as error:
        raise BadMessage(f"a frame in {frame.format.name} cannot be converted to RGB") from error


class Output:
    """The newest image of a stream, for the tracks that send it. taken: called for each image, in order, once a track has
    taken it or a newer one. Used in the event loop only."""

    def __init__(self, taken: Callable[[], object]):
        self._taken = taken
        self._image: np.ndarray | None = None
        self._number = self._acknowledged = 0
        self._changed = asyncio.Event()
        self.closed = False

    @property
    def empty(self) -> bool:
        """Whether no image has been shown yet."""
        return self._image is None

    def show(self, pixels: np.ndarray) -> None:
        """Send this image, uint8 `[H, W, 3]`, from now on."""
        self._image = pixels
        self._number += 1
        self._wake()

    def close(self) -> None:
        """End all tracks."""
        self.closed = True
        self._acknowledge()
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _acknowledge(self) -> None:
        for _ in range(self._number - self._acknowledged):
            self._taken()
        self._acknowledged = self._number

    async def newest(self, after: int) -> tuple[int, np.ndarray]:
        """(its number, the image): one later than `after`, or the same again after `REPEAT_SECONDS`, so that a lost frame or
        a key frame is sent while nothing new is drawn. MediaStreamError: there will be none."""
        waited = False
        while not self.closed and (self._image is None or (self._number == after and not waited)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), REPEAT_SECONDS)
            waited = True
        if self.closed or self._image is None:
            raise MediaStreamError
        self._acknowledge()
        return self._number, self._image


class OutputTrack(MediaStreamTrack):
    """A video track of an output's newest images. Time never goes back, and no image is sent twice but for a repetition."""

    kind = "video"

    def __init__(self, output: Output):
        super().__init__()
        self._output, self._number = output, 0
        self._began, self._last = time.monotonic(), -1

    async def recv(self) -> av.VideoFrame:
        """The next frame. MediaStreamError: the output is closed."""
        if self.readyState != "live":
            raise MediaStreamError
        self._number, pixels = await self._output.newest(self._number)
        frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
        self._last = max(self._last + 1, int((time.monotonic() - self._began) * CLOCK))
        frame.pts, frame.time_base = self._last, fractions.Fraction(1, CLOCK)
        return frame
