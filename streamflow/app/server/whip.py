"""WHIP and WHEP: programs publish a video by one HTTP request and get it restyled by another. Knows viewers and WebRTC
connections; aiortc, of the extra webrtc, is imported where WebRTC is on and installed."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from streamflow._files import Json
from streamflow.app.server.admission import Admission, Full, Refusal
from streamflow.app.server.messages import BadMessage, DrawRequest
from streamflow.app.server.safety import COME_BACK, Rates, visitor_of
from streamflow.app.server.session import NO_WEBRTC, VIDEO_PIXELS, Session, Viewer, max_pixels
from streamflow.app.server.tokens import Holder
from streamflow.app.server.worker import log_failure

if TYPE_CHECKING:
    import av

    from streamflow.app.server.app import Service
    from streamflow.app.server.webrtc import Peer

logger = logging.getLogger(__name__)
SDP = "application/sdp"
NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")
LIVE = "live"  # the name of a stream that was published without one
TRIES = 2.0  # offers a second, of one visitor
BURST = 10
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def has_webrtc() -> bool:
    """Whether the extra webrtc is installed. Where it is and cannot be imported, the reason is logged."""
    if find_spec("aiortc") is None:
        return False
    try:
        import streamflow.app.server.webrtc  # noqa: F401  # at the start: the event loop would wait for it later
    except ImportError as error:
        logger.warning("WebRTC is off, since aiortc cannot be imported: %s", error)
        return False
    return True


def make_peer(service: Service, viewer: Viewer) -> Peer:
    """A WebRTC connection that gives a viewer's video to be drawn, and shows what is drawn."""
    from streamflow.app.server.webrtc import Peer
    from streamflow.app.server.webrtc_media import Output

    loop = asyncio.get_running_loop()

    def take(frame: av.VideoFrame) -> None:
        loop.call_soon_threadsafe(viewer.offer, frame, None)

    most = max_pixels(service.server, service.worker, VIDEO_PIXELS)
    return Peer(service.server.ice_servers, Output(viewer.acknowledge), take, viewer.report, most)


@dataclass(frozen=True)
class Stream:
    """A published stream (kind "whip") or a player of one ("whep"), which a task runs. Its holder's name and its own."""

    kind: str
    holder: str
    name: str
    peer: Peer
    task: asyncio.Task[None]


class Streams:
    """What is published and read now, by the id in its resource's URL. A holder reads only streams of its own."""

    def __init__(self, service: Service, readers: Admission):
        self._service, self._readers = service, readers
        self._streams: dict[str, Stream] = {}

    def published(self, holder: Holder, name: str) -> Stream | None:
        """The holder's stream of this name."""
        found = (one for one in self._streams.values() if one.kind == "whip")
        return next((one for one in found if (one.holder, one.name) == (holder.name, name)), None)

    async def publish(self, holder: Holder, name: str, request: DrawRequest, offer: str) -> tuple[str, str]:
        """Restyle a client's video. Return (id, answer). Refusal, BadMessage, and KeyError for a name that is taken."""
        if self.published(holder, name) is not None:
            raise KeyError(name)
        service = self._service
        holder = service.enter(holder)
        viewer = service.welcome(holder, request)
        leave = partial(service.leave, holder, viewer)
        peer = make_peer(service, viewer)
        session = Session(peer, viewer, service, peer)

        async def run() -> None:
            watching = asyncio.ensure_future(peer.run())
            try:
                await session.run()
            finally:
                await watching

        return await self._answer("whip", holder, name, peer, offer, run, leave)

    async def read(self, holder: Holder, name: str, offer: str) -> tuple[str, str]:
        """Send a client the images of a stream. Return (id, answer). Refusal, BadMessage, KeyError: no such stream."""
        from streamflow.app.server.webrtc import Peer

        published = self.published(holder, name)
        if published is None:
            raise KeyError(name)
        entered = self._readers.enter(self._readers.ticket(holder))
        assert entered is not None, "a ticket is good at once"
        peer = Peer(self._service.server.ice_servers, published.peer.output)
        return await self._answer("whep", holder, name, peer, offer, peer.run, partial(self._readers.leave, holder))

    async def _answer(
        self,
        kind: str,
        holder: Holder,
        name: str,
        peer: Peer,
        offer: str,
        run: Callable[[], Awaitable[object]],
        leave: Callable[[], None],
    ) -> tuple[str, str]:
        """Answer an offer, and run its session in a task that ends with `leave`."""
        key = secrets.token_urlsafe(24)
        try:
            answer = await peer.negotiate(offer)
            if kind == "whip" and not peer.takes:
                raise BadMessage("the offer has no video that is sent, in VP8 or H.264")
            if kind == "whep" and not peer.sends:
                raise BadMessage("the offer has no video that is received, in VP8 or H.264")
            if kind == "whip" and self.published(holder, name) is not None:  # by another request meanwhile
                raise KeyError(name)
        except BaseException:
            leave()
            await peer.end("refused")
            raise

        async def run_and_leave() -> None:
            try:
                await run()
            except Exception as error:  # of one client; the others go on
                log_failure("a WebRTC session has failed", error)
            finally:
                del self._streams[key]
                leave()

        self._streams[key] = Stream(kind, holder.name, name, peer, asyncio.create_task(run_and_leave()))
        return key, answer

    async def end(self, kind: str, holder: Holder, key: str) -> bool:
        """End a stream or a player. Return whether the holder has it."""
        stream = self._streams.get(key)
        if stream is None or (stream.kind, stream.holder) != (kind, holder.name):
            return False
        await stream.peer.end("ended by its client")
        await asyncio.wait([stream.task])
        return True

    async def close(self) -> None:
        """End all."""
        streams = list(self._streams.values())
        await asyncio.gather(*(one.peer.end("the server shuts down") for one in streams))
        await asyncio.gather(*(one.task for one in streams), return_exceptions=True)


