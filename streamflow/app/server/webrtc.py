"""A WebRTC connection of one client: offers and answers, the data channel, and its end. It is a `Socket` of a session, and
takes and sends video beside it. Knows aiortc; no viewer and no model."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import av
from aiortc import (
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCPeerConnection,
    RTCRtpTransceiver,
    RTCSessionDescription,
)
from aiortc.rtp import RtcpRtpfbPacket

from streamflow._files import Json
from streamflow.app.server.messages import BadMessage
from streamflow.app.server.safety import Bucket
from streamflow.app.server.settings import IceServer
from streamflow.app.server.webrtc_media import Decoder, Output, OutputTrack

logger = logging.getLogger(__name__)
MAX_MEDIA = 4  # media of an offer
MAX_VIDEOS = 2  # of them
MAX_CANDIDATES = 32
CONNECT_SECONDS = 10.0  # from the answer until the connection must be there
SILENT_SECONDS = 10.0  # without any packet, after which a client is gone
LOOK_SECONDS = 0.5  # between two looks at the connection
LARGEST = {"extmap": 255, "sctp-port": 65_535}  # numbers of an offer that aiortc packs without a check
MAX_PACKETS = 2500  # a second, that a client may send
MAX_RESENT = 1000.0  # packets a second, that a client may ask for again
RESENT_AT_ONCE = 128  # the packets that aiortc keeps
MAX_SOURCES = 16  # RTP streams (SSRC) of a video that arrives; aiortc reports on 31 at most
MAX_CHUNKS = 512  # of messages of data channels that have not arrived whole, and as many channels
MAX_QUEUED = 1024  # messages of a client that wait; its rate is counted when they are taken
MAX_EARLY = 8  # messages to a client that wait for its data channel
MAX_BYTES = 65_536  # of one message of a data channel
MAX_BUFFERED = 131_072  # bytes that a client has not acknowledged, above which messages wait
CLOSE_SECONDS = 3.0
NEEDED = "it needs VP8 or H.264, rtcp-mux, a=setup, a=ice-ufrag and a=ice-pwd"


class BadOffer(BadMessage):
    """Raised for an offer that cannot be answered, with the reason."""


def check_offer(sdp: str, keep_candidates: bool) -> str:
    """The offer without candidates, or without those of host names only, which would have to be looked up. The server learns
    a client's address from the client's own checks; only a server that is reached by STUN or TURN has to check first.
    BadOffer: it is no offer, or too large."""
    unused = r"a=(candidate:.*\.local\b|end-of-candidates)" if keep_candidates else "a=(candidate:|end-of-candidates)"
    lines = sdp.splitlines()
    media = [line.partition(" ")[0] for line in lines if line.startswith("m=")]
    if not media:
        raise BadOffer("the offer is no SDP with media")
    for name, count, most in (
        ("media", len(media), MAX_MEDIA),
        ("videos", media.count("m=video"), MAX_VIDEOS),
        ("candidates", sum(line.startswith("a=candidate:") for line in lines), MAX_CANDIDATES),
    ):
        if count > most:
            raise BadOffer(f"the offer has {count} {name}, and at most {most} are taken")
    for name, most in LARGEST.items():
        for number in re.findall(rf"^a={name}: *([0-9]+)", "\n".join(lines), re.MULTILINE):
            if len(number) > 5 or int(number) > most:
                raise BadOffer(f"a={name} of the offer is above {most}")
    if not any(line.startswith("a=fingerprint:") for line in lines):
        raise BadOffer("the offer has no a=fingerprint, by which its sender is known")
    names = [line.removeprefix("a=mid:") for line in lines if line.startswith("a=mid:")]
    bundles = [line.split()[1:] for line in lines if line.startswith("a=group:BUNDLE")]
    bundled = bundles == [names] or (not bundles and len(media) == 1)
    if len(set(names)) < len(media) or len(names) != len(media) or not bundled:  # aiortc relies on it
        raise BadOffer("the media of an offer have an a=mid each, and one a=group:BUNDLE lists all of them in order")
    if not all(re.fullmatch("[!-~]{1,64}", name) for name in names):
        raise BadOffer("an a=mid is 1 to 64 printable ASCII characters")
    return "".join(f"{line}\r\n" for line in lines if not re.match(unused, line))


def fingerprints(sdp: str) -> set[str]:
    """The certificates of a description, which tell its connection from others."""
    return {line.lower() for line in sdp.splitlines() if line.startswith("a=fingerprint:")}


def configuration(servers: Sequence[IceServer]) -> RTCConfiguration:
    """aiortc's, with the STUN and TURN servers of the settings. Without any, this machine's own addresses are offered."""
    return RTCConfiguration([RTCIceServer(one.url, one.username, one.credential) for one in servers])


def read_filled(transport: Any) -> None:
    """Skip empty datagrams, which anyone can send and which end aiortc's reading. transport: aiortc's, of ICE."""
    if hasattr(transport, "_streamflow"):
        return
    read, transport._streamflow = transport._recv, True

    async def filled() -> bytes:
        while not (data := await read()):
            pass
        return data

    transport._recv = filled


def limit_repeats(sender: Any) -> None:
    """Bound the packets that a client asks for again: one datagram can name thousands. sender: aiortc's."""
    handle, pace = sender._handle_rtcp_packet, Bucket(MAX_RESENT, RESENT_AT_ONCE)

    async def limited(packet: Any) -> None:
        if isinstance(packet, RtcpRtpfbPacket):
            packet.lost = [one for one in dict.fromkeys(packet.lost[: 2 * RESENT_AT_ONCE]) if pace.take()]
        await handle(packet)

    sender._handle_rtcp_packet = limited


