"""`streamflow img2img`: images restyled, streamed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from streamflow.app.commands import options

EXAMPLE = 'streamflow img2img photos/*.png --prompt "a fox, flat vector" --strength 0.6 --output outputs/restyled'


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where an image cannot be read, the others being done; 2 for invalid arguments."""
    p = options.parser("img2img", "Restyles images, in their order; results have their names.", EXAMPLE)
    p.add_argument("images", type=Path, nargs="+", help="files")
    p.add_argument("--output", type=Path, default=Path("outputs"), help="folder (default: %(default)s)")
    a = p.parse_args(argv)
    names = [path.stem for path in a.images]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        p.error(f"several images are called {', '.join(twice)}, and results have their names: give them apart")
    if missing := [str(path) for path in a.images if not path.is_file()]:
        p.error(f"there is no file {', '.join(missing)}")
    settings = options.settings(p, a, mode="img2img", strength=0.5)
    from streamflow.image_utils import as_rgb, open_image, postprocess_image
    from streamflow.wrapper import StreamFlowWrapper

    a.output.mkdir(parents=True, exist_ok=True)
    unread: dict[str, str] = {}
    read: list[str] = []

    def images():
        for path in tqdm(a.images, unit="image", disable=a.json):
            try:
                image = as_rgb(open_image(path))
            except OSError as error:
                unread[str(path)] = str(error)
                continue
            read.append(path.stem)
            yield image

    files = []
    with StreamFlowWrapper.from_settings(settings) as wrapper:
        began = time.perf_counter()
        for name, frame in _named(read, wrapper.stream.frames(images())):
            files.append(str(a.output / f"{name}.png"))
            postprocess_image(frame.wait().image[None])[0].save(files[-1])
        seconds = time.perf_counter() - began
    for path, cause in unread.items():
        print(f"{path} cannot be read: {cause}", file=sys.stderr)
    result = {"files": files, "unread": unread, "seconds": round(seconds, 3)}
    print(json.dumps(result) if a.json else f"{len(files)} images in {seconds:.1f} s, in {a.output}")
    return int(bool(unread))


def _named(names, frames):
    """Each frame with its input's name, which is there by then."""
    for k, frame in enumerate(frames):
        yield names[k], frame
