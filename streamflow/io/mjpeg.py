"""MJPEG over HTTP in: what IP cameras and phones' camera apps send. Knows the standard library and PIL."""

from __future__ import annotations

import http.client
import io
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from streamflow.image_utils import as_rgb, open_image
from streamflow.io.deadline import DeadlineReader
from streamflow.io.protocols import Source, SourceLost, TimedImage, as_source_lost

LARGEST = 16 * 2**20  # bytes of one JPEG
HEAD = 2**17  # bytes of what comes before it
MOST_PIXELS = 4096 * 4096
LINES = 32  # of a part's head


class MjpegSource(Source):
    """A multipart stream of JPEGs at an http or https address, each part with a Content-Length. timeout: seconds for the
    answer, and for each image.

    Raises SourceLost where nobody answers, the stream ends or what comes is no JPEG within 16 MiB and 4096x4096;
    ValueError for an address that is none.
    """

    def __init__(self, url: str, timeout: float = 5) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"{url!r}: an address begins with http:// or https://, then a host and a port that is not 0")
        self.url, self.timeout = url, timeout
        self._answer: Any = None

    def open(self) -> None:
        self.close()
        with as_source_lost(f"{self.url} does not answer"):
            self._answer = _opener().open(self.url, timeout=self.timeout)
        kind, coding = self._answer.headers.get_content_type(), self._answer.headers.get("Content-Encoding", "identity")
        if not kind.startswith("multipart/") or coding.lower() != "identity":
            self.close()
            raise SourceLost(f"{self.url} sends {kind} (encoding {coding}), not a multipart stream of JPEGs")

    def read(self) -> TimedImage:
        if self._answer is None:
            raise RuntimeError(f"{self.url} is not open: call open() first")
        with as_source_lost(f"{self.url} was lost"):
            self._answer.reader.restart(self.timeout, LARGEST + HEAD)
            image = open_image(self._part(), formats=("JPEG",), max_pixels=MOST_PIXELS)
            return TimedImage(np.array(as_rgb(image)), time.monotonic())

    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()
        self._answer = None

    def _part(self) -> bytes:
        length = self._length()
        if not 0 < length <= LARGEST:
            raise SourceLost(f"{self.url} announced an image of {length} bytes: 1 to {LARGEST} are taken")
        data = self._answer.read(length)
        if len(data) < length:
            raise SourceLost(f"{self.url} has ended after {len(data)} of {length} bytes of an image")
        return data

    def _length(self) -> int:
        """The Content-Length of the next part, whose head is read."""
        length = None
        for _ in range(LINES):
            line = self._answer.readline(1024)
            if not line:
                raise SourceLost(f"{self.url} has ended")
            if not line.strip() and length is not None:
                return length
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length":
                length = int(value)
        raise SourceLost(f"{self.url} sent {LINES} lines without the head of an image that has a Content-Length")


class _Response(http.client.HTTPResponse):
    """Read through `reader`, whose limits hold for the head already."""

    def __init__(self, sock: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.reader = DeadlineReader(sock, self.fp.detach(), sock.gettimeout(), LARGEST)
        self.fp = io.BufferedReader(self.reader)


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """HTTP and HTTPS with `_Response`."""

    def do_open(self, http_class: Any, request: urllib.request.Request, **options: Any) -> Any:
        def connection(*arguments: object, **named: object) -> http.client.HTTPConnection:
            made = http_class(*arguments, **named)
            made.response_class = _Response
            return made

        return super().do_open(connection, request, **options)


def _opener() -> urllib.request.OpenerDirector:
    """As `urllib.request.urlopen`, for HTTP and HTTPS only, redirects included."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _Handler,
    ):
        opener.add_handler(handler())
    return opener
