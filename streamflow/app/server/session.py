"""One viewer: its draw request, its input and its output. Only the newest image is kept in each direction, and nothing is
drawn that the viewer cannot receive yet. The socket's tasks run in the event loop, turns in the model's thread.

A session's messages come over a WebSocket or the data channel of a WebRTC connection. A session of a WebSocket may also have
a WebRTC connection, which then carries the images and those messages that are text."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import PIL.Image
from starlette.websockets import WebSocketDisconnect

from streamflow._files import Json
from streamflow.app.server import images, messages
from streamflow.app.server.images import CheckSize, Style
from streamflow.app.server.messages import BadMessage, DrawRequest
from streamflow.app.server.metrics import Metrics
from streamflow.app.server.safety import Bucket
from streamflow.app.server.settings import Server
from streamflow.app.server.slot import Drawn, Slot
from streamflow.app.server.worker import Worker

if TYPE_CHECKING:
    import av

    from streamflow.app.server.app import Service
    from streamflow.app.server.webrtc import Peer
    from streamflow.image_utils import Images

T = TypeVar("T")

WINDOW = 2  # images sent and not acknowledged by a viewer
GIF_FRAMES = 48
MAX_MISTAKES = 30  # invalid messages, after which the connection ends
TOO_MUCH, TOO_WRONG, FAILED = 4429, 4400, 4500
TOO_LARGE = 1009  # WebSocket's own code
GIF_EVERY = 2.0  # seconds
OVERSIZE = 16  # times the model's pixels, that an image may have
VIDEO_PIXELS = 1920 * 1088  # that a frame of a video may have in any case
OFFER_EVERY = 2.0  # seconds
NO_WEBRTC = "the server has no WebRTC: on its machine, pip install 'streamflow-rf[web,webrtc]', and leave server.webrtc on"


class Pools:
    """Thread pools for images, one for each purpose, so that none waits for another."""

    def __init__(self) -> None:
        self.decode = _started(2, "server decode")
        self.encode = _started(2, "server encode")
        self.gif = _started(1, "server gif")

    def shutdown(self) -> None:
        """Cancel the jobs that have not started. Running ones go on."""
        for pool in (self.decode, self.encode, self.gif):
            pool.shutdown(wait=False, cancel_futures=True)


def _started(count: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads already run, since the event loop would wait while one starts."""
    pool, all_run = ThreadPoolExecutor(count, name), threading.Barrier(count)
    for _ in range(count):
        pool.submit(all_run.wait)
    return pool


