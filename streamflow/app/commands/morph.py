"""`streamflow morph`: one prompt's image turns into the next one's."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from streamflow._command_line import above, at_least, say_download
from streamflow._files import Json
from streamflow.app.commands import options

if TYPE_CHECKING:
    import PIL.Image

    from streamflow.app.config import Settings
    from streamflow.pipeline import StreamFlow

EXAMPLE = 'streamflow morph "an apple, 3d render" "an orange, 3d render" --output outputs/morph.gif'
UNUSED = ("mode", "prompt", "strength", "similar_image_filter", "controlnet")
BLENDS = ("linear", "slerp")  # `streamflow.conditioning.blending.METHODS`, which imports torch
VIDEOS = (".mp4", ".mkv")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where the file cannot be written; 2 for invalid arguments."""
    p = options.parser("morph", "Draws the way from one prompt to the next while the noise stays.", EXAMPLE, unused=UNUSED)
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help="two or more")
    p.add_argument("--frames", type=at_least(2), default=30, help="from each to the next (default %(default)s)")
    p.add_argument("--blend", choices=BLENDS, default="slerp", help="default: %(default)s")
    p.add_argument("--rate", type=above(0), default=16.0, help="frames a second (default %(default)g)")
    p.add_argument("--one-way", action="store_true", help="end at the last prompt, and not go back to the first")
    p.add_argument(
        "--output", type=Path, default=Path("outputs/morph.gif"), help=".gif, .mp4 or .mkv (default: %(default)s)"
    )
    p.add_argument("--sheet", type=Path, metavar="FILE", help="also all frames side by side, an image")
    a = p.parse_args(argv)
    if len(a.prompts) < 2:
        p.error("a morph goes from one prompt to another: give two or more")
    if a.output.suffix.lower() not in (".gif", *VIDEOS):
        p.error(f"{a.output}: the file's name ends in .gif, {' or '.join(VIDEOS)}")
    a.prompt = json.dumps([[text, float(k == 0)] for k, text in enumerate(a.prompts)])
    settings = options.settings(p, a, mode="txt2img")
    try:
        result = draw(settings, a)
    except options.ERRORS as error:
        return options.failed(p, error)
    where = " and ".join(str(path) for path in (a.output, a.sheet) if path)
    print(json.dumps(result) if a.json else f"{result['frames']} frames in {result['seconds']:.1f} s: {where}")
    return 0


def draw(settings: Settings, a: argparse.Namespace) -> Json:
    """The frames into the file; what was done."""
    from streamflow.image_utils import image_grid
    from streamflow.io.protocols import need
    from streamflow.wrapper import StreamFlowWrapper

    for path in filter(None, (a.output, a.sheet)):
        path.parent.mkdir(parents=True, exist_ok=True)  # before a model is loaded
    if a.output.suffix.lower() in VIDEOS:
        need("av", "av")
    legs = len(a.prompts) - 1
    say_download(settings.model)
    with StreamFlowWrapper.from_settings(settings) as wrapper:
        began = time.perf_counter()
        wrapper.stream.update(blend=a.blend)
        way = morph(wrapper.stream, len(a.prompts), a.frames * legs)
        frames = list(tqdm(way, total=a.frames * legs, unit="frame", disable=a.json))
        seconds = time.perf_counter() - began
    shown = frames if a.one_way else frames + frames[-2:0:-1]
    _write(shown, a.output, a.rate)
    if a.sheet:
        image_grid(frames, columns=10).save(a.sheet)
    return {"file": str(a.output), "frames": len(shown), "drawn": len(frames), "seconds": round(seconds, 3)}


def morph(stream: StreamFlow, prompts: int, count: int) -> Iterator[PIL.Image.Image]:
    """PIL images, `count` even steps from the first of the stream's prompts to the last."""
    from streamflow.image_utils import postprocess_image

    noise = stream.frame_noise(0)
    for k in range(count):
        at = k * (prompts - 1) / (count - 1)
        stream.update(prompt_weights=[max(0.0, 1 - abs(at - j)) for j in range(prompts)], scope="frame")
        done = stream.predict_x0_batch(noise)
        if done is not None:
            yield postprocess_image(stream.decode_image(done))[0]
    for done in stream.flush():
        yield postprocess_image(stream.decode_image(done))[0]


def _write(frames: Sequence[PIL.Image.Image], output: Path, rate: float) -> None:
    if output.suffix.lower() not in VIDEOS:
        frames[0].save(output, save_all=True, append_images=frames[1:], duration=round(1000 / rate), loop=0)
        return
    import numpy as np

    from streamflow.io.protocols import TimedImage
    from streamflow.io.recorder import Recorder

    with closing(Recorder(output, rate, clock=False)) as recorder:
        recorder.open()
        for frame in frames:
            recorder.write(TimedImage(np.asarray(frame), 0.0))
