"""`streamflow img2img`: images restyled, streamed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streamflow.app import config
from streamflow.app.commands import options
from streamflow.samples import IMAGE

if TYPE_CHECKING:
    import PIL.Image

EXAMPLE = 'streamflow img2img photos/*.png --prompt "a fox, flat vector" --strength 0.6 --output outputs/restyled'


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where an image cannot be read, the others being done; 2 for invalid arguments."""
    p = options.parser(
        "img2img", "Restyles images, in their order; results have their names.", EXAMPLE, defaults=config.START
    )
    p.add_argument("images", type=Path, nargs="*", default=[IMAGE], help="files (default: the sample drawing)")
    p.add_argument("--output", type=Path, default=Path("outputs"), metavar="FOLDER", help="default: %(default)s")
    a = p.parse_args(argv)
    names = [path.stem for path in a.images]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        p.error(f"several images are called {', '.join(twice)}, and results have their names: give them apart")
    if missing := [str(path) for path in a.images if not path.is_file()]:
        p.error(f"there is no file {', '.join(missing)}")
    settings = options.settings(p, a, mode="img2img")
    unread: dict[str, str] = {}
    read: list[str] = []

    def images() -> Iterator[PIL.Image.Image]:
        from streamflow.image_utils import as_rgb, open_image

        for path in a.images:
            try:
                image = as_rgb(open_image(path))
            except OSError as error:
                unread[str(path)] = str(error)
                continue
            read.append(path.stem)
            yield image

    try:
        result = {**options.draw(settings, images(), read, a.output, count=len(a.images), quiet=a.json), "unread": unread}
    except options.ERRORS as error:
        return options.failed(p, error)
    for path, cause in unread.items():
        print(f"{path} cannot be read: {cause}", file=sys.stderr)
    summary = f"{len(read)} image{'s' * (len(read) != 1)} in {result['seconds']:.1f} s, in {a.output}"
    print(json.dumps(result) if a.json else summary)
    return int(bool(unread))
