"""`streamflow txt2img`: images from a prompt, streamed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from streamflow._command_line import at_least
from streamflow.app.commands import options
from streamflow.pretrained import EXAMPLE_PROMPTS

EXAMPLE = 'streamflow txt2img --prompt "a fox, 3d render" --count 8 --output outputs/fox'
UNUSED = ("mode", "strength", "similar_image_filter", "controlnet")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where a file cannot be read or written; 2 for invalid arguments. Images that are there when it is
    interrupted are whole."""
    about = "Draws images from a prompt, one seed after another. Without one, the built-in model draws its example prompts."
    p = options.parser("txt2img", about, EXAMPLE, unused=UNUSED, defaults={"prompt": "example prompts"})
    p.add_argument("--count", type=at_least(1), default=4, help="how many images (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs"), metavar="FOLDER", help="default: %(default)s")
    a = p.parse_args(argv)
    settings = options.settings(p, a, mode="txt2img")
    names = [f"{number:04d}" for number in range(a.count)]
    examples = settings.model == "embedded" and "prompt" not in settings.model_fields_set
    prompts = islice(cycle(EXAMPLE_PROMPTS), a.count) if examples else ()
    try:
        result = options.draw(settings, [None] * a.count, names, a.output, tuple(prompts), count=a.count, quiet=a.json)
    except options.ERRORS as error:
        return options.failed(p, error)
    files, seconds = result["files"], result["seconds"]
    what, where = ("1 image", files[0]) if a.count == 1 else (f"{a.count} images", f"{files[0]} to {files[-1]}")
    print(json.dumps(result) if a.json else f"{what} in {seconds:.1f} s: {where}")
    return 0