def fields_of(query: Mapping[str, str]) -> Json:
    """The settings of a request for images that a query gives, as in `prompt=a+fox&strength=0.5`."""
    fields: Json = {"mode": "image"}
    for name, text in query.items():
        field = DrawRequest.model_fields.get(name)
        number = field is not None and field.annotation in (int, float) and NUMBER.fullmatch(text)
        fields[name] = text if not number else float(text) if "." in text else int(text)
    return fields


async def other_method(allowed: str) -> Response:
    """Refuse a method. Candidates that follow an offer (PATCH) are not needed, since the answer has all."""
    raise HTTPException(405, f"only {allowed}", {"allow": allowed})


def add_endpoints(app: FastAPI, service: Service) -> None:
    """`POST /whip` and `POST /whep`, the resources that they answer with, and what other methods are answered."""
    for kind in ("whip", "whep"):
        for path, allowed in ((f"/{kind}", "POST"), (f"/{kind}/{{key}}", "DELETE")):
            others = [one for one in METHODS if one != allowed]
            app.add_api_route(path, partial(other_method, allowed), methods=others)

    if not (service.server.webrtc and has_webrtc()):

        @app.post("/whip")
        @app.post("/whep")
        async def absent() -> Response:
            raise HTTPException(501, NO_WEBRTC)

        return

    service.make_peer = partial(make_peer, service)
    streams = service.streams = Streams(service, service.admission_of(service.server.max_readers))
    tries = Rates(TRIES, BURST)

    async def offer_of(request: Request) -> tuple[Holder, str, str]:
        """(holder, stream's name, offer). HTTPException for a request that is refused."""
        holder = service.holder(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != SDP:
            raise HTTPException(415, f"an offer has the type {SDP}", {"accept": SDP})
        name = request.query_params.get("stream", LIVE)
        if not NAME.fullmatch(name):
            raise HTTPException(400, "stream: a name of 1 to 40 letters, digits, - and _")
        if not tries.take(visitor_of(request.scope, service.server.behind_proxy)):
            service.refusals("offers")
            raise HTTPException(429, "too many offers", {"retry-after": str(COME_BACK)})
        if (state := service.state) != "ready":
            raise HTTPException(503, state, {"retry-after": "1"})
        try:
            return holder, name, (await request.body()).decode()
        except (UnicodeDecodeError, ClientDisconnect):
            raise HTTPException(400, "an offer is whole, and UTF-8") from None

    def created(request: Request, key: str, answer: str) -> Response:
        response = Response(answer, 201, {"location": f"{request.url.path}/{key}"}, SDP)
        for one in service.server.ice_servers:
            login = f'; username="{one.username}"; credential="{one.credential}"; credential-type="password"'
            response.headers.append("link", f'<{one.url}>; rel="ice-server"{login if one.username else ""}')
        return response

    def refused(error: Refusal) -> HTTPException:
        service.refusals("full")
        status = 503 if isinstance(error, Full) else 429
        return HTTPException(status, error.message, {"retry-after": str(error.retry_after)})

    @app.post("/whip")
    async def whip(request: Request) -> Response:
        holder, name, offer = await offer_of(request)
        if service.video:
            raise HTTPException(400, "a video model draws its own video, and takes none")
        query = {one: text for one, text in request.query_params.items() if one != "stream"}
        try:
            wanted = service.changed(service.request, fields_of(query))
            return created(request, *await streams.publish(holder, name, wanted, offer))
        except Refusal as error:
            raise refused(error) from None
        except KeyError:
            raise HTTPException(409, f"the stream {name} is being published: end it, or add ?stream=NAME") from None
        except BadMessage as error:
            raise HTTPException(400, str(error)) from None

    @app.post("/whep")
    async def whep(request: Request) -> Response:
        holder, name, offer = await offer_of(request)
        try:
            return created(request, *await streams.read(holder, name, offer))
        except Refusal as error:
            raise refused(error) from None
        except KeyError:
            raise HTTPException(404, f"you publish no stream {name}", {"retry-after": str(COME_BACK)}) from None
        except BadMessage as error:
            raise HTTPException(400, str(error)) from None

    async def end(request: Request, key: str) -> Response:
        kind = request.url.path.split("/")[1]
        if not await streams.end(kind, service.holder(request), key):
            raise HTTPException(404)
        return Response(status_code=200)

    for kind in ("whip", "whep"):
        app.delete(f"/{kind}/{{key}}")(end)