class Viewer:
    """One viewer: what the worker draws for it, and the state of its socket."""

    def __init__(self, worker: Worker, metrics: Metrics, request: DrawRequest, paces: tuple[Bucket, ...]):
        self._worker, self._metrics, self._paces = worker, metrics, paces
        self._loop = asyncio.get_running_loop()
        self.request, self.model = request, request.model
        self.used, self.gone = 0.0, False
        self.slot: Slot | None = None
        self.unacknowledged = 0
        self.image: tuple[Images, float, float | None] | None = None  # decoded, when it came, its stamp
        self.undecoded: tuple[bytes | av.VideoFrame, float, float | None] | None = None  # not yet decoded
        self.style: Style | None = None
        self.undecoded_style: bytes | None = None  # not yet decoded; empty: the style image is taken away
        self._out: Drawn | None = None
        self.texts: deque[str] = deque(maxlen=8)  # to be sent
        self.input_arrived, self.output_ready = asyncio.Event(), asyncio.Event()
        self.fatal = False

    # -- the model's thread, with the worker's lock held -----------------------------------------------------------------

    def ready(self) -> bool:
        """Whether an image can be sent to it now."""
        if self.gone or not self.request.running or self._out is not None or self.unacknowledged >= WINDOW:
            return False
        return all(pace.wait() == 0 for pace in self._paces)

    def due(self, now: float) -> bool:
        """Whether an image can be drawn for it now."""
        if self.request.mode == "image" and self.image is None:
            return False
        if self.slot is not None and self.slot.settled(self.request, self.style):
            return False
        return self.ready()

    def take(self) -> tuple[DrawRequest, Style | None, Images | None, float | None, float | None]:
        """The request, its style image and its input image, the input image's arrival and the viewer's own clock then."""
        for pace in self._paces:
            pace.take()
        if self.request.mode == "text":
            return self.request, self.style, None, None, None
        assert self.image is not None, "an image waits, or the viewer is not due"
        (image, entered, stamp), self.image = self.image, None
        return self.request, self.style, image, entered, stamp

    def show(self, drawn: Drawn) -> None:
        """Queue an image that was drawn for all viewers."""
        for pace in self._paces:
            pace.take()
        self.put(drawn)

    def follow(self, request: DrawRequest) -> None:
        """Take over what is drawn for all viewers, and show it on the page."""
        self.request = request.model_copy(update={"running": self.request.running})
        self.post(type="settings", settings=self.request.model_dump(), number=None, shared=True)

    def put(self, drawn: Drawn) -> None:
        """Queue a finished image."""
        self._out = drawn
        self._loop.call_soon_threadsafe(self.output_ready.set)

    def report(self, message: str, fatal: bool = False) -> None:
        """Queue an error message. fatal: its connection ends then."""
        self.post(type="error", message=message[:1000])
        if fatal:  # after its message, which is sent before the connection is closed
            self.fatal = True
            self._loop.call_soon_threadsafe(self.output_ready.set)

    # -- the event loop ---------------------------------------------------------------------------------------------------

    def post(self, **message: object) -> None:
        """Queue a message to be sent, from any thread. Of more than 8, the oldest are dropped."""
        self.texts.append(json.dumps(message))
        self._loop.call_soon_threadsafe(self.output_ready.set)

    def offer(self, image: bytes | av.VideoFrame, stamp: float | None) -> None:
        """Take an encoded image, or a frame of a video. It replaces one that waits to be decoded or scaled."""
        if self.undecoded is not None:
            self._metrics.count("drops", "in")
        self.undecoded = image, time.monotonic(), stamp
        self.input_arrived.set()

    def offer_style(self, data: bytes) -> None:
        """Take a style image's bytes, empty to take it away. They replace those that are not decoded yet."""
        self.undecoded_style = data
        self.input_arrived.set()

    def decoded(self, image: Images, entered: float, stamp: float | None) -> None:
        """Take a decoded image. It replaces one that is not drawn yet."""
        with self._worker.changing():
            if self.image is not None:
                self._metrics.count("drops", "in")
            self.image = image, entered, stamp

    def restyle(self, style: Style | None) -> None:
        """Draw with this style image from the next turn on."""
        with self._worker.changing():
            self.style = style

    def change(self, request: DrawRequest) -> None:
        """Use this request from the next turn on."""
        with self._worker.changing():
            self.request = request

    def acknowledge(self) -> None:
        """Note that the viewer has shown an image."""
        with self._worker.changing():
            self.unacknowledged = max(0, self.unacknowledged - 1)

    def next_out(self) -> Drawn | None:
        """The image to be sent, counted as unacknowledged from now on; None where there is none."""
        with self._worker.changing():
            drawn, self._out = self._out, None
            self.unacknowledged += drawn is not None
        return drawn

    @property
    def waiting_since(self) -> float | None:
        """When the oldest image that waits to be drawn arrived, or None."""
        waiting = [one[1] for one in (self.image, self.undecoded) if one is not None]
        return min(waiting, default=None)


