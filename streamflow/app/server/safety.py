"""Protection of the server: where it may bind, which pages may connect, request rates, and response headers."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from streamflow.app.server.metrics import Metrics
from streamflow.app.server.settings import Server, normal_origin
from streamflow.app.server.tokens import Tokens

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)
LOG_SECONDS = 10.0  # between two lines about what was refused
ADDRESSES = 4096  # of which the rates are kept
COME_BACK = 5  # seconds, in Retry-After
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
    """ValueError unless the server may be reached where it binds: behind a proxy it needs tokens, and beyond this machine
    tokens and TLS, or a proxy in front that ends TLS."""
    local = is_loopback(server.host)
    if local and not server.behind_proxy:
        return
    reached = f"{server.host} can be reached from other machines{' through the proxy' if local else ''}"
    if not tokens:
        raise ValueError(
            f"{reached}, and there are no tokens: give server.token_file, or STREAMFLOW_TOKENS in the environment, or "
            f"{'leave out --behind-proxy' if local else 'bind to 127.0.0.1'}"
        )
    if server.tls_certificate is None and not server.behind_proxy:
        raise ValueError(
            f"{reached}, and tokens would travel in the clear: give "
            f"server.tls_certificate and server.tls_key, or --behind-proxy where a proxy ends TLS, or bind to 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """Which Host and Origin headers are let in. On this machine the host must be this machine's, so that no foreign name
    that resolves to 127.0.0.1 gets in; elsewhere, and behind a proxy, tokens guard, and a page must be of the host it talks
    to."""

    def __init__(self, server: Server):
        self._local = is_loopback(server.host) and not server.behind_proxy
        self._listed = {normal for one in server.origins if (normal := normal_origin(one))}

    def host_allowed(self, host: str | None) -> bool:
        """Whether a request for this Host is for this server."""
        if host is None or normal_origin(f"http://{host}") is None:
            return False
        schemes = {one.partition("://")[0] for one in self._listed}
        listed = any(normal_origin(f"{scheme}://{host}") in self._listed for scheme in schemes)
        return not self._local or listed or is_loopback(re.sub(r":[0-9]+\Z", "", host))

    def origin_allowed(self, origin: str | None, host: str | None) -> bool:
        """Whether a page of this Origin may connect; None: no browser, or a page of this server."""
        if origin is None:
            return True
        normal = normal_origin(origin)
        own = {normal_origin(f"{scheme}://{host}") for scheme in ("http", "https")}
        return normal is not None and (normal in self._listed or normal in own)


def visitor(address: str) -> str:
    """What a visitor is counted by: its IPv4 address, or the first 64 bits of its IPv6 address, all of which one
    connection to the internet has. ValueError: no address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


_HOP = re.compile(r"\[([^\]]+)\](?::[0-9]+)?|([0-9.]+):[0-9]+")  # [IPv6], [IPv6]:port or IPv4:port


def visitor_of(scope: Scope, behind_proxy: bool) -> str:
    """The visitor of an ASGI scope: the peer's, or behind a proxy that of the last hop in X-Forwarded-For, which the proxy
    adds, with or without a port; what stands before it was sent by the visitor and is not read."""
    peer = scope["client"][0] if scope.get("client") else "127.0.0.1"
    hops = [value for name, value in scope["headers"] if name == b"x-forwarded-for"] if behind_proxy else []
    last = hops[-1].decode("latin-1").rpartition(",")[2].strip() if hops else peer
    if with_port := _HOP.fullmatch(last):
        last = with_port[1] or with_port[2]
    try:
        return visitor(last)
    except ValueError:
        return visitor(peer)


class Refusals:
    """Counts what is refused, and logs it in one line every `LOG_SECONDS` at most. Used in the event loop only."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic):
        self._metrics, self._clock = metrics, clock
        self._kinds: Counter[str] = Counter()
        self._logged = -LOG_SECONDS

    def __call__(self, kind: str) -> None:
        """One more of a kind, a text of the server's own."""
        self._metrics.count("refused", kind)
        self._kinds[kind] += 1
        if self._clock() - self._logged >= LOG_SECONDS:
            self._logged = self._clock()
            logger.warning("refused: %s", ", ".join(f"{n} x {kind}" for kind, n in self._kinds.items()))
            self._kinds.clear()


class Bucket:
    """A token bucket: `rate` a second, and up to `burst` at once."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self._clock = rate, burst, clock
        self._left, self._at = burst, clock()

    def take(self, count: int = 1) -> bool:
        """Whether so many more are within the rate; then they count."""
        if self.wait(count) > 0:
            return False
        self._left -= count
        return True

    def wait(self, count: int = 1) -> float:
        """Seconds until so many more are within the rate."""
        now = self._clock()
        self._left, self._at = min(self.burst, self._left + (now - self._at) * self.rate), now
        return max(0.0, (count - self._left) / self.rate)


class Rates:
    """A `Bucket` for each visitor; of more than `ADDRESSES`, the one that was used last longest ago is forgotten."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self._make = lambda: Bucket(rate, burst, clock)
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, address: str) -> bool:
        """Whether one more of this visitor is within its rate; then it counts."""
        bucket = self._buckets.setdefault(address, self._make())
        self._buckets.move_to_end(address)
        if len(self._buckets) > ADDRESSES:
            self._buckets.popitem(last=False)
        return bucket.take()


class Guard:
    """ASGI: refuses foreign hosts and origins, and a visitor with too many requests and sockets at once; puts the headers on
    every response."""

    def __init__(self, app: ASGIApp, server: Server, refused: Callable[[str], None]):
        self._app, self._gate, self._refused = app, Gate(server), refused
        self._behind_proxy = server.behind_proxy
        self._most = server.max_connections_per_address or server.max_viewers + 16
        self._active: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host"), headers.get("origin")
        if not (self._gate.host_allowed(host) and self._gate.origin_allowed(origin, host)):
            self._refused("host or origin")
            return await _refuse(scope, send, 403, "this host or origin is not allowed: see server.origins")
        address = visitor_of(scope, self._behind_proxy)
        if self._active[address] >= self._most:
            self._refused("connections of one address")
            return await _refuse(scope, send, 429, f"this address has {self._most} connections in use: close one")

        async def with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        self._active[address] += 1
        try:
            return await self._app(scope, receive, with_headers)
        finally:
            self._active[address] -= 1
            if not self._active[address]:
                del self._active[address]


async def _refuse(scope: Scope, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
    headers = [(b"content-type", b"text/plain"), (b"retry-after", str(COME_BACK).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{message}\n".encode()})
