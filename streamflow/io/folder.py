"""Images in a folder, or one image, in and out. Knows PIL."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import numpy as np
import PIL.Image

from streamflow._files import replacing
from streamflow.image_utils import as_rgb, open_image
from streamflow.io.protocols import SUFFIXES, Sink, Source, SourceLost, TimedImage, check_rate

logger = logging.getLogger(__name__)


class FolderSource(Source):
    """The images of a folder in the order of their names (2 before 10), or one image.

    path: the folder or file. rate: frames a second, from which `pts` follows. loop: begin again at the end. A file that
    cannot be read is left out, and named in the log once.

    Raises, from open: FileNotFoundError where there is no such path or no image in it; from read: SourceLost where none
    of its files can be read.
    """

    def __init__(self, path: str | Path, rate: float = 30, loop: bool = False) -> None:
        check_rate(rate)
        self.path, self.rate, self.loop = Path(path), rate, loop
        self._paths: list[Path] | None = None
        self._next = self._count = self._in_a_row = 0
        self._broken: set[Path] = set()

    def open(self) -> None:
        if not self.path.exists():
            raise FileNotFoundError(f"no such file or folder: {self.path}")
        found = [self.path] if self.path.is_file() else sorted(self.path.iterdir(), key=_natural)
        paths = [path for path in found if path.suffix.lower() in SUFFIXES]
        if not paths:
            raise FileNotFoundError(f"no image in {self.path}: known are {', '.join(SUFFIXES)}")
        self._paths, self._next, self._count, self._in_a_row = paths, 0, 0, 0
        self._broken.clear()

    def read(self) -> TimedImage | None:
        if self._paths is None:
            raise RuntimeError(f"{self.path} is not open: call open() first")
        while self.loop or self._next < len(self._paths):
            path = self._paths[self._next % len(self._paths)]
            self._next += 1
            try:
                pixels = read_image(path)
            except (OSError, ValueError) as error:
                self._leave_out(path, error, len(self._paths))
                continue
            image = TimedImage(pixels, time.monotonic(), self._count / self.rate)
            self._count, self._in_a_row = self._count + 1, 0
            return image
        return None

    def _leave_out(self, path: Path, error: Exception, count: int) -> None:
        if path not in self._broken:
            self._broken.add(path)
            logger.warning("%s is left out: %s", path, error)
        self._in_a_row += 1
        if self._in_a_row == count:
            raise SourceLost(f"none of the {count} images in {self.path} can be read: {error}") from error

    def close(self) -> None:
        self._paths = None


class FolderSink(Sink):
    """Writes frame_000000.png and on, after what is there already. suffix: the format, one that PIL writes. A file has its
    name only once it is complete."""

    def __init__(self, path: str | Path, suffix: str = ".png") -> None:
        if suffix not in SUFFIXES:
            raise ValueError(f"unknown suffix {suffix!r}: choose one of {', '.join(SUFFIXES)}")
        self.path, self.suffix, self._next = Path(path), suffix, 0

    def open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        taken = [re.fullmatch(r"frame_(\d+)", path.stem) for path in self.path.iterdir()]
        self._next = 1 + max((int(match[1]) for match in taken if match), default=-1)

    def write(self, image: TimedImage) -> None:
        readers = self.path.stat().st_mode & 0o666  # whoever can read the folder can read its files
        with replacing(self.path / f"frame_{self._next:06d}{self.suffix}", readers, durable=False) as file:
            PIL.Image.fromarray(image.pixels).save(file, PIL.Image.registered_extensions()[self.suffix])
        self._next += 1

    def close(self) -> None:
        pass


def read_image(path: Path) -> np.ndarray:
    """An image file's pixels, uint8 `[H, W, 3]`, read by `streamflow.image_utils.open_image`."""
    return np.array(as_rgb(open_image(path)))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
