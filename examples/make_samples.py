"""Draw the files of `streamflow.samples`: an apple, and the same apple in motion for two seconds.

    python examples/make_samples.py --output outputs/samples

The clip ends where it begins, so it can be repeated. Needs PyAV: pip install "streamflow-rf[video]".
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from streamflow.io import TimedImage
from streamflow.io.recorder import Recorder

SIZE, FRAMES, RATE = 256, 48, 24
FINE = 4  # drawn this many times as large and reduced, for smooth edges
RED, BROWN, GREEN, WHITE = (214, 58, 48), (98, 62, 38), (84, 160, 70), (255, 255, 255)


def apple(turn: float) -> Image.Image:
    """The apple at a moment of its motion.

    Args:
        turn: 0 to 1, one period of the motion.
    """
    n = SIZE * FINE
    image = Image.new("RGB", (n, n), WHITE)
    pen = ImageDraw.Draw(image)
    angle = 2 * math.pi * turn
    x, y = n * (0.5 + 0.08 * math.sin(angle)), n * (0.56 + 0.03 * math.cos(2 * angle))
    r, sway = n * 0.3, 0.25 * math.cos(angle)
    pen.ellipse((x - r, y - r, x + r, y + r), fill=RED)
    top = (x + r * (0.15 + sway) / 2, y - 1.35 * r)
    pen.line((x, y - 0.9 * r, *top), fill=BROWN, width=n // 28)
    pen.ellipse((top[0], top[1] - 0.12 * r, top[0] + 0.65 * r, top[1] + 0.24 * r), fill=GREEN)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, default=Path("outputs/samples"), metavar="FOLDER", help="default: %(default)s")
    a = p.parse_args(argv)
    a.output.mkdir(parents=True, exist_ok=True)
    apple(0).save(a.output / "apple.png", optimize=True)
    recorder = Recorder(a.output / "apple.mp4", RATE, clock=False)
    recorder.open()
    for k in range(FRAMES):
        recorder.write(TimedImage(np.asarray(apple(k / FRAMES)), 0.0))
    recorder.close()
    print(f"wrote apple.png and apple.mp4 to {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
