"""MJPEG over HTTP out: a page of this machine that browsers, OBS and VLC open. Knows the standard library and PIL."""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import PIL.Image

from streamflow.io.deadline import DeadlineReader
from streamflow.io.device import Device
from streamflow.io.protocols import Sink, TimedImage

HERE = ("127.0.0.1", "localhost", "::1")
BOUNDARY = "frame"
HEAD_SECONDS, HEAD_SIZE = 5.0, 2**16  # in which a request must be complete; its bytes
HALF_OPEN = 32  # connections whose request is not complete yet
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/@?#\[\]]+)(:\d{1,5})?")


class MjpegSink(Device, Sink):
    """Serves the newest image to up to `viewers` at http://host:port/; no viewer makes another wait.

    host: this machine only, unless `allow_remote=True`: whoever reaches the port then sees the images, unencrypted.
    port: 0 takes a free one, which `port` holds after `open`. quality: JPEG's, 1 to 95. names: further names of this machine
    that viewers may write in the address. localhost, IP addresses and `host` are allowed as they are; other names are
    refused, since a foreign page could make its own name lead here (DNS rebinding). Pages of other origins are refused too.

    Raises ValueError for a host that others reach without `allow_remote`; OSError from open where the port is taken.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8080,
        quality: int = 85,
        viewers: int = 8,
        allow_remote: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        if host not in HERE and not allow_remote:
            raise ValueError(f"{host!r} is reachable by others: use 127.0.0.1, or pass allow_remote=True")
        if not 1 <= quality <= 95 or viewers < 1:
            raise ValueError(f"quality {quality} (1 to 95) and viewers {viewers} (at least 1)")
        super().__init__("the MJPEG server")
        self.host, self.port, self.quality, self.viewers = host, port, quality, viewers
        self.names = ("localhost", host.lower(), *(name.lower() for name in names))

    def _open(self, closing: ExitStack) -> object:
        server = _Server((self.host, self.port), self.viewers, self.allows)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="mjpeg", daemon=True)
        thread.start()
        for step in (server.server_close, thread.join, server.shutdown, server.finish):  # the last one is the first
            closing.callback(step)
        return server

    def write(self, image: TimedImage) -> None:
        server: _Server = self.handle
        data = io.BytesIO()
        PIL.Image.fromarray(image.pixels).save(data, "JPEG", quality=self.quality)
        server.show(data.getvalue())

    def allows(self, host: str) -> bool:
        """Whether a request for this Host, a name or address with or without a port, is for this server."""
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].strip("[]").rstrip(".").lower()
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return address.is_loopback or self.host not in HERE


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, HALF_OPEN

    def __init__(self, address: tuple[str, int], viewers: int, allows: Callable[[str], bool]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.slots, self.allows = threading.BoundedSemaphore(viewers), allows
        self._changed, self._data, self._number, self._over = threading.Condition(), b"", 0, False
        self._half_open: dict[socket.socket, None] = {}  # oldest first
        super().__init__(address, _Viewer)

    def show(self, data: bytes) -> None:
        with self._changed:
            self._data, self._number = data, self._number + 1
            self._changed.notify_all()

    def finish(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
            half_open = list(self._half_open)
        for connection in half_open:
            _end(connection)

    def after(self, number: int) -> tuple[bytes, int] | None:
        """Wait for an image newer than `number`, and return it. None when the server ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._number > number)
            return None if self._over else (self._data, self._number)

    def process_request(self, request: socket.socket, client_address: object) -> None:
        """Answer in a thread. Where too many requests are incomplete, the oldest of them is given up."""
        with self._changed:
            oldest = next(iter(self._half_open)) if len(self._half_open) >= HALF_OPEN else None
            if oldest is not None:
                del self._half_open[oldest]
            self._half_open[request] = None
        if oldest is not None:
            _end(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        """End the connection."""
        self.complete(request)
        super().shutdown_request(request)

    def complete(self, request: socket.socket) -> None:
        """The request has been read, or its connection ends."""
        with self._changed:
            self._half_open.pop(request, None)

    def handle_error(self, request: object, client_address: object) -> None:
        """A viewer that goes away is no error of ours."""


def _end(connection: socket.socket) -> None:
    """Shut the connection down, so that a read in another thread returns."""
    with suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)


class _Viewer(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10  # seconds; after which a viewer that receives nothing is disconnected

    def setup(self) -> None:
        super().setup()
        reader = DeadlineReader(self.connection, self.rfile.detach(), HEAD_SECONDS, HEAD_SIZE)
        self.rfile = io.BufferedReader(reader)

    def do_GET(self) -> None:
        self.server.complete(self.connection)
        self.connection.settimeout(self.timeout)
        if not self._allowed():
            self.send_error(403, "this Host, or a page of another origin, is not allowed: see names of MjpegSink")
            return
        if not self.server.slots.acquire(blocking=False):
            self.send_error(503, "all viewer slots are taken")
            return
        try:
            self._send()
        finally:
            self.server.slots.release()

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        super().end_headers()

    def _allowed(self) -> bool:
        """Whether it is for this server, and no page of another origin asks. Programs other than browsers send no Origin."""
        hosts, origins = (self.headers.get_all(name, []) for name in ("Host", "Origin"))
        if len(hosts) != 1 or not self.server.allows(hosts[0].strip()):
            return False
        own = all(origin.lower() == f"http://{hosts[0].strip().lower()}" for origin in origins)
        return own and self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")

    def _send(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        number = 0
        while (found := self.server.after(number)) is not None:
            data, number = found
            head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            self.wfile.write(head.encode() + data + b"\r\n")

    def log_message(self, *arguments: object) -> None:
        """Nothing: requests are not logged."""
