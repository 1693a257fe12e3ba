"""Video files in. Knows PyAV; rotation that the file asks for is applied, the sound is left to the recorder."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from streamflow.io.device import Device
from streamflow.io.protocols import InvalidSource, Source, SourceLost, TimedImage, as_source_lost, need

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

logger = logging.getLogger(__name__)


class FileSource(Device, Source):
    """The images of a video file, upright, with their times in `pts`.

    path: the file. loop: begin again at its end, the times going on. After `open`: `rate` (frames a second, a Fraction)
    and `audio` (the path where there is sound, else None), which a Recorder takes to keep the sound; `count`, the frames
    that the file says it has, None where it does not. A truncated file ends where it is cut; images that cannot be
    decoded are left out, which is logged once.

    Raises, from open: FileNotFoundError, and InvalidSource where PyAV cannot read it or it has no video; SourceLost where
    its disk or network fails.
    """

    def __init__(self, path: str | Path, loop: bool = False) -> None:
        super().__init__(str(path))
        self.path, self.loop = Path(path), loop
        self.rate = Fraction(30)
        self.audio: Path | None = None
        self.count: int | None = None

    def _open(self, closing: ExitStack) -> object:
        av = need("av", "av")
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {self.path}")
        self._damaged = False
        self._offset = self._end = 0.0
        try:
            with as_source_lost(self.what):
                container = _container(av, self.path)
        except SourceLost as error:
            cause = error.__cause__
            if isinstance(cause, EOFError) and self.path.stat().st_size:  # a recording that was cut before its first image
                self.rate, self.count, self.audio, self._frames = Fraction(30), 0, None, iter(())
                self._log_damaged(cause)
                return self._frames
            if isinstance(cause, OSError) or not isinstance(cause, av.error.FFmpegError):
                raise
            raise InvalidSource(f"{self.path} cannot be read as a video: {cause}") from error
        closing.callback(container.close)
        if not container.streams.video:
            raise InvalidSource(f"{self.path} has no video in it")
        video = container.streams.video[0]
        self.rate = video.average_rate or video.guessed_rate or Fraction(30)
        self.count = video.frames or None
        self.audio = self.path if container.streams.audio else None
        self._start(container)
        return container

    def read(self) -> TimedImage | None:
        container = self.handle
        with as_source_lost(f"{self.path} was lost"):
            frame = next(self._frames, None)
            if frame is None and self.loop and self._end > self._offset:
                self._offset = self._end
                container.seek(0)
                self._start(container)
                frame = next(self._frames, None)
            return None if frame is None else self._image(frame)

    def _start(self, container: InputContainer) -> None:
        self._first: float | None = None
        self._frames = self._decoded(container)

    def _decoded(self, container: InputContainer) -> Iterator[VideoFrame]:
        """All frames that can be decoded, as far as the file can be read."""
        broken = need("av", "av").error.FFmpegError
        packets = container.demux(container.streams.video[0])
        while True:
            try:
                packet = next(packets, None)
            except broken as error:
                if isinstance(error, OSError):
                    raise
                packet = None
                self._log_damaged(error)
            if packet is None:
                return
            try:
                frames = packet.decode()
            except broken as error:
                frames = []
                self._log_damaged(error)
            yield from frames

    def _log_damaged(self, error: Exception) -> None:
        if not self._damaged:
            self._damaged = True
            logger.warning("%s is damaged or cut, and images that cannot be decoded are left out: %s", self.path, error)

    def _image(self, frame: VideoFrame) -> TimedImage:
        period = float(1 / self.rate)
        seconds = frame.time if frame.time is not None else self._end - self._offset
        first = self._first = seconds if self._first is None else self._first
        pts = self._offset + max(seconds - first, 0.0)
        self._end = pts + period
        return TimedImage(upright(frame), time.monotonic(), pts)


def _container(av: ModuleType, path: Path) -> InputContainer:
    """The opened file. A recording that was cut within the head of a fragment can be opened only without its index."""
    try:
        return av.open(str(path))
    except (av.error.InvalidDataError, av.error.EOFError):
        return av.open(str(path), options={"fflags": "+ignidx"})


def upright(frame: VideoFrame) -> np.ndarray:
    """A PyAV frame's pixels `[H, W, 3]`, turned by the quarter turns that its display matrix asks for."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
