"""Pictures in a folder, or one picture, in and out. Knows PIL."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import PIL.Image

from streamflow.image_utils import as_rgb, open_image
from streamflow.io.picture import Picture, Sink, Source, check_rate

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class FolderSource(Source):
    """The pictures of a folder in the order of their names (2 before 10), or one picture.

    path: the folder or file. rate: frames a second, from which `pts` follows. loop: begin again at the end.

    Raises, from open: FileNotFoundError where there is no such path or no picture in it.
    """

    def __init__(self, path: str | Path, rate: float = 30, loop: bool = False) -> None:
        check_rate(rate)
        self.path, self.rate, self.loop = Path(path), rate, loop
        self._paths: list[Path] | None = None
        self._count = 0

    def open(self) -> None:
        if not self.path.exists():
            raise FileNotFoundError(f"no such file or folder: {self.path}")
        found = [self.path] if self.path.is_file() else sorted(self.path.iterdir(), key=_natural)
        paths = [path for path in found if path.suffix.lower() in SUFFIXES]
        if not paths:
            raise FileNotFoundError(f"no picture in {self.path}: known are {', '.join(SUFFIXES)}")
        self._paths, self._count = paths, 0

    def read(self) -> Picture | None:
        if self._paths is None:
            raise RuntimeError(f"{self.path} is not open: call open() first")
        if self._count >= len(self._paths) and not self.loop:
            return None
        pixels = read_picture(self._paths[self._count % len(self._paths)])
        picture = Picture(pixels, time.monotonic(), self._count / self.rate)
        self._count += 1
        return picture

    def close(self) -> None:
        self._paths = None


class FolderSink(Sink):
    """Writes frame_000000.png and on, after what is there already. suffix: the format, one that PIL writes."""

    def __init__(self, path: str | Path, suffix: str = ".png") -> None:
        if suffix not in SUFFIXES:
            raise ValueError(f"unknown suffix {suffix!r}: choose one of {', '.join(SUFFIXES)}")
        self.path, self.suffix, self._next = Path(path), suffix, 0

    def open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        taken = [re.fullmatch(r"frame_(\d+)", path.stem) for path in self.path.iterdir()]
        self._next = 1 + max((int(match[1]) for match in taken if match), default=-1)

    def write(self, picture: Picture) -> None:
        PIL.Image.fromarray(picture.pixels).save(self.path / f"frame_{self._next:06d}{self.suffix}")
        self._next += 1

    def close(self) -> None:
        pass


def read_picture(path: Path) -> np.ndarray:
    """An image file's pixels, uint8 `[H, W, 3]`, read by `streamflow.image_utils.open_image`."""
    return np.array(as_rgb(open_image(path)))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
