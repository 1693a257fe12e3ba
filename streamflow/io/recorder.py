"""Video files out, playable however the writing ends. Knows PyAV; the sound is copied, not encoded again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamflow.io.protocols import Sink, TimedImage, check_rate, need

if TYPE_CHECKING:
    from av.container import OutputContainer

TICKS = 90_000  # a second, in which times are written

# How each kind of file is cut into pieces that stand by themselves, so that what is on the disk can always be played.
CONTAINERS = {
    ".mp4": {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "500000", "flush_packets": "1"},
    ".mkv": {"cluster_time_limit": "0", "flush_packets": "1"},
}


class Recorder(Sink):
    """Writes images to .mp4 or .mkv as H.264. Killed at any moment, the file plays up to about half a second before.

    path: the file, replaced where it exists. rate: frames a second. clock: time each image by its own `time`, as fits a
    live stream; else image k is at k / rate. audio: a file whose sound is copied along, as far as the images go.
    quality: libx264's constant rate factor, 0 (lossless) to 51. An odd width or height gets one more column or row, the
    last one repeated, since H.264's common format has none. Opened again after an error, it goes on in a new file beside the
    first, out.2.mp4, whose name `path` then holds. What was recorded before is kept.

    Raises:
        ValueError: an unknown suffix, a rate or quality out of range; from write: an image of another size than the
            first, which needs a new file.
    """

    def __init__(
        self,
        path: str | Path,
        rate: float | Fraction = 30,
        clock: bool = True,
        audio: str | Path | None = None,
        quality: int = 20,
    ) -> None:
        check_rate(rate)
        self.path = Path(path)
        if self.path.suffix.lower() not in CONTAINERS:
            raise ValueError(f"{self.path}: the file's name ends in one of {', '.join(CONTAINERS)}")
        if not 0 <= quality <= 51:
            raise ValueError(f"quality is {quality!r}: 0 (lossless) to 51")
        self.rate, self.clock, self.audio, self.quality = Fraction(rate).limit_denominator(1001), clock, audio, quality
        self._name = self.path
        self._failed = False
        self._count, self._last = 0, -1
        self._output: Any = None
        self._video: Any = None
        self._sound: _Sound | None = None

    def open(self) -> None:
        av = need("av", "av")
        self.close()
        if self._failed and self._count:
            numbered = (self._name.with_stem(f"{self._name.stem}.{k}") for k in count(2))
            self.path = next(path for path in numbered if not path.exists())
        self._failed = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._output = av.open(str(self.path), "w", options=CONTAINERS[self.path.suffix.lower()])
        self._video = self._sound = None
        self._count, self._last = 0, -1

    def write(self, image: TimedImage) -> None:
        if self._output is None:
            raise RuntimeError(f"{self.path} is not open: call open() first")
        with self._noting_errors():
            self._write(image)

    def _write(self, image: TimedImage) -> None:
        if self._video is None:
            self._video = self._begin(image)
        if image.pixels.shape != self._shape:
            (h, w, _), (height, width, _) = image.pixels.shape, self._shape
            raise ValueError(f"an image of {w}x{h} in a recording of {width}x{height}: begin a new file")
        frame = need("av", "av").VideoFrame.from_ndarray(_even(image.pixels), format="rgb24")
        frame.pts, frame.time_base = self._pts(image), Fraction(1, TICKS)
        self._output.mux(self._video.encode(frame))
        self._count += 1
        if self._sound is not None:
            self._sound.copy(self._output, frame.pts / TICKS)

    def close(self) -> None:
        output, self._output = self._output, None
        if output is None:
            return
        with ExitStack() as closing:
            closing.enter_context(self._noting_errors())
            if self._sound is not None:
                closing.callback(self._sound.close)
            closing.callback(output.close)
            if self._video is not None:
                output.mux(self._video.encode(None))
            if self._sound is not None:
                self._sound.copy(output, (self._last + TICKS / self.rate) / TICKS)

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _begin(self, image: TimedImage) -> Any:
        self._shape, self._first = image.pixels.shape, image.time
        height, width = _even(image.pixels).shape[:2]
        second = max(1, round(self.rate))
        video = self._output.add_stream("libx264", rate=self.rate)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.time_base = Fraction(1, TICKS)
        video.codec_context.gop_size = second
        video.options = {"crf": str(self.quality), "preset": "veryfast", "tune": "zerolatency"}
        self._sound = None if self.audio is None else _Sound(self.audio, self._output)
        return video

    def _pts(self, image: TimedImage) -> int:
        seconds = image.time - self._first if self.clock else self._count / self.rate
        self._last = max(round(seconds * TICKS), self._last + 1)
        return self._last


class _Sound:
    """The packets of a file's first sound, handed on in step with the images."""

    def __init__(self, path: str | Path, output: OutputContainer) -> None:
        self._input = need("av", "av").open(str(path))
        if not self._input.streams.audio:
            self._input.close()
            raise ValueError(f"{path} has no sound in it: leave audio out")
        template = self._input.streams.audio[0]
        self._stream = output.add_stream_from_template(template)
        self._packets: Iterator[Any] = (p for p in self._input.demux(template) if p.dts is not None)
        self._waiting = next(self._packets, None)

    def copy(self, output: OutputContainer, until: float | Fraction) -> None:
        """Pass on what begins before `until`, in seconds."""
        while self._waiting is not None and self._waiting.dts * self._waiting.time_base < until:
            self._waiting.stream = self._stream
            output.mux(self._waiting)
            self._waiting = next(self._packets, None)

    def close(self) -> None:
        self._input.close()


def _even(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    return np.ascontiguousarray(np.pad(pixels, odd, mode="edge") if height % 2 or width % 2 else pixels)
