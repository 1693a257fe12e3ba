"""What the TouchDesigner kit sends and receives: OSC messages, the list of knobs, and images of the MJPEG page.

Knows sockets, and numpy and OpenCV, which TouchDesigner has; no operator. So it runs in any Python from 3.9 on. In
TouchDesigner it is a Text DAT of this name, beside those that import it.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import urllib.request
from contextlib import closing, suppress
from urllib.parse import urlsplit

HEAD_SIZE, IMAGE_SIZE = 2**14, 2**26  # bytes of a part's head and of an image, at most
MOST = 3.4e38  # of a float32
TIMEOUT, PAUSE = 5.0, 1.0  # seconds without data until a connection is given up, and until the next attempt


def encode(address, *values):
    """An OSC message: numbers as float32 or int32, texts as UTF-8.

    What converts to a float is sent as one, such as a channel of a CHOP. ValueError: an address that does not begin with
    "/", or a number that is not finite in float32. TypeError: another kind of value.
    """
    if not address.startswith("/"):
        raise ValueError(f"an OSC address begins with '/', not {address!r}")
    tags, data = ",", b""
    for value in values:
        if isinstance(value, bool):
            raise TypeError(f"{address} takes numbers and texts, not {value!r}")
        if isinstance(value, str):
            tags, data = tags + "s", data + _padded(value)
        elif isinstance(value, int) and -(2**31) <= value < 2**31:
            tags, data = tags + "i", data + struct.pack(">i", value)
        elif hasattr(value, "__float__"):
            try:
                number = float(value)
            except OverflowError:
                number = float("inf")
            if not abs(number) < MOST:  # NaN too
                raise ValueError(f"{address} takes a number that is finite in float32, not {number}")
            tags, data = tags + "f", data + struct.pack(">f", number)
        else:
            raise TypeError(f"{address} takes numbers and texts, not {value!r}")
    return _padded(address) + _padded(tags) + data


def _padded(text):
    """A text of OSC: it ends with a zero byte, and its length is a multiple of 4."""
    data = text.encode()
    if b"\0" in data:
        raise ValueError(f"a text of OSC has no zero byte, and {text!r} has one")
    return data + b"\0" * (4 - len(data) % 4)


class Sender:
    """Sends OSC messages to `streamflow live` at a host and a UDP port. Nothing says whether they arrive."""

    def __init__(self, host="127.0.0.1", port=9000):
        self.target = host, port
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)

    def send(self, address, *values):
        """Send one message. Errors as those of `encode`; OSError: the host is not known, or a text is too long."""
        self._socket.sendto(encode(address, *values), self.target)

    def close(self):
        """Close the socket."""
        self._socket.close()


def fetch_knobs(port=9001, host="127.0.0.1"):
    """What the page of controls knows (`streamflow live --osc-page 9001`): `["osc"]["port"]`, and `["osc"]["addresses"]`, a
    list of dicts with address, field, type ("number", "integer" or "text"), source (what the knob sends at its ends), range
    (the field's values there), value (the field's present one), at (what the knob sends there).

    OSError: the page does not answer.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    with opener.open(f"http://{host}:{port}/osc.json", timeout=TIMEOUT) as answer:
        return json.load(answer)


class Frames:
    """Receives the images of `streamflow live --out mjpeg:8080` in a thread, and keeps the newest one. A connection that is
    lost is made again after a second. error: why there is none, as a text; None while images come."""

    def __init__(self, url="http://127.0.0.1:8080/"):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"the address of the page is such as http://127.0.0.1:8080/, not {url!r}")
        self.url, self._host, self._port, self._path = url, parts.hostname, parts.port or 80, parts.path or "/"
        self.error = "no image has come yet"
        self._data, self._lock, self._ended = None, threading.Lock(), threading.Event()
        self._socket = None
        self._thread = threading.Thread(target=self._run, name="streamflow frames", daemon=True)
        self._thread.start()

    def newest(self):
        """The newest image that was not returned before, RGBA, uint8 `[H, W, 4]`, its first row at the bottom, as
        TouchDesigner's TOPs have them. None where there is none, or where it is no image, which `error` says then."""
        with self._lock:
            data, self._data = self._data, None
        if data is None:
            return None
        import cv2
        import numpy

        pixels = cv2.imdecode(numpy.frombuffer(data, numpy.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            self.error = f"{self.url} has sent {len(data):,} bytes that are no image"
            return None
        return numpy.ascontiguousarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGBA)[::-1])

    def close(self):
        """Stop receiving. The thread has ended when this returns."""
        self._ended.set()
        if self._socket is not None:
            with suppress(OSError):  # it has ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT + 1)

    def _run(self):
        while not self._ended.is_set():
            try:
                with closing(http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT)) as connection:
                    connection.request("GET", self._path)
                    self._socket = connection.sock
                    with closing(connection.getresponse()) as answer:
                        self._receive(answer)
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.error = f"{self.url}: {type(error).__name__}: {error}"
            self._ended.wait(PAUSE)

    def _receive(self, answer):
        if answer.status != 200 or answer.headers.get_content_type() != "multipart/x-mixed-replace":
            raise ValueError(f"it is no MJPEG page: {answer.status} {answer.reason}, {answer.headers.get_content_type()}")
        while not self._ended.is_set():
            size = self._size(answer)
            data = answer.read(size)
            if len(data) < size:
                raise ConnectionError("it has ended")
            with self._lock:
                self._data = data
            self.error = None

    @staticmethod
    def _size(answer):
        """Read the head of a part; the bytes of its image."""
        size = left = None
        for line in iter(lambda: answer.readline(HEAD_SIZE), b""):
            left = HEAD_SIZE - len(line) if left is None else left - len(line)
            if left < 0:
                break
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length":
                size = int(value)
            elif not line.strip() and size is not None:
                if not 0 < size <= IMAGE_SIZE:
                    raise ValueError(f"an image of {size} bytes")
                return size
        raise ConnectionError("it has ended, or a part has no Content-Length")
