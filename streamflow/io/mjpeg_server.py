"""MJPEG over HTTP out: a page of this machine that browsers, OBS and VLC open. Knows the standard library and PIL."""

from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import PIL.Image

from streamflow.io.picture import Picture, Sink

HERE = ("127.0.0.1", "localhost", "::1")
BOUNDARY = "frame"


class MjpegSink(Sink):
    """Serves the newest picture to up to `viewers` at http://host:port/; no viewer makes another wait.

    host: this machine only, unless `allow_remote=True`: whoever reaches the port then sees the pictures, unencrypted.
    port: 0 takes a free one, which `port` says after `open`. quality: JPEG's, 1 to 95.

    Raises ValueError for a host that others reach without `allow_remote`; OSError from open where the port is taken.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 8080, quality: int = 85, viewers: int = 8, allow_remote: bool = False
    ) -> None:
        if host not in HERE and not allow_remote:
            raise ValueError(f"{host!r} is reachable by others: use 127.0.0.1, or say allow_remote=True")
        if not 1 <= quality <= 95 or viewers < 1:
            raise ValueError(f"quality {quality} (1 to 95) and viewers {viewers} (at least 1)")
        self.host, self.port, self.quality, self.viewers = host, port, quality, viewers
        self._server: _Server | None = None

    def open(self) -> None:
        self.close()
        self._server = _Server((self.host, self.port), self.viewers)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="mjpeg", daemon=True)
        self._thread.start()

    def write(self, picture: Picture) -> None:
        if self._server is None:
            raise RuntimeError("the server is not open: call open() first")
        data = io.BytesIO()
        PIL.Image.fromarray(picture.pixels).save(data, "JPEG", quality=self.quality)
        self._server.show(data.getvalue())

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.finish()
            server.shutdown()
            self._thread.join()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def __init__(self, address: tuple[str, int], viewers: int) -> None:
        super().__init__(address, _Viewer)
        self.places = threading.BoundedSemaphore(viewers)
        self._changed, self._data, self._number, self._over = threading.Condition(), b"", 0, False

    def show(self, data: bytes) -> None:
        with self._changed:
            self._data, self._number = data, self._number + 1
            self._changed.notify_all()

    def finish(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def after(self, number: int) -> tuple[bytes, int] | None:
        """The newest picture once there is one after `number`; None when the serving ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._number > number)
            return None if self._over else (self._data, self._number)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that goes away is no error of ours."""


class _Viewer(BaseHTTPRequestHandler):
    timeout = 10  # seconds; a viewer that takes nothing gives its place back

    def do_GET(self) -> None:
        if not self.server.places.acquire(blocking=False):
            self.send_error(503, "all places are taken")
            return
        try:
            self._send()
        finally:
            self.server.places.release()

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

    def log_message(self, *arguments: Any) -> None:
        """Nothing: requests are not logged."""
