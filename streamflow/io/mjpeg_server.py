"""MJPEG over HTTP out: a page of this machine that browsers, OBS and VLC open. Knows the standard library and PIL."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import PIL.Image

from streamflow.io.device import Device
from streamflow.io.local_server import HERE, LocalHandler, LocalServer, allows_host
from streamflow.io.protocols import Sink, TimedImage

BOUNDARY = "frame"


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
        server.start(closing, "mjpeg")
        return server

    def write(self, image: TimedImage) -> None:
        server: _Server = self.handle
        data = io.BytesIO()
        PIL.Image.fromarray(image.pixels).save(data, "JPEG", quality=self.quality)
        server.show(data.getvalue())

    def allows(self, host: str) -> bool:
        """Whether a request for this Host, a name or address with or without a port, is for this server."""
        return allows_host(host, self.names, every_address=self.host not in HERE)


class _Server(LocalServer):
    def __init__(self, address: tuple[str, int], viewers: int, allows: Callable[[str], bool]) -> None:
        self._changed, self._data, self._number, self._over = threading.Condition(), b"", 0, False
        super().__init__(address, _Viewer, viewers, allows)

    def show(self, data: bytes) -> None:
        with self._changed:
            self._data, self._number = data, self._number + 1
            self._changed.notify_all()

    def finish(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        super().finish()

    def after(self, number: int) -> tuple[bytes, int] | None:
        """Wait for an image newer than `number`, and return it. None when the server ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._number > number)
            return None if self._over else (self._data, self._number)


class _Viewer(LocalHandler):
    server: _Server
    refusal = f"{LocalHandler.refusal}: see names of MjpegSink"

    def do_GET(self) -> None:
        self.answer(self._send)

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
