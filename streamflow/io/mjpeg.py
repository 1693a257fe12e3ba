"""MJPEG over HTTP in: what IP cameras and phones' camera apps send. Knows the standard library and PIL."""

from __future__ import annotations

import http.client
import io
import socket
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from urllib.parse import urlsplit

import numpy as np

from streamflow.image_utils import as_rgb, open_image
from streamflow.io.deadline import DeadlineReader
from streamflow.io.device import DeviceSource
from streamflow.io.protocols import SourceLost, as_source_lost

LARGEST = 16 * 2**20  # bytes of one JPEG
HEAD = 2**17  # bytes of what comes before it
MOST_PIXELS = 4096 * 4096
LINES = 32  # of a part's head


class MjpegSource(DeviceSource):
    """A multipart stream of JPEGs at an http or https address, each part with a Content-Length. timeout: seconds for the
    answer, and for each image.

    Raises SourceLost where nobody answers, the stream ends or what comes is no JPEG within 16 MiB and 4096x4096;
    ValueError for an address that is none.
    """

    def __init__(self, url: str, timeout: float = 5) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"{url!r}: an address begins with http:// or https://, then a host and a port that is not 0")
        super().__init__(url, timeout)
        self.url = url

    def _open(self, closing: ExitStack) -> object:
        with as_source_lost(f"{self.url} does not answer"):
            answer = _opener().open(self.url, timeout=self.timeout)
        closing.callback(answer.close)
        kind, coding = answer.headers.get_content_type(), answer.headers.get("Content-Encoding", "identity")
        if not kind.startswith("multipart/") or coding.lower() != "identity":
            raise SourceLost(f"{self.url} sends {kind} (encoding {coding}), not a multipart stream of JPEGs")
        return answer

    def _pixels(self, handle: _Response) -> np.ndarray:
        handle.reader.restart(self.timeout, LARGEST + HEAD)
        length = self._length(handle)
        if not 0 < length <= LARGEST:
            raise SourceLost(f"{self.url} announced an image of {length} bytes: 1 to {LARGEST} are taken")
        data = handle.read(length)
        if len(data) < length:
            raise SourceLost(f"{self.url} has ended after {len(data)} of {length} bytes of an image")
        return np.array(as_rgb(open_image(data, formats=("JPEG",), max_pixels=MOST_PIXELS)))

    def _length(self, answer: _Response) -> int:
        """The Content-Length of the next part, whose head is read."""
        length = None
        for _ in range(LINES):
            line = answer.readline(1024)
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

    def __init__(self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None) -> None:
        super().__init__(sock, debuglevel, method, url)
        self.reader = DeadlineReader(sock, self.fp.detach(), sock.gettimeout() or 0.0, LARGEST)
        self.fp = io.BufferedReader(self.reader)


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """HTTP and HTTPS with `_Response`."""

    def do_open(
        self, http_class: Callable[..., http.client.HTTPConnection], req: urllib.request.Request, **options: object
    ) -> http.client.HTTPResponse:
        def connection(*arguments: object, **named: object) -> http.client.HTTPConnection:
            made = http_class(*arguments, **named)
            made.response_class = _Response
            return made

        return super().do_open(connection, req, **options)


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
