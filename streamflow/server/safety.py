"""What keeps the server from harm: where it may bind, which pages may talk to it, how fast, and under which headers."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from streamflow.server.settings import Server
from streamflow.server.tokens import Tokens

HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "permissions-policy": "camera=(self), display-capture=(self), microphone=(), geolocation=()",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def check_binding(server: Server, tokens: Tokens) -> None:
    """ValueError unless the server may be reached where it binds: beyond this machine it needs tokens, and TLS or a proxy
    in front that ends TLS."""
    if is_loopback(server.host):
        return
    if not tokens:
        raise ValueError(
            f"{server.host} can be reached from other machines, and there are no tokens: give server.token_file, or "
            f"STREAMFLOW_TOKENS in the environment, or bind to 127.0.0.1"
        )
    if server.tls_certificate is None and not server.behind_proxy:
        raise ValueError(
            f"{server.host} can be reached from other machines, and tokens would travel in the clear: give "
            f"server.tls_certificate and server.tls_key, or --behind-proxy where a proxy ends TLS, or bind to 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """Which Host and Origin headers are let in. On this machine the host must be this machine's, so that no foreign name
    that resolves to 127.0.0.1 gets in; elsewhere tokens guard, and a page must be of the host it talks to."""

    def __init__(self, server: Server):
        self._local = is_loopback(server.host)
        self._listed = {netloc(one) for one in server.origins}

    def host_allowed(self, host: str | None) -> bool:
        """Whether a request for this Host is for us."""
        if not self._local:
            return bool(host)
        return host is not None and (host in self._listed or is_loopback(urlsplit(f"//{host}").hostname or ""))

    def origin_allowed(self, origin: str | None, host: str | None) -> bool:
        """Whether a page of this Origin may talk to us; None: no browser, or a page of our own."""
        return origin is None or netloc(origin) in self._listed or netloc(origin) == host


def netloc(origin: str) -> str:
    """host:port of an origin; an empty text where there is none, as in "null"."""
    return urlsplit(origin).netloc


class Bucket:
    """So many a second, and `burst` at once."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self._clock = rate, burst, clock
        self._left, self._at = burst, clock()

    def take(self) -> bool:
        """Whether one more is within the rate; then it counts."""
        if self.wait() > 0:
            return False
        self._left -= 1
        return True

    def wait(self) -> float:
        """Seconds until one more is within the rate."""
        now = self._clock()
        self._left, self._at = min(self.burst, self._left + (now - self._at) * self.rate), now
        return max(0.0, (1 - self._left) / self.rate)


class Guard:
    """ASGI: turns away what is not for us, and puts the headers on every answer."""

    def __init__(self, app: Callable, gate: Gate):
        self._app, self._gate = app, gate

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> Any:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            host, origin = headers.get("host"), headers.get("origin")
            allowed = self._gate.host_allowed(host) and self._gate.origin_allowed(origin, host)
        except ValueError:  # a header that is no address
            allowed = False
        if not allowed:
            return await _refuse(scope, send)

        async def with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        return await self._app(scope, receive, with_headers)


async def _refuse(scope, send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"this host or origin is not let in: see server.origins\n"})
