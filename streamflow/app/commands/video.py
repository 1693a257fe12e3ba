"""`streamflow video`: a video file restyled, every frame of it, with its times and its sound."""

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

from streamflow._command_line import Parser, say_download
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

EXAMPLE = 'streamflow video --in dance.mp4 --out fox.mp4 --prompt "a fox, 3d render" --strength 0.6'


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where the video cannot be read or written; 2 for invalid arguments; 130 after SIGINT or SIGTERM.
    What is written by then can be played."""
    p = options.parser(
        "video",
        "Restyles a video: every frame in order, at its time, with the sound. Without --width and --height it keeps the "
        "video's proportions at as many pixels as the model's own size has; with them, it is cropped to theirs.",
        EXAMPLE,
        defaults=config.START,
    )
    p.add_argument("--in", dest="source", type=Path, default=CLIP, metavar="FILE", help="a video (default: the sample clip)")
    p.add_argument(
        "--out", type=Path, default=Path("outputs/video.mp4"), metavar="FILE", help=".mp4 or .mkv (default: %(default)s)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    p.add_argument("--no-sound", dest="sound", action="store_false", help="leave the sound out")
    with stop_signals(INTERRUPTED) as stop:
        return _run(p, p.parse_args(argv), stop)


def _run(p: Parser, a: argparse.Namespace, stop: Stop) -> int:
    if a.out.exists() and not a.overwrite:
        p.error(f"{a.out} is there already: choose another name, or pass --overwrite")
    if a.out.exists() and a.source.exists() and a.out.samefile(a.source):
        p.error(f"{a.out} is what is read: choose another name")
    settings = options.settings(p, a, mode="img2img")
    try:
        result = restyle(settings, a.source, a.out, stop, sound=a.sound, quiet=a.json)
    except InvalidSource as error:
        return p.failed(error)
    except options.ERRORS as error:
        return options.failed(p, error)
    print(json.dumps(result) if a.json else f"{result['frames']} frames in {result['seconds']:.1f} s: {a.out}")
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
