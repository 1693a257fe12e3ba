"""What passes through sources and sinks: a picture with its time, the two protocols, and what can go wrong.

Knows numpy and nothing else: no stream, no tensors, no kind of source.
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np

_IMPORTING = threading.Lock()  # cyndilib's modules import each other, and fail when two threads begin at once


class SourceLost(OSError):
    """A device or connection that is not there, or not there any more. `close()` and `open()` again resumes."""


class SinkLost(OSError):
    """A sink that ended by itself, such as a window that was closed."""


@dataclass(frozen=True, eq=False)
class Picture:
    """pixels: uint8 `[H, W, 3]`, RGB. time: seconds of `time.monotonic()` at capture. pts: seconds from the start of
    the file, None for what is live.

    Raises:
        TypeError: not an array of uint8.
        ValueError: another shape, or an empty picture.
    """

    pixels: np.ndarray
    time: float
    pts: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pixels, np.ndarray) or self.pixels.dtype != np.uint8:
            found = getattr(self.pixels, "dtype", type(self.pixels).__name__)
            raise TypeError(f"pixels are a numpy array of uint8, not {found}")
        if self.pixels.ndim != 3 or self.pixels.shape[2] != 3 or 0 in self.pixels.shape:
            raise ValueError(f"pixels are [H, W, 3], not {list(self.pixels.shape)}")


@runtime_checkable
class Source(Protocol):
    """Gives pictures. All three are called from one thread; `close` may be called twice, `open` again after it."""

    def open(self) -> None:
        """Get hold of the device or file; SourceLost or FileNotFoundError where there is none."""

    def read(self) -> Picture | None:
        """Wait for the next picture; None when there will be none; SourceLost when the device went away."""

    def close(self) -> None:
        """Let go of it."""


@runtime_checkable
class Sink(Protocol):
    """Takes pictures. All three are called from one thread; `close` may be called twice, `open` again after it."""

    def open(self) -> None:
        """Get hold of the device or file; what needs a picture's size waits for the first `write`."""

    def write(self, picture: Picture) -> None:
        """Take one picture; SinkLost when there is nobody left to show it to."""

    def close(self) -> None:
        """Finish and let go of it."""


def need(module: str, package: str) -> ModuleType:
    """The optional `module`, or ImportError with the command that brings it."""
    try:
        with _IMPORTING:
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): pip install {package}") from error


def check_rate(rate: float) -> None:
    """Raise ValueError unless this is a number of frames a second."""
    if not 0 < rate <= 1000:
        raise ValueError(f"a rate of {rate!r} frames a second: give one above 0 and up to 1000")


def rgba(pixels: np.ndarray) -> np.ndarray:
    """`[H, W, 3]` to contiguous `[H, W, 4]`, opaque."""
    full = np.full((*pixels.shape[:2], 4), 255, dtype=np.uint8)
    full[..., :3] = pixels
    return full