def limit_sources(receiver: Any, refuse: Callable[[str], None]) -> None:
    """Call `refuse` for a client that sends more than `MAX_SOURCES` streams, each of which aiortc keeps and reports on."""
    handle, sources = receiver._handle_rtp_packet, set()

    async def limited(packet: Any, arrival_time_ms: int) -> None:
        if packet.ssrc not in sources and len(sources) == MAX_SOURCES:
            return refuse(f"a video of more than {MAX_SOURCES} streams")
        sources.add(packet.ssrc)
        await handle(packet, arrival_time_ms=arrival_time_ms)

    receiver._handle_rtp_packet = limited


def limit_chunks(sctp: Any, refuse: Callable[[str], None]) -> None:
    """Call `refuse` for a client of whose messages more than `MAX_CHUNKS` parts wait for others, or that uses as many
    channels: aiortc goes through all of them for each part that arrives. sctp: aiortc's transport."""
    take = sctp._receive_data_chunk

    async def limited(chunk: Any) -> None:
        streams, missing = sctp._inbound_streams, len(sctp._sack_misordered)
        if missing + len(streams) + sum(len(one.reassembly) for one in streams.values()) > MAX_CHUNKS:
            return refuse(f"more than {MAX_CHUNKS} parts of messages that have not arrived whole, or data channels")
        await take(chunk)

    sctp._receive_data_chunk = limited


