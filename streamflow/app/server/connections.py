"""The server's connections: how many are open, how long each may take, and how much of one is parsed at once. Knows
sockets and uvicorn's protocols; no viewer and no model."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

from streamflow.app.server.safety import Bucket, visitor
from streamflow.app.server.session import TOO_MUCH
from streamflow.app.server.settings import Server

if TYPE_CHECKING:
    from starlette.types import ASGIApp

REQUEST_BYTES = 16_384  # of a request's head and body together; only offers of WebRTC have a body
SLICE = 4096  # bytes of a WebSocket that are parsed before its frames are counted
FRAMES_PER_MESSAGE = 5  # frames a second that are allowed for each message a second
FRAGMENTS = 1024  # frames of one message
PING_SECONDS = 10.0  # between two pings, and for the answer to one
CLOSE_SECONDS = 5.0  # for a connection to close once the server has ended it
BACKLOG = 64  # connections that the event loop accepts at once
DRAIN_SECONDS = 1  # for open requests when the server ends
MALFORMED: dict[int, str] = {CloseCode.INVALID_DATA: "invalid UTF-8", CloseCode.MESSAGE_TOO_BIG: "large message"}


class Connections:
    """Open connections. A connection is half-open until the head of its request has arrived, and again after the
    response. Used in the event loop only.

    A new connection is always accepted while half-open ones can make room: where its address has more than
    `max_half_open_per_address` of them (not behind a proxy, which is one address for all), or the server has more than
    `max_connections` connections, the oldest half-open one is closed.
    """

    def __init__(self, server: Server, refused: Callable[[str], None]):
        self._server, self.refused = server, refused
        self._open: dict[object, Connection] = {}
        self._half_open: dict[object, Connection] = {}  # the oldest first

    @property
    def half_open(self) -> int:
        """How many connections have not made their request."""
        return len(self._half_open)

    @property
    def seconds(self) -> float:
        """Time for the head of a request, and for its response."""
        return self._server.request_seconds

    def add(self, connection: Connection) -> None:
        """Count an accepted connection. BlockingIOError: all connections are in use, and it was closed."""
        self._open[connection.peer] = self._half_open[connection.peer] = connection
        same = [one for one in self._half_open.values() if one.address == connection.address]
        if len(same) > self._server.max_half_open_per_address and not self._server.behind_proxy:
            self._end(same[0])
        elif len(self._open) > self._server.max_connections:
            oldest = next(iter(self._half_open.values()))
            self._end(oldest)
            if oldest is connection:
                connection.close()
                raise BlockingIOError("all connections are in use")

    def _end(self, connection: Connection) -> None:
        self.refused("half-open connection")
        self.remove(connection)
        with suppress(OSError):  # the other side may have closed it
            connection.shutdown(socket.SHUT_RDWR)  # the event loop reads the end of the stream, and closes it

    def remove(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        if self._open.get(connection.peer) is connection:
            del self._open[connection.peer]
            self._half_open.pop(connection.peer, None)

    def started(self, peer: object) -> None:
        """The head of a request has arrived."""
        self._half_open.pop(peer, None)

    def finished(self, peer: object) -> None:
        """The response was sent; the next request may come."""
        if peer in self._open:
            self._half_open[peer] = self._open[peer]


class Connection(socket.socket):
    """An accepted socket, counted until it is closed."""

    def __init__(self, accepted: socket.socket, peer: Any, connections: Connections):
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self.peer, self.address, self._connections = peer, visitor(peer[0]), connections

    def close(self) -> None:
        """Close it, and count it no longer."""
        self._connections.remove(self)
        super().close()


class Listener(socket.socket):
    """A listening socket whose connections are counted from the moment they are accepted, before any TLS handshake.
    OSError: the address cannot be bound."""

    def __init__(self, host: str, port: int, connections: Connections):
        super().__init__(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self._connections = connections
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.bind((host, port))
            self.listen(BACKLOG)  # connections wait until the event loop runs
        except OSError as error:
            self.close()
            raise OSError(f"the server cannot listen at {host}:{port}: {error}") from error

    def accept(self) -> tuple[socket.socket, object]:
        """The next connection and its peer. BlockingIOError: there is none, or all connections are in use."""
        accepted, peer = super().accept()
        connection = Connection(accepted, peer, self._connections)
        self._connections.add(connection)
        return connection, peer


class EventLoop(asyncio.SelectorEventLoop):
    """The event loop that calls the listener's accept. A TLS handshake has `handshake_seconds`, not asyncio's 60."""

    def __init__(self, handshake_seconds: float):
        super().__init__()
        self._handshake_seconds = handshake_seconds

    async def create_server(self, *given: Any, ssl: Any = None, **named: Any) -> Any:
        """As asyncio's, with the time for a TLS handshake."""
        seconds = self._handshake_seconds if ssl else None
        return await super().create_server(*given, ssl=ssl, ssl_handshake_timeout=seconds, **named)


