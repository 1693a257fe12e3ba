"""Checks the images that examples/train_emoji/data.py packs, and writes them as one file into a folder for train.py.

    python examples/train_edit/pack_data.py --source .cache/emoji/pack128.tar --output .cache/edit/data

The file is a tar of 6,444 WebP images of 128x128 and their captions, 25 MiB. A machine without npm needs this folder and the
repository, nothing else.
"""

import argparse
from collections import Counter
from pathlib import Path

import emoji_modules  # noqa: F401
from captions import STYLES
from pack import read_pack

NAME = "emoji.tar"
LIMIT_MIB = 64


def check(path: Path) -> str:
    """What the pack holds, in a line. ValueError where a style is missing or the file is too large to be carried."""
    counts = Counter(row["style"] for row in read_pack(path).rows)
    missing = [style for style in STYLES if not counts[style]]
    if missing:
        raise ValueError(f"{path} has no image in {', '.join(missing)}: build it again with examples/train_emoji/data.py")
    size = path.stat().st_size / 2**20
    if size > LIMIT_MIB:
        raise ValueError(f"{path} is {size:.1f} MiB and may be {LIMIT_MIB}: pack WebP images of 128x128")
    return f"{sum(counts.values())} images, {dict(counts)}, {size:.1f} MiB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(".cache/emoji/pack128.tar"))
    parser.add_argument("--output", type=Path, default=Path(".cache/edit/data"), help="a folder")
    arguments = parser.parse_args()
    found = check(arguments.source)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / NAME).write_bytes(arguments.source.read_bytes())
    print(f"{arguments.output / NAME}: {found}")