class Peer:
    """A client's connection. frame: called in a decoder's thread with each decoded frame of at most `max_pixels`, or None
    where no video is taken. report: with a message about frames that cannot be decoded, in that thread too. output: of the
    video that the client gets.

    A client sends one video: of several, the one that was added last is taken. All else that it offers, such as sound, is
    answered as inactive.
    """

    def __init__(
        self,
        servers: Sequence[IceServer],
        output: Output,
        frame: Callable[[av.VideoFrame], object] | None = None,
        report: Callable[[str], object] = lambda message: None,
        max_pixels: int = 0,
    ):
        self._connection, self._keep_candidates = RTCPeerConnection(configuration(servers)), bool(servers)
        self.output, self._frame, self._report, self._max_pixels = output, frame, report, max_pixels
        self._decoder: Decoder | None = None
        self._channel: RTCDataChannel | None = None
        self._messages: asyncio.Queue[Json | None] = asyncio.Queue(MAX_QUEUED)
        self._early: deque[str] = deque(maxlen=MAX_EARLY)
        self._negotiating = asyncio.Lock()
        self._low = asyncio.Event()  # set where more messages can be sent
        self._changed = asyncio.Event()
        self._ended: str | None = None
        self._closing: asyncio.Future[None] = asyncio.Future()  # set where it ends
        self._refused: str | None = None
        self._limited: list[object] = []  # what has limits of its own
        self._connection.on("track", self._on_track)
        self._connection.on("datachannel", self._on_channel)
        self._connection.on("connectionstatechange", self._changed.set)

    # -- offers and answers ------------------------------------------------------------------------------------------------

    async def negotiate(self, offer: str) -> str:
        """The answer to an offer, the first or a later one, with all candidates. BadOffer."""
        offer = check_offer(offer, self._keep_candidates)
        async with self._negotiating:
            try:
                await self._connection.setRemoteDescription(RTCSessionDescription(offer, "offer"))
                transceivers = self._connection.getTransceivers()
                if len(transceivers) > MAX_MEDIA:  # of all offers together
                    await self.end(f"more than {MAX_MEDIA} media")
                for one in transceivers:
                    self._set_direction(one)
                self._limit(transceivers)
                await self._connection.setLocalDescription(await self._connection.createAnswer())
            except Exception as error:  # whatever a broken description leads to in aiortc's parser
                raise BadOffer(f"the offer cannot be answered ({type(error).__name__}): {NEEDED}") from error
        return self._connection.localDescription.sdp

    def continues(self, offer: str) -> bool:
        """Whether an offer changes this connection. One with another certificate is for a new connection."""
        known = self._connection.remoteDescription
        return self._ended is None and known is not None and fingerprints(known.sdp) == fingerprints(offer)

    def _limit(self, transceivers: Sequence[RTCRtpTransceiver]) -> None:
        """Put limits where aiortc has none."""
        for one in transceivers:
            if one not in self._limited:
                limit_repeats(one.sender)
                limit_sources(one.receiver, self.refuse)
            read_filled(one.receiver.transport.transport)
        if (sctp := self._connection.sctp) is not None:
            if sctp not in self._limited:
                limit_chunks(sctp, self.refuse)
            read_filled(sctp.transport.transport)
        self._limited = [*transceivers, sctp]

    def refuse(self, reason: str) -> None:
        """Let `run` end the connection, for a caller that cannot wait, such as aiortc's reader."""
        self._refused = self._refused or reason
        self._changed.set()

    def _set_direction(self, transceiver: RTCRtpTransceiver) -> None:
        """Answer a video with what both sides do of taking and sending, anything else as inactive."""
        if transceiver.kind != "video":
            transceiver.direction = "inactive"
            return
        if transceiver.sender.track is None:
            transceiver.sender.replaceTrack(OutputTrack(self.output))
        transceiver.direction = "sendonly" if self._frame is None else "sendrecv"

    def _on_track(self, track: Any) -> None:
        if track.kind != "video" or self._frame is None:
            return
        if self._decoder is not None:
            self._decoder.active = False
        self._decoder = Decoder(self._max_pixels, self._frame, self._report)
        (receiver,) = (one for one in self._connection.getReceivers() if one.track is track)
        self._decoder.attach(receiver)

    def _directions(self) -> set[str | None]:
        return {one.currentDirection for one in self._connection.getTransceivers() if one.kind == "video"}

    @property
    def takes(self) -> bool:
        """Whether the client sends a video, by the last answer."""
        return bool(self._directions() & {"recvonly", "sendrecv"})

    @property
    def sends(self) -> bool:
        """Whether the client gets a video, by the last answer."""
        return bool(self._directions() & {"sendonly", "sendrecv"})

    @property
    def connected(self) -> bool:
        """Whether the connection is there now."""
        return self._ended is None and self._connection.connectionState == "connected"

    # -- a `Socket` of a session ------------------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether messages can be sent now."""
        return self._open_channel() is not None

    def _open_channel(self) -> RTCDataChannel | None:
        channel = self._channel
        return channel if self._ended is None and channel is not None and channel.readyState == "open" else None

    def _on_channel(self, channel: RTCDataChannel) -> None:
        if self._channel is not None:
            return channel.close()
        self._channel = channel
        channel.bufferedAmountLowThreshold = MAX_BUFFERED // 2
        channel.on("message", self._on_message)
        channel.on("bufferedamountlow", self._low.set)
        channel.on("close", self._low.set)
        while self._early:
            channel.send(self._early.popleft())

    def _on_message(self, data: str | bytes) -> None:
        if not self._messages.full():  # as soon as they are taken, so many are above every rate
            self._messages.put_nowait({"type": "websocket.receive", "text" if isinstance(data, str) else "bytes": data})

    async def receive(self) -> Json:
        """The next message of the client, in the form of ASGI's, or that it has disconnected."""
        if self._ended is None:
            message = await self._messages.get()
            if message is not None:
                return message
        return {"type": "websocket.disconnect"}

    async def send_text(self, data: str) -> None:
        """Send a message, once the client has read most of those before. Until the data channel is open, the last
        `MAX_EARLY` wait for it."""
        if self._channel is None:
            return self._early.append(data)
        await self._send(data)

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary message. BadMessage: it is larger than a data channel's messages may be."""
        if len(data) > MAX_BYTES:
            raise BadMessage(
                f"the answer has {len(data)} bytes, and a data channel's message at most {MAX_BYTES}: use the WebSocket"
            )
        await self._send(data)

    async def _send(self, data: str | bytes) -> None:
        while (channel := self._open_channel()) is not None and channel.bufferedAmount > MAX_BUFFERED:
            self._low.clear()
            await self._low.wait()
        if channel is not None:
            channel.send(data)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Tell the client why, and end the connection."""
        if (channel := self._open_channel()) is not None:
            channel.send(json.dumps({"type": "close", "code": code, "reason": reason}))
            await asyncio.sleep(0.1)  # until it is sent
        await self.end(reason or "closed")

    # -- its end ----------------------------------------------------------------------------------------------------------

    async def run(self) -> str:
        """Watch the connection until it ends. Return why, in words."""
        began = heard = looked = time.monotonic()
        packets = 0
        while self._ended is None:
            self._changed.clear()
            await self._sleep(LOOK_SECONDS)
            now, state = time.monotonic(), self._connection.connectionState
            if self._refused is not None:
                await self.end(self._refused)
            elif state in ("failed", "closed"):
                await self.end(f"the connection has {'failed' if state == 'failed' else 'been closed'}")
            elif self.output.closed:
                await self.end("the stream has ended")
            elif state != "connected":
                heard = now
                if now - began > CONNECT_SECONDS:
                    await self.end(f"no connection within {CONNECT_SECONDS:g} seconds")
            elif now - looked >= LOOK_SECONDS:
                count = await self._received()
                if count - packets > MAX_PACKETS * (now - looked):
                    await self.end(f"more than {MAX_PACKETS} packets a second")
                if count != packets or (self.output.empty and not self.takes):  # a player reports on what it gets
                    heard = now
                elif now - heard > SILENT_SECONDS:
                    await self.end(f"nothing was heard for {SILENT_SECONDS:g} seconds")
                packets, looked = count, now
        return self._ended

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            pass

    async def _received(self) -> int:
        """The number of packets that have arrived."""
        report = await self._connection.getStats()
        return sum(one.packetsReceived for one in report.values() if one.type == "transport")

    async def end(self, reason: str) -> None:
        """Close the connection. Where the caller is cancelled meanwhile, it is closed nevertheless."""
        if self._ended is None:
            self._ended = reason
            if self._messages.full():
                self._messages.get_nowait()
            self._messages.put_nowait(None)
            self._changed.set()
            self._low.set()
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        """Log where aiortc cannot close the connection: a broken offer may have left it half made."""
        receivers: list[Any] = self._connection.getReceivers()
        for receiver in receivers:  # aiortc waits without end for a task that has failed
            if (task := receiver._RTCRtpReceiver__rtcp_task) is not None and task.done():
                receiver._RTCRtpReceiver__rtcp_exited.set()
        try:
            await asyncio.wait_for(self._connection.close(), CLOSE_SECONDS)
        except Exception as error:
            logger.warning("a WebRTC connection was not closed as it should be: %s", type(error).__name__)