class Socket(Protocol):
    """What a viewer's messages come and go by: Starlette's WebSocket, or a WebRTC connection with a data channel."""

    async def receive(self) -> MutableMapping[str, Any]:
        """The next message, as ASGI's `websocket.receive` or `websocket.disconnect`."""
        ...

    async def send_text(self, data: str) -> None:
        """Send a text message."""
        ...

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary message. BadMessage: it is too large."""
        ...

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """End the connection, with the reason."""
        ...


class Session:
    """A viewer's socket, from the `welcome` message to its end. peer: where the socket is a WebRTC connection, the same."""

    def __init__(self, socket: Socket, viewer: Viewer, service: Service, peer: Peer | None = None):
        self._socket, self._viewer, self._worker, self._server = socket, viewer, service.worker, service.server
        self._pools, self._metrics, self._refused = service.pools, service.metrics, service.refusals
        self._changed = service.changed
        rate = self._server.max_messages_per_second
        self._rate = Bucket(rate, 2 * rate)
        self._gifs = Bucket(1 / GIF_EVERY, 1)
        self._offers = Bucket(1 / OFFER_EVERY, 3)
        self._make_peer, self._peer = service.make_peer, peer
        self._watching: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self._mistakes = 0
        self._style_follows = False  # the next binary message is a style image
        self._kept: deque[bytes] = deque(maxlen=GIF_FRAMES)
        self._shown = deque(maxlen=GIF_FRAMES)  # when, for the GIF's pace

    async def run(self) -> None:
        """Run until the viewer disconnects, or the server ends its connection."""
        running = (self._receive(self._socket), self._decode(), self._send(), self._stopped.wait())
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(one) for one in running]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is not None and not isinstance(error, (WebSocketDisconnect, RuntimeError, OSError)):
                    raise error
        finally:
            tasks += self._watching
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._peer is not None:
                self._peer.output.close()
                await self._peer.end("the session has ended")

    async def _receive(self, socket: Socket) -> None:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if not self._rate.take():
                self._refused("flood")
                return await self._socket.close(TOO_MUCH, "too many messages a second")
            try:
                if (data := message.get("bytes")) is not None:
                    if len(data) > self._server.max_message_bytes:  # by a data channel; a WebSocket has ended before
                        self._refused("large message")
                        return await self._socket.close(TOO_LARGE, f"at most {self._server.max_message_bytes} bytes")
                    self._take_bytes(data)
                elif messages.longer(message["text"], self._server.max_text_bytes):
                    self._refused("large text")
                    return await self._socket.close(TOO_LARGE, f"a text is at most {self._server.max_text_bytes} bytes")
                else:
                    await self._handle(messages.read(message["text"]))
            except BadMessage as error:
                if await self._mistake(error):
                    return
            await asyncio.sleep(0)  # other tasks run between two messages

    async def _mistake(self, error: BadMessage) -> bool:
        """Report an invalid message. Return whether the connection was ended because there were too many."""
        self._metrics.count("refused", "message")
        self._mistakes += 1
        if self._mistakes > MAX_MISTAKES:
            await self._socket.close(TOO_WRONG, "too many invalid messages")
            return True
        self._viewer.post(type="error", message=str(error))
        return False

    def _take_bytes(self, data: bytes) -> None:
        if not self._style_follows:
            stamp, image = images.split(data)
            return self._viewer.offer(image, stamp)
        self._style_follows = False
        if not data:
            raise BadMessage("a style image's message is empty")
        self._viewer.offer_style(data)

    async def _control_image(self, drawn: Drawn) -> None:
        if drawn.control is not None:
            data = await self._in_pool(self._pools.encode, images.jpeg, drawn.control)
            await self._socket.send_bytes(packed({"type": "control"}, data))

    async def _handle(self, message: Json) -> None:
        if message["type"] not in HANDLERS:
            raise BadMessage(f"type: choose one of {', '.join(HANDLERS)}")
        await HANDLERS[message["type"]](self, message)

    async def _set(self, message: Json) -> None:
        new = self._changed(self._viewer.request, message.get("settings"))
        number = messages.number_of(message)
        self._viewer.change(new)
        self._viewer.post(type="settings", settings=new.model_dump(), number=number)

    async def _offer(self, message: Json) -> None:
        """sdp: an offer of WebRTC. number: repeated in the answer, a message "answer" with its sdp. While the connection is
        there, images go by it, and text messages by its data channel. At its end comes a message "webrtc", and the socket is
        used again. A further offer of the same connection changes it, and one of another connection takes its place."""
        if self._make_peer is None:
            raise BadMessage(NO_WEBRTC)
        number = messages.number_of(message)
        if not isinstance(offer := message.get("sdp"), str):
            raise BadMessage("sdp: an offer of WebRTC")
        if not self._offers.take():
            raise BadMessage(f"at most one offer every {OFFER_EVERY:g} seconds")
        peer = self._peer
        if peer is None or not (peer is self._socket or peer.continues(offer)):
            peer = self._make_peer(self._viewer)
        try:
            answer = await peer.negotiate(offer)
        except BadMessage:
            if peer is not self._peer:
                await peer.end("the offer was refused")
            raise
        if peer is not self._peer:
            replaced, self._peer = self._peer, peer
            watching = asyncio.create_task(self._watch(peer))
            self._watching.add(watching)
            watching.add_done_callback(self._watching.discard)
            if replaced is not None:
                replaced.refuse("another connection has taken its place")
        self._viewer.post(type="answer", sdp=answer, number=number)

    async def _watch(self, peer: Peer) -> None:
        """Use a WebRTC connection beside the socket until it ends."""
        messages = asyncio.ensure_future(self._receive(peer))
        messages.add_done_callback(lambda _: peer.connected and self._stopped.set())  # a flood, or too many mistakes
        try:
            reason = await peer.run()
        finally:
            messages.cancel()
            await asyncio.gather(messages, return_exceptions=True)
        peer.output.close()
        if peer is self._peer:
            self._peer = None
            self._viewer.post(type="webrtc", state="ended", message=reason)

    async def _acknowledge(self, message: Json) -> None:
        self._viewer.acknowledge()

    async def _style(self, message: Json) -> None:
        """image: true before the binary message that is the style image, without a clock; false takes the style image away.
        The answer is a binary message of this type with the style image in use as a JPEG, empty where there is none."""
        if not isinstance(message.get("image"), bool):
            raise BadMessage("image: true before a style image's message, or false to take the style image away")
        self._style_follows = message["image"]
        if not self._style_follows:
            self._viewer.offer_style(b"")

    async def _gif(self, message: Json) -> None:
        if not self._kept:
            raise BadMessage("no image has been drawn yet")
        if not self._gifs.take():
            raise BadMessage(f"at most one GIF every {GIF_EVERY:g} seconds")
        span = (self._shown[-1] - self._shown[0]) / max(1, len(self._shown) - 1)
        data = await self._in_pool(self._pools.gif, images.gif, tuple(self._kept), max(20, min(500, round(1000 * span))))
        await self._socket.send_bytes(packed({"type": "gif"}, data))

    async def _decode(self) -> None:
        while True:
            await self._viewer.input_arrived.wait()
            self._viewer.input_arrived.clear()
            for decode in (self._decode_style, self._decode_image):
                try:
                    await decode()
                except BadMessage as error:
                    if await self._mistake(error):
                        return

    async def _decode_image(self) -> None:
        if self._viewer.undecoded is not None:
            (data, entered, stamp), self._viewer.undecoded = self._viewer.undecoded, None
            if isinstance(data, bytes):
                image = await self._decoded(data)
            else:
                from streamflow.app.server.webrtc_media import fitted

                image = await self._in_pool(self._pools.decode, fitted, data, *self._worker.size)
            self._viewer.decoded(image, entered, stamp)

    async def _decode_style(self) -> None:
        viewer = self._viewer
        data, viewer.undecoded_style = viewer.undecoded_style, None
        if data is None:
            return
        image = None
        if data:
            check = self._worker.style_checks.get(viewer.request.model)
            if check is None:
                raise BadMessage(f"model: {viewer.request.model} takes no style image")
            image = await self._decoded(data, check)
        viewer.restyle(None if image is None else Style(image))
        shown = b"" if image is None else await self._in_pool(self._pools.encode, images.jpeg, np.asarray(image))
        await self._socket.send_bytes(packed({"type": "style"}, shown))

    async def _decoded(self, data: bytes, check: CheckSize | None = None) -> PIL.Image.Image:
        width, height = self._worker.size
        most = max_pixels(self._server, self._worker)
        return await self._in_pool(self._pools.decode, images.decode, data, most, width, height, check)

    async def _send(self) -> None:
        viewer = self._viewer
        while True:
            await viewer.output_ready.wait()
            viewer.output_ready.clear()
            while viewer.texts:
                await self._send_text(viewer.texts.popleft())
            if viewer.fatal:
                return await self._socket.close(FAILED, "drawing failed repeatedly")
            if (drawn := viewer.next_out()) is not None:
                try:
                    await self._control_image(drawn)
                except BadMessage as error:
                    if await self._mistake(error):
                        return
                await self._image(drawn)

    async def _send_text(self, text: str) -> None:
        """By the data channel where there is one, else by the socket."""
        peer = self._peer
        await (self._socket if peer is None or not peer.open else peer).send_text(text)

    async def _image(self, drawn: Drawn) -> None:
        """Send an image: as a frame of the video of a WebRTC connection with its header as a text, or as a JPEG after it."""
        peer = self._peer
        if peer is None or not (peer is self._socket or (peer.connected and peer.sends)):
            await self._socket.send_bytes(packed(self._header(drawn), await self._jpeg(drawn)))
        else:
            peer.output.show(drawn.pixels)
            if peer.open or peer is not self._socket:
                await self._jpeg(drawn)
                await self._send_text(json.dumps(self._header(drawn)))
        self._metrics.count("frames")
        self._metrics.observe("end_to_end_seconds", time.monotonic() - drawn.entered)

    async def _jpeg(self, drawn: Drawn) -> bytes:
        """An image as a JPEG, which is kept for a GIF."""
        data = await self._in_pool(self._pools.encode, images.jpeg, drawn.pixels)
        self._kept.append(data)
        self._shown.append(time.monotonic())
        return data

    def _header(self, drawn: Drawn) -> Json:
        age = round(1000 * (time.monotonic() - drawn.entered), 1)
        return {"type": "image", "frame": drawn.frame, "ring": drawn.ring, "stamp": drawn.stamp, "age_ms": age}

    async def _in_pool(self, pool: Executor, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


HANDLERS = {
    "set": Session._set,
    "ack": Session._acknowledge,
    "gif": Session._gif,
    "style": Session._style,
    "offer": Session._offer,
}


def max_pixels(server: Server, worker: Worker, least: int = 0) -> int:
    """Pixels of one image of a viewer: `OVERSIZE` times the model's or `least`, and never above the server's limit."""
    width, height = worker.size
    return min(server.max_image_pixels, max(least, OVERSIZE * width * height))


def packed(header: Json, data: bytes) -> bytes:
    """A binary message: the header's length in four bytes, the header as JSON, the data."""
    text = json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text + data
