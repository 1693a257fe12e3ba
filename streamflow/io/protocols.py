"""An image with its time, the protocols of sources and sinks, and their errors.

Knows numpy, imported on use, and nothing else: no stream, no tensors, no kind of source.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # of image files
_IMPORTING = threading.Lock()  # cyndilib's modules import each other, and fail when two threads begin at once


class SourceLost(OSError):
    """A device or connection that is missing or was lost. `close()` and `open()` resume it."""


class InvalidSource(ValueError):
    """A source that can never be read, such as a monitor that does not exist. Opening it again does not help."""


class SinkLost(OSError):
    """The user ended the sink, such as by closing its window: it is not opened again."""


@dataclass(frozen=True, eq=False)
class TimedImage:
    """pixels: uint8 `[H, W, 3]`, RGB. time: seconds of `time.monotonic()` at capture. pts: seconds from the start of
    the file, None for what is live.

    Raises:
        TypeError: not an array of uint8.
        ValueError: another shape, or an empty image.
    """

    pixels: np.ndarray
    time: float
    pts: float | None = None

    def __post_init__(self) -> None:
        import numpy as np

        if not isinstance(self.pixels, np.ndarray) or self.pixels.dtype != np.uint8:
            found = getattr(self.pixels, "dtype", type(self.pixels).__name__)
            raise TypeError(f"pixels are a numpy array of uint8, not {found}")
        if self.pixels.ndim != 3 or self.pixels.shape[2] != 3 or 0 in self.pixels.shape:
            raise ValueError(f"pixels are [H, W, 3], not {list(self.pixels.shape)}")


@runtime_checkable
class Source(Protocol):
    """Gives images. All three are called from one thread; `close` may be called twice, `open` again after it."""

    def open(self) -> None:
        """Open the device or file.

        SourceLost: it is not available now. FileNotFoundError, InvalidSource: it does not exist.
        """

    def read(self) -> TimedImage | None:
        """Wait for the next image. None at the end; SourceLost when the device was lost."""

    def close(self) -> None:
        """Close it."""


@runtime_checkable
class Sink(Protocol):
    """Takes images. All three are called from one thread; `close` may be called twice, `open` again after it."""

    def open(self) -> None:
        """Open the device or file. A sink that needs the size of the images waits for the first `write`."""

    def write(self, image: TimedImage) -> None:
        """Take one image; SinkLost when the user has ended the sink."""

    def close(self) -> None:
        """Finish the output and close it."""


@contextmanager
def as_source_lost(what: str) -> Iterator[None]:
    """Raise SourceLost for every error that a library raises in the block. FileNotFoundError, ImportError and InvalidSource
    stay what they are. what: the source, for the message."""
    try:
        yield
    except (SourceLost, FileNotFoundError, ImportError, InvalidSource):
        raise
    except Exception as error:  # which errors a driver or a decoder raises is not documented
        raise SourceLost(f"{what}: {type(error).__name__}: {error}") from error


def need(module: str, package: str) -> ModuleType:
    """The optional `module`, or ImportError with the command that brings it."""
    try:
        with _IMPORTING:
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): pip install {package}") from error


def check_rate(rate: float | Fraction) -> None:
    """Raise ValueError unless this is a number of frames a second."""
    if not 0 < rate <= 1000:
        raise ValueError(f"a rate of {rate!r} frames a second: give one above 0 and up to 1000")


def rgba(pixels: np.ndarray) -> np.ndarray:
    """`[H, W, 3]` to contiguous `[H, W, 4]`, opaque."""
    import numpy as np

    full = np.full((*pixels.shape[:2], 4), 255, dtype=np.uint8)
    full[..., :3] = pixels
    return full
