"""MJPEG over HTTP in: what IP cameras and phones' camera apps send. Knows the standard library and PIL."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np

from streamflow.image_utils import as_rgb, open_image
from streamflow.io.picture import Picture, Source, SourceLost

LARGEST = 16 * 2**20  # bytes of one JPEG
MOST_PIXELS = 4096 * 4096
LINES = 32  # of a part's head


class MjpegSource(Source):
    """A multipart stream of JPEGs at an http or https address. timeout: seconds without an answer.

    Raises SourceLost where nobody answers, the stream ends or what comes is no JPEG within 16 MiB and 4096x4096.
    """

    def __init__(self, url: str, timeout: float = 5) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r}: an address begins with http:// or https://")
        self.url, self.timeout = url, timeout
        self._answer: Any = None

    def open(self) -> None:
        self.close()
        try:
            self._answer = urllib.request.urlopen(self.url, timeout=self.timeout)
        except OSError as error:
            raise SourceLost(f"{self.url} does not answer: {error}") from error
        kind = self._answer.headers.get_content_type()
        if not kind.startswith("multipart/"):
            self.close()
            raise SourceLost(f"{self.url} sends {kind}, not a multipart stream of JPEGs")

    def read(self) -> Picture:
        if self._answer is None:
            raise RuntimeError(f"{self.url} is not open: call open() first")
        try:
            data = self._part()
            image = open_image(data, formats=("JPEG",), max_pixels=MOST_PIXELS)
            return Picture(np.array(as_rgb(image)), time.monotonic())
        except SourceLost:
            raise
        except OSError as error:
            raise SourceLost(f"{self.url} was lost: {error}") from error

    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()
        self._answer = None

    def _part(self) -> bytes:
        length = self._length()
        if length is not None:
            if not 0 < length <= LARGEST:
                raise SourceLost(f"{self.url} announced a picture of {length} bytes: 1 to {LARGEST} are taken")
            data = self._answer.read(length)
            if len(data) == length:
                return data
        raise SourceLost(f"{self.url} has ended, or sends parts without a Content-Length")

    def _length(self) -> int | None:
        for _ in range(LINES):
            name, _, value = self._answer.readline(1024).partition(b":")
            if name.strip().lower() == b"content-length" and value.strip().isdigit():
                length = int(value)
                while self._answer.readline(1024).strip():
                    pass
                return length
        return None
