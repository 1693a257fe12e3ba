"""A small HTTP server for this machine's browsers and programs. Knows the standard library; no images, no page.

It bounds the requests that are read and answered at once, and refuses pages of other origins and foreign host names.
"""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Container
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from streamflow.io.deadline import DeadlineReader

HERE = ("127.0.0.1", "localhost", "::1")
HEAD_SECONDS, HEAD_SIZE = 5.0, 2**16  # in which a request must be complete; its bytes
HALF_OPEN = 32  # connections whose request is not complete yet
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/@?#\[\]]+)(:\d{1,5})?")


def allows_host(host: str, names: Container[str], every_address: bool = False) -> bool:
    """Whether a request for this Host, with or without a port, is for a server of these names. A loopback address always is.

    every_address: any other IP address is too. Other names are not, since a foreign page could make its own name lead here
    (DNS rebinding).
    """
    found = HOST.fullmatch(host)
    if found is None:
        return False
    name = found[1].strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return address.is_loopback or every_address


class LocalServer(ThreadingHTTPServer):
    """Answers up to `slots` requests at once, in threads. allows: whether a Host is this server's.

    Raises OSError where the port is taken.
    """

    daemon_threads, block_on_close, request_queue_size = True, False, HALF_OPEN

    def __init__(
        self, address: tuple[str, int], handler: type[LocalHandler], slots: int, allows: Callable[[str], bool]
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.slots, self.allows = threading.BoundedSemaphore(slots), allows
        self._open_lock = threading.Lock()
        self._half_open: dict[socket.socket, None] = {}  # oldest first
        super().__init__(address, handler)

    def start(self, closing: ExitStack, name: str) -> None:
        """Serve in a thread of this name. What ends it goes into `closing`."""
        thread = threading.Thread(target=self.serve_forever, args=(0.05,), name=name, daemon=True)
        thread.start()
        for step in (self.server_close, thread.join, self.shutdown, self.finish):  # the last one is the first
            closing.callback(step)

    def finish(self) -> None:
        """End the connections whose request is not complete."""
        with self._open_lock:
            half_open = list(self._half_open)
        for connection in half_open:
            _end(connection)

    def process_request(self, request: socket.socket, client_address: object) -> None:
        """Answer in a thread. Where too many requests are incomplete, the oldest of them is given up."""
        with self._open_lock:
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
        with self._open_lock:
            self._half_open.pop(request, None)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error of ours."""


def _end(connection: socket.socket) -> None:
    """Shut the connection down, so that a read in another thread returns."""
    with suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)


class LocalHandler(BaseHTTPRequestHandler):
    """One request. A subclass calls `answer` with what sends the response. refusal: of a foreign Host or page."""

    server: LocalServer
    refusal = "this Host, or a page of another origin, is not allowed"
    timeout = 10  # seconds; after which a client that receives nothing is disconnected

    def setup(self) -> None:
        """Limit the time and the size of the request."""
        super().setup()
        reader = DeadlineReader(self.connection, self.rfile.detach(), HEAD_SECONDS, HEAD_SIZE)
        self.rfile = io.BufferedReader(reader)

    def answer(self, send: Callable[[], None]) -> None:
        """Call `send`, once the request is complete, or refuse it: 403 for a foreign Host or page, 503 without a slot."""
        self.server.complete(self.connection)
        self.connection.settimeout(self.timeout)
        if not self.is_allowed():
            self.send_error(403, self.refusal)
            return
        if not self.server.slots.acquire(blocking=False):
            self.send_error(503, "all slots are taken")
            return
        try:
            send()
        finally:
            self.server.slots.release()

    def end_headers(self) -> None:
        """End the head of the response."""
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        super().end_headers()

    def is_allowed(self) -> bool:
        """Whether it is for this server, and no page of another origin asks. Programs other than browsers send no Origin."""
        hosts, origins = (self.headers.get_all(name, []) for name in ("Host", "Origin"))
        if len(hosts) != 1 or not self.server.allows(hosts[0].strip()):
            return False
        own = all(origin.lower() == f"http://{hosts[0].strip().lower()}" for origin in origins)
        return own and self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")

    def log_message(self, *arguments: object) -> None:
        """Nothing: requests are not logged."""
