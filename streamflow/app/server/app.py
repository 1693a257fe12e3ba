"""The web application: the page, tickets, the viewers' sockets, health and metrics. Wires the other parts together."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from fastapi import FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from streamflow._files import Json
from streamflow.app.config import Settings
from streamflow.app.server.admission import Admission, Refusal, Unused
from streamflow.app.server.messages import DrawRequest, changed
from streamflow.app.server.metrics import Metrics
from streamflow.app.server.safety import COME_BACK, Bucket, Guard, Rates, Refusals, check_binding, visitor_of
from streamflow.app.server.session import Pools, Session, Viewer
from streamflow.app.server.settings import UNUSED
from streamflow.app.server.slot import LOADING, about_models, check_control_net, first_request, takes_negative
from streamflow.app.server.tokens import Holder, Tokens
from streamflow.app.server.video import VideoWorker, check_settings, open_model
from streamflow.app.server.whip import Streams, add_endpoints
from streamflow.app.server.worker import Worker
from streamflow.app.video_model import check_images
from streamflow.models.loading import is_video

if TYPE_CHECKING:
    from streamflow.app.server.webrtc import Peer

NAMES = ("page.html", "page.css", "page.js", "source.js", "link.js", "webrtc.js")
FILES = {name: Path(__file__).with_name(name) for name in NAMES}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
TRIES = 2.0  # wrong tokens a second, of one visitor
PROTOCOL = "streamflow"
TICKET_TRIES = 10  # a tenth of a second apart, for a holder with unused tickets
STOP_WITHIN = 2.0  # seconds for the current turn when the server ends


class Service:
    """All parts of one server."""

    def __init__(self, settings: Settings, tokens: Tokens, opened: Callable = open_model):
        check_binding(settings.server, tokens)
        if unused := [name for name in UNUSED if getattr(settings, name) != Settings.model_fields[name].default]:
            raise ValueError(f"the page does not use {', '.join(unused)} (viewers choose the steps): leave it out")
        self.video = is_video(settings.model)
        (check_settings if self.video else check_images)(settings)
        check_control_net(settings)
        try:
            first_request(settings)
        except ValidationError as error:
            wrong = "; ".join(f"{one['loc'][0]}: {one['msg']}" for one in error.errors(include_url=False))
            raise ValueError(f"the page cannot show these settings: {wrong}") from None
        self.settings, self.server, self.tokens = settings, settings.server, tokens
        self.metrics = Metrics()
        opening = partial(opened, settings, self._note_progress)
        self.worker = VideoWorker(opening, self.metrics, settings) if self.video else Worker(opening, self.metrics)
        self._began = time.monotonic()
        self._opening: Json = {"state": LOADING, "done": 0, "of": 1}
        self.refusals = Refusals(self.metrics)
        self.admission = self.admission_of(self.server.max_viewers)
        self.make_peer: Callable[[Viewer], Peer] | None = None  # where WebRTC is on and installed
        self.streams: Streams | None = None  # of WHIP and WHEP, there too
        self.pools = Pools()
        self.viewers: set[Viewer] = set()
        self.wrong_tokens = Rates(TRIES, 10)
        self.leaving = False
        gauge = self.metrics.gauge
        gauge("viewers", "viewers there are", lambda: self.admission.inside)
        gauge("queue_age_seconds", "how long the oldest image waits to be drawn", self._queue_age)
        gauge("memory_bytes", "of the process", lambda: psutil.Process().memory_info().rss)
        if torch.cuda.is_available():
            gauge("cuda_memory_bytes", "of tensors on the GPU", torch.cuda.memory_allocated)

    def admission_of(self, slots: int) -> Admission:
        """Admission to so many slots. Where there are several tokens, each holder's quota is an equal share by default."""
        share = max(1, slots // len(self.tokens)) if len(self.tokens) > 1 else None
        return Admission(slots, streams=self.server.streams_per_user or share)

    @property
    def request(self) -> DrawRequest:
        """What a new viewer starts with."""
        return self.worker.request if isinstance(self.worker, VideoWorker) else first_request(self.settings)

    @property
    def state(self) -> str:
        """ "ready", or the reason why not."""
        if self.leaving:
            return "shutting down"
        if self.worker.failed is not None:
            return "the model cannot be opened"
        if self.worker.ready.is_set() and self.worker.is_alive():
            return "ready"
        if self.worker.restarts == 0:
            return self._opening["state"]
        return "the model's thread has ended" + ("; it is restarting" if self.worker.is_alive() else "")

    def _note_progress(self, phase: str, done: int, of: int) -> None:
        self._opening = {"state": phase, "done": done, "of": of}

    @property
    def status(self) -> Json:
        """The state, and while the model is opened: how many parts of the phase are done, of how many, after how long."""
        state, opening = self.state, self._opening
        if state != opening["state"]:
            return {"state": state}
        return {**opening, "seconds": round(time.monotonic() - self._began, 1)}

    def _queue_age(self) -> float:
        waiting = [since for one in self.viewers if (since := one.waiting_since) is not None]
        return time.monotonic() - min(waiting) if waiting else 0.0

    def holder(self, request: Request) -> Holder:
        """The token's holder. HTTPException 401 for a wrong token, and 429 for too many of them from one visitor."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        found = self.tokens.holder(token.strip() if kind.lower() == "bearer" else "")
        if found is not None:
            return found
        self.refusals("token")
        if not self.wrong_tokens.take(visitor_of(request.scope, self.server.behind_proxy)):
            raise HTTPException(429, "too many wrong tokens", {"retry-after": str(COME_BACK)})
        raise HTTPException(401, "a token is required: Authorization: Bearer ...", {"www-authenticate": "Bearer"})

    @property
    def control(self) -> bool:
        """Whether a control net steers all images."""
        return self.settings.controlnet.maker is not None

    def changed(self, request: DrawRequest, fields: object) -> DrawRequest:
        """A viewer's request with these fields replaced, within the limits of this server. BadMessage."""
        return changed(request, fields, self.worker.models, self.server.max_steps, self.control)

    def enter(self, holder: Holder) -> Holder:
        """Occupy a session slot without a ticket. Raises Refusal."""
        entered = self.admission.enter(self.admission.ticket(holder))
        assert entered is not None, "a new ticket is good"
        return entered

    def welcome(self, holder: Holder, request: DrawRequest) -> Viewer:
        """A new viewer of a holder that has entered, with its `welcome` message queued."""
        worker, server = self.worker, self.server
        viewer = Viewer(worker, self.metrics, request, (Bucket(server.max_fps, 2), *self.admission.pace(holder)))
        width, height = worker.size
        ice_servers = [one.model_dump() for one in server.ice_servers]
        limits = {
            "max_steps": server.max_steps,
            "max_fps": server.max_fps,
            "guided": self.settings.cfg_type != "none",
            "negative": takes_negative(self.settings),
            "video": self.video,
            "control": self.control,
            "webrtc": None if self.make_peer is None else {"ice_servers": ice_servers},
        }
        shown = {"width": width, "height": height, "styled": [name for name, check in worker.style_checks.items() if check]}
        about = about_models(self.settings)
        viewer.post(type="welcome", settings=request.model_dump(), models=worker.models, about=about, limits=limits, **shown)
        self.viewers.add(viewer)
        worker.add(viewer)
        return viewer

    def leave(self, holder: Holder, viewer: Viewer | None) -> None:
        """Free the holder's slot, and remove its viewer."""
        self.admission.leave(holder)
        if viewer is not None:
            self.viewers.discard(viewer)
            self.worker.remove(viewer)

    async def stop(self) -> None:
        """End the WebRTC connections, the current turn, and the model's thread."""
        self.leaving = True
        if self.streams is not None:
            await self.streams.close()
        self.worker.stop()
        self.pools.shutdown()
        if self.worker.is_alive():
            await asyncio.to_thread(self.worker.join, STOP_WITHIN)

    def ended(self, timeout: float) -> bool:
        """Whether the threads of the model and of images end within so many seconds."""
        deadline = time.monotonic() + timeout
        threads = [one for one in threading.enumerate() if one is self.worker or one.name.startswith("server ")]
        for one in threads:
            one.join(max(0.0, deadline - time.monotonic()))
        return not any(one.is_alive() for one in threads)


def create_app(service: Service) -> Guard:
    """The ASGI application; its start opens the model in the model's thread."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.stop()

    app = FastAPI(title="StreamFlow", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _health(app, service)
    _tickets(app, service)
    _sockets(app, service)
    add_endpoints(app, service)
    _pages(app)  # last, since "/{name}" takes whatever is left
    return Guard(app, service.server, service.refusals)


# No endpoint is a plain function: FastAPI would run it in a thread, and the event loop waits while a thread starts.
def _pages(app: FastAPI) -> None:
    contents = {name: path.read_bytes() for name, path in FILES.items()}

    @app.get("/")
    async def page() -> Response:
        return await file("page.html")

    @app.get("/{name}")
    async def file(name: str) -> Response:
        if name not in contents:
            raise HTTPException(404)
        return Response(contents[name], media_type=KINDS[Path(name).suffix])


def _health(app: FastAPI, service: Service) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        alive = service.worker.is_alive() or service.worker.restarts == 0
        return JSONResponse({"state": "live" if alive else service.state}, 200 if alive else 503)

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> Response:
        status = service.status
        return JSONResponse(status, 200 if status["state"] == "ready" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.holder(request)
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _tickets(app: FastAPI, service: Service) -> None:
    @app.post("/session")
    async def session(request: Request, page: bool = False) -> Response:
        """page: true for the page, which learns with status 200 that it must wait: a browser logs others as errors."""
        if page and service.tokens and "authorization" not in request.headers:
            service.refusals("no token")  # of a page that has just been opened, beside "token" for wrong ones
            return JSONResponse({"state": "token required"})
        holder = service.holder(request)
        status = service.status
        if status["state"] != "ready":
            return JSONResponse({"message": status["state"], **status}, 200 if page else 503, {"retry-after": "1"})
        try:
            return JSONResponse({"ticket": await _ticket(service.admission, holder)})
        except Refusal as refusal:
            service.refusals("full")
            refused = {"message": refusal.message, "state": "waiting for a slot"}
            return JSONResponse(refused, 200 if page else 429, {"retry-after": str(refusal.retry_after)})


async def _ticket(admission: Admission, holder: Holder) -> str:
    """A ticket, once the holder has used its others: several tabs may be opened at the same time. Raises Refusal."""
    for _ in range(TICKET_TRIES):
        try:
            return admission.ticket(holder)
        except Unused:
            await asyncio.sleep(0.1)
    return admission.ticket(holder)


def _sockets(app: FastAPI, service: Service) -> None:
    @app.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        offered = [one.strip() for one in socket.headers.get("sec-websocket-protocol", "").split(",")]
        holder = service.admission.enter(offered[1]) if len(offered) == 2 and offered[0] == PROTOCOL else None
        if holder is None:
            service.refusals("ticket")
            return await socket.close(1008)
        viewer = None
        try:
            await socket.accept(PROTOCOL)
            viewer = service.welcome(holder, service.request)
            await Session(socket, viewer, service).run()
        finally:
            service.leave(holder, viewer)