class HttpProtocol(H11Protocol):
    """uvicorn's protocol with limits. One request has `Connections.seconds` to arrive, the same to be answered, and
    `REQUEST_BYTES` in all; whatever takes longer or sends more is closed, however it drips."""

    def __init__(self, connections: Connections, **given: Any):
        super().__init__(**given)
        self._limits, self._received = connections, 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """From here on its time counts."""
        super().connection_made(transport)
        self._peer = transport.get_extra_info("peername")
        self._restart_timer()

    def _restart_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._limits.seconds, self._end, "slow request")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self, reason: str) -> None:
        self._limits.refused(reason)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse a part of the stream, within the limits."""
        self._received += len(data)
        if self._received > REQUEST_BYTES:
            return self._end("large request")
        super().data_received(data)

    def handle_events(self) -> None:
        """Handle what was parsed, within the limits."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._limits.started(self._peer)
            self._restart_timer()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be parsed."""
        self._limits.refused("malformed request")
        if self.cycle is not None and not self.cycle.response_complete:
            return self.transport.abort()  # two responses to one request would mix
        super().send_400_response(msg)

    def on_response_complete(self) -> None:
        """The next request may come."""
        self._received = 0
        self._limits.finished(self._peer)
        self._restart_timer()
        super().on_response_complete()  # last, since it may start the next request

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over to the WebSocket's protocol."""
        self._limits.started(self._peer)
        self._stop_timer()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Its time counts no longer."""
        self._stop_timer()
        super().connection_lost(exc)


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol with limits on the time of a handshake and of a close, on the frames a second, empty ones and
    pings included, and on the frames of one message. Connections that are ended for what they sent are counted, and logged
    by `Refusals` only."""

    def __init__(self, connections: Connections, messages_per_second: float, **given: Any):
        super().__init__(**given)
        rate = FRAMES_PER_MESSAGE * messages_per_second
        self._limits, self._frames = connections, Bucket(rate, 2 * rate)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """From here on its time counts."""
        super().connection_made(transport)
        self.loop.call_later(self._limits.seconds, self._check_handshake)

    def _check_handshake(self) -> None:
        if not self.handshake_complete:
            self._limits.refused("slow request")
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse a part of the stream, within the limits."""
        for start in range(0, len(data), SLICE):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + SLICE])
            if self.conn.handshake_exc is not None:
                self._limits.refused("malformed handshake")
                self.transport.write(b"".join(self.conn.data_to_send()))
                return self.transport.close()

    def handle_events(self) -> None:
        """Handle what was parsed, within the limits."""
        frames = sum(isinstance(one, Frame) for one in self.conn.events)
        if frames and not self._frames.take(frames):
            return self._fail("frames a second")
        super().handle_events()
        if len(self.frames) > FRAGMENTS:
            self._fail("frames of one message")

    def _fail(self, what: str) -> None:
        self.conn.fail(TOO_MUCH, f"too many {what}")
        self._end(what)

    def _end(self, reason: str) -> None:
        self._limits.refused(reason)
        if self.conn.close_sent is None:  # before the handshake is complete, when no close frame can be sent
            return self.transport.abort()
        super().handle_parser_exception()

    def send_receive_event_to_app(self) -> None:
        """Give a message to the application. Text that is not UTF-8 ends the connection; uvicorn would log a traceback."""
        try:
            if self.curr_msg_data_type == "text" and not self.close_sent:
                b"".join(self.frames).decode()
        except UnicodeDecodeError:
            self.frames = []
            self.conn.fail(CloseCode.INVALID_DATA, "a text message is UTF-8")
            return self.handle_parser_exception()
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """End a connection whose frames cannot be parsed."""
        sent = self.conn.close_sent
        self._end(MALFORMED.get(sent.code, "malformed frame") if sent else "malformed frame")

    def keepalive_timeout(self) -> None:
        """End a connection that answers no ping."""
        super().keepalive_timeout()
        self.transport.abort()  # a close would wait for a buffer that nobody reads

    async def run_asgi(self) -> None:
        """Run the application, and see that the connection closes after it."""
        await super().run_asgi()
        self.loop.call_later(CLOSE_SECONDS, self.transport.abort)


def uvicorn_config(app: ASGIApp, server: Server, connections: Connections) -> uvicorn.Config:
    """What uvicorn is run with, for a `Listener` of the same connections."""
    return uvicorn.Config(
        app,
        loop=partial(EventLoop, server.request_seconds),  # type: ignore[arg-type]  # factories, which uvicorn calls
        http=partial(HttpProtocol, connections),  # type: ignore[arg-type]
        ws=partial(WebSocketProtocol, connections, server.max_messages_per_second),  # type: ignore[arg-type]
        backlog=BACKLOG,
        h11_max_incomplete_event_size=REQUEST_BYTES,
        ws_max_size=server.max_message_bytes,
        ws_per_message_deflate=False,  # images are compressed, and a small message could grow
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PING_SECONDS,
        ssl_certfile=server.tls_certificate,
        ssl_keyfile=server.tls_key,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="error",  # what is refused is logged by Refusals
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
