"""`streamflow txt2img`: images from a prompt, streamed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from streamflow._command_line import at_least
from streamflow.app.commands import options

EXAMPLE = 'streamflow txt2img --prompt "a fox, 3d render" --count 8 --output outputs/fox'


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for invalid arguments. Images that are there when it is interrupted are whole."""
    p = options.parser("txt2img", "Draws images from a prompt, one seed after another.", EXAMPLE)
    p.add_argument("--count", type=at_least(1), default=4, help="how many (default %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs"), help="folder (default: %(default)s)")
    a = p.parse_args(argv)
    settings = options.settings(p, a, mode="txt2img")
    names = [f"{number:04d}" for number in range(a.count)]
    result = options.draw(settings, tqdm([None] * a.count, unit="image", disable=a.json), names, a.output)
    files, seconds = result["files"], result["seconds"]
    print(json.dumps(result) if a.json else f"{a.count} images in {seconds:.1f} s: {files[0]} to {files[-1]}")
    return 0
