"""A WebRTC client for tests of the server: aiortc's own connection, with a video whose frames tell their number."""

import asyncio
import contextlib
import fractions
import json
import random
import time
from typing import ClassVar

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCRtpSender, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

CLOCK = 90_000
HERE = RTCConfiguration([])  # no STUN server


class Camera(MediaStreamTrack):
    """A video of so many frames a second, grey or as `paint(number)` says."""

    kind = "video"

    def __init__(self, size=(160, 120), rate=20.0, paint=None):
        super().__init__()
        self.size, self.rate, self.number, self.sent = size, rate, 0, {}
        self.paint = paint or (lambda number: 40 + number % 170)
        self._began = time.monotonic()

    async def recv(self):
        await asyncio.sleep(max(0.0, self._began + self.number / self.rate - time.monotonic()))
        if self.readyState != "live":
            raise MediaStreamError
        painted = self.paint(self.number)
        if not isinstance(painted, np.ndarray):
            painted = np.full((self.size[1], self.size[0], 3), painted, np.uint8)
        frame = av.VideoFrame.from_ndarray(painted, "rgb24")
        frame.pts, frame.time_base = round(self.number * CLOCK / self.rate), fractions.Fraction(1, CLOCK)
        self.sent[self.number] = time.monotonic()
        self.number += 1
        return frame


class Client:
    """One connection. frames: (when, pts, image) of the video that came; messages: of the data channel. made: all."""

    made: ClassVar[list] = []

    def __init__(self, camera=None, receive=True, channel=True, codec=None, loss=0.0):
        self.made.append(self)
        self.pc = RTCPeerConnection(HERE)
        self.frames, self.messages, self.channel, self.loss = [], [], None, loss
        self.lost = 0
        self.camera = camera
        direction = {(True, True): "sendrecv", (True, False): "sendonly", (False, True): "recvonly"}[
            camera is not None, receive
        ]
        self.video = self.pc.addTransceiver(camera or "video", direction)
        if codec:
            codecs = RTCRtpSender.getCapabilities("video").codecs
            self.video.setCodecPreferences([one for one in codecs if one.mimeType == f"video/{codec}"])
        self.pc.on("track", self._on_track)
        if channel:
            self.channel = self.pc.createDataChannel("settings")
            self.channel.on("message", self._on_message)

    def _on_message(self, data):
        self.messages.append(json.loads(data) if isinstance(data, str) else data)

    def _on_track(self, track):
        self.reading = asyncio.ensure_future(self._read(track))

    async def _read(self, track):
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                self.frames.append((time.monotonic(), frame.pts, frame.to_ndarray(format="rgb24")))

    async def offer(self):
        await self.pc.setLocalDescription(await self.pc.createOffer())
        return self.pc.localDescription.sdp

    async def accept(self, answer):
        await self.pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        if self.loss:
            self._lose()

    def _lose(self):
        """Lose this share of the RTP and RTCP packets in both directions."""
        dice, ice = random.Random(3), self.video.receiver.transport.transport
        send, receive = ice._send, ice._recv

        def lost(data):
            missing = 128 <= data[0] < 192 and dice.random() < self.loss
            self.lost += missing
            return missing

        async def lossy_send(data):
            if not lost(data):
                await send(data)

        async def lossy_receive():
            while lost(data := await receive()):
                pass
            return data

        ice._send, ice._recv = lossy_send, lossy_receive

    async def publish(self, http, path="/whip", **headers):
        """Connect by WHIP or WHEP. Return the response."""
        headers = {"content-type": "application/sdp", **headers}
        response = await http.post(path, content=await self.offer(), headers=headers)
        if response.status_code == 201:
            await self.accept(response.text)
        return response

    def send(self, **message):
        self.channel.send(json.dumps(message))

    async def until(self, condition, seconds=15.0):
        """Wait until this is true, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, (
                f"not within {seconds} s: {self.pc.connectionState}, {len(self.frames)} frames"
            )
            await asyncio.sleep(0.02)
        return found

    async def heard(self, kind, seconds=15.0):
        """The first message of this kind that has not been asked for."""
        found = await self.until(lambda: next((one for one in self.messages if one["type"] == kind), None), seconds)
        self.messages.remove(found)
        return found

    async def close(self):
        await self.pc.close()

    def vanish(self):
        """Send and receive nothing any more, as a client whose machine is switched off."""
        for protocol in self.video.receiver.transport.transport._connection._protocols:
            protocol.transport.close()
