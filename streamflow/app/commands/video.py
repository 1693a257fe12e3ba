"""`streamflow video`: a video file restyled, every frame of it, with its times and its sound; or a video that a video model
draws."""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from streamflow._command_line import Parser, above, at_least, say_download
from streamflow._files import Json
from streamflow.app import config
from streamflow.app.commands import options
from streamflow.app.config import Settings
from streamflow.app.signals import INTERRUPTED, Stop, stop_signals
from streamflow.io import InvalidSource, Reading, TimedImage, Writing
from streamflow.samples import CLIP

if TYPE_CHECKING:
    import numpy as np

    from streamflow.pipeline import StreamFlow

SECONDS = 5  # of a video that a video model draws
EXAMPLE = 'streamflow video --in dance.mp4 --out fox.mp4 --prompt "a fox, 3d render" --strength 0.6'


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where the video cannot be read or written; 2 for invalid arguments; 130 after SIGINT or SIGTERM.
    What is written by then can be played."""
    p = options.parser(
        "video",
        "Restyles a video: every frame in order, at its time, with the sound. Without --width and --height it keeps the "
        "video's proportions at as many pixels as the model's own size has; with them, it is cropped to theirs. A video "
        "model (--model) draws a video instead, from the prompt, or on from an image or a video.",
        EXAMPLE,
        "video",
        defaults=config.START,
    )
    p.add_argument("--in", dest="source", type=Path, metavar="FILE", help="a video to restyle (default: the sample clip)")
    p.add_argument(
        "--out", type=Path, default=Path("outputs/video.mp4"), metavar="FILE", help=".mp4 or .mkv (default: %(default)s)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    p.add_argument("--no-sound", dest="sound", action="store_false", help="leave the sound out")
    of_models = p.add_argument_group("video models")
    of_models.add_argument("--image", dest="video.image", metavar="FILE", help="an image that the video goes on from")
    of_models.add_argument("--video", dest="video.video", metavar="FILE", help="a video that it goes on from")
    length = of_models.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=above(0), help=f"how long it is (default: {SECONDS})")
    length.add_argument("--frames", type=at_least(1), help="how many frames it has")
    of_models.add_argument("--fps", type=above(0), help="frames a second (default: the model's own)")
    with stop_signals(INTERRUPTED) as stop:
        return _run(p, p.parse_args(argv), stop)


def _run(p: Parser, a: argparse.Namespace, stop: Stop) -> int:
    if a.out.exists() and not a.overwrite:
        p.error(f"{a.out} is there already: choose another name, or pass --overwrite")
    settings = options.settings(p, a, mode="img2img")
    from streamflow.app.video_model import check_images, check_video
    from streamflow.models.loading import is_video

    read = (a.source or CLIP, settings.video.image, settings.video.video)
    if a.out.exists() and any(path and Path(path).exists() and a.out.samefile(path) for path in read):
        p.error(f"{a.out} is what is read: choose another name")
    try:
        if is_video(settings.model):
            check_video(settings)
            if a.source:
                raise ValueError("source: a video model restyles no video: it goes on from one with --video")
            length = {"seconds": a.seconds, "count": a.frames, "fps": a.fps}
            result = draw(settings, a.out, stop, **length, quiet=a.json)
        else:
            check_images(settings)
            for name in ("seconds", "frames", "fps"):
                if getattr(a, name):
                    raise ValueError(f"{name}: {settings.model} is no video model: leave it out")
            result = restyle(settings, a.source or CLIP, a.out, stop, sound=a.sound, quiet=a.json)
    except InvalidSource as error:
        return p.failed(error)
    except options.ERRORS as error:
        return options.failed(p, error)
    ended = "" if not result.get("ended") else ", where the video of this model ends"
    print(json.dumps(result) if a.json else f"{result['frames']} frames in {result['seconds']:.1f} s: {a.out}{ended}")
    return INTERRUPTED if result["interrupted"] else 0


def restyle(settings: Settings, source: Path, out: Path, stop: Stop, sound: bool = True, quiet: bool = False) -> Json:
    """Every frame of `source`, restyled, into `out`; what was done. Reading and writing have threads of their own."""
    from streamflow.io.file import FileSource
    from streamflow.io.recorder import Recorder
    from streamflow.wrapper import StreamFlowWrapper

    video = FileSource(source)
    with Reading(video, "every") as reading:
        first = reading.read()
        if first is None:
            raise ValueError(f"{source} has no frame that can be read")
        audio = video.audio if sound else None
        height, width = first.pixels.shape[:2]
        out.parent.mkdir(parents=True, exist_ok=True)  # before a model is loaded
        say_download(settings.model)
        with StreamFlowWrapper.from_settings(settings, like=(width, height)) as wrapper:
            stream, began = wrapper.stream, time.perf_counter()
            stop.remember()  # the output file is open from here on
            with (
                Writing(Recorder(out, video.rate, audio=audio), block=True) as writing,
                tqdm(total=video.count, unit="frame", disable=quiet) as bar,
            ):
                frames, interrupted = _pass(stream, chain([first], iter(reading.read, None)), writing, bar, stop)
    return {
        "file": str(out),
        "frames": frames,
        "size": [stream.width, stream.height],
        "sound": audio is not None,
        "interrupted": interrupted,
        "seconds": round(time.perf_counter() - began, 3),
    }


def draw(
    settings: Settings,
    out: Path,
    stop: Stop,
    seconds: float | None = None,
    count: int | None = None,
    fps: float | None = None,
    quiet: bool = False,
) -> Json:
    """The first `count` frames of a video model, or so many seconds of them, into `out`; what was done."""
    from streamflow.app.video_model import open_video
    from streamflow.io.recorder import Recorder

    Recorder(out, fps or 1)  # raises for a bad name or rate before a model is loaded
    out.parent.mkdir(parents=True, exist_ok=True)
    say_download(settings.model)
    with open_video(settings) as stream:
        rate, began = fps or stream.fps, time.perf_counter()
        most, written, size = count or max(1, round((seconds or SECONDS) * rate)), 0, None
        stop.remember()  # the output file is open from here on
        with (
            Writing(Recorder(out, rate, clock=False), block=True) as writing,
            tqdm(total=most, unit="frame", disable=quiet) as bar,
        ):
            for frame in stream.frames(most):
                if stop.received:
                    break
                image = frame.timed()
                writing.write(image)
                size = [image.pixels.shape[1], image.pixels.shape[0]]
                written += 1
                bar.update()
    return {
        "file": str(out),
        "frames": written,
        "size": size,
        "fps": rate,
        "ended": written < most and not stop.received,
        "interrupted": stop.received,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _pass(stream: StreamFlow, images: Iterable[TimedImage], writing: Writing, bar: tqdm, stop: Stop) -> tuple[int, bool]:
    """Every image through the stream; how many, and whether a signal ended it."""
    from streamflow.image_utils import cropped, uint8_pixels

    times: deque[float] = deque()

    def entering() -> Iterator[np.ndarray]:
        for image in images:
            assert image.pts is not None, "the images of a file have their times"
            times.append(image.pts)
            yield cropped(image.pixels, stream.width, stream.height)

    count = 0
    for frame in stream.frames(entering()):
        pixels = uint8_pixels(frame.wait().image[None])[0]
        if stop.received:
            break
        writing.write(TimedImage(pixels, times.popleft()))
        bar.update()
        count += 1
    return count, stop.received
