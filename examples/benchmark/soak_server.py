"""The soak's part over the network: the server in a thread of this process, a viewer that sends an image and waits for its
answer, looks at text in between, leaves and comes again; and a server that is ended and started again."""

from __future__ import annotations

import gc
import io
import json
import socket
import struct
import threading
import time
from itertools import cycle, pairwise
from typing import Any, Self

import httpx
import torch
import uvicorn
from soak_acts import Act, Memory, acts, check_answers
from websockets.sync.client import ClientConnection, connect

from streamflow.app.config import Acceleration, Settings
from streamflow.app.server.app import Service, create_app
from streamflow.app.server.settings import Server
from streamflow.app.server.slot import LOADING, WARMING_UP
from streamflow.app.server.tokens import Tokens

WITHIN = 60.0  # seconds for an answer
FORMATS = ("JPEG", "PNG", "WEBP")
TEXTS = 10  # frames from noise after each act
ACTS = 5  # of one viewer
MANY = 1e6  # a second: the soak is to be as fast as the model


class Serving:
    """A server in a thread, until it is left."""

    def __init__(self, settings: Settings) -> None:
        self.service = Service(settings, Tokens())
        app = create_app(self.service)
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, ws="websockets-sansio", log_level="critical"))

    def __enter__(self) -> Self:
        listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._uvicorn.run, args=([listening],))
        self._thread.start()
        while not self._uvicorn.started or self.service.state in (LOADING, WARMING_UP):
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(WITHIN)
        if self._thread.is_alive() or self.service.worker.is_alive():
            raise RuntimeError(f"the server's threads are alive {WITHIN:g} s after its end")

    def viewer(self) -> ClientConnection:
        ticket = httpx.post(f"http://{self.host}/session").raise_for_status().json()["ticket"]
        return connect(f"ws://{self.host}/stream", subprotocols=["streamflow", ticket], max_size=None)


def heard(ws: ClientConnection, kind: str) -> dict[str, Any]:
    """The next message of this kind. RuntimeError for an error that the server tells."""
    while True:
        message = ws.recv(WITHIN)
        if isinstance(message, bytes):
            (length,) = struct.unpack_from(">I", message)
            said = json.loads(message[4 : 4 + length])
            ws.send('{"type": "ack"}')
        else:
            said = json.loads(message)
        if said["type"] == "error":
            raise RuntimeError(f"the server says: {said['message']}")
        if said["type"] == kind:
            return said


def put(ws: ClientConnection, **settings: Any) -> None:
    """Change settings, and wait until they are taken."""
    ws.send(json.dumps({"type": "set", "settings": settings}))
    heard(ws, "settings")


def ask(ws: ClientConnection, number: int, image: bytes) -> int:
    """Send an image and wait for the next one that is drawn of an image: its number."""
    ws.send(struct.pack(">d", number) + image)
    while (stamp := heard(ws, "image")["stamp"]) is None:  # text that was in flight
        pass
    return int(stamp)


def play_act(ws: ClientConnection, act: Act) -> list[int]:
    """An act's images, each asked for when the last is answered; then text for a while. The numbers of the answers."""
    first, other = ((act.prompt, 1.0), ("", 0.0)) if isinstance(act.prompt, str) else act.prompt
    words = {"prompt": first[0], "other": other[0], "blend": other[1]}
    put(ws, mode="image", guidance=act.guidance, steps=4, strength=len(act.steps) / 4, seed=act.mask, **words)
    found = []
    for number, kind in zip(act.numbers, cycle(FORMATS), strict=False):
        data = io.BytesIO()
        act.image(number).save(data, kind)
        found.append(ask(ws, number, data.getvalue()))
    while found[-1] != number:  # the next act's levels would drop what is in flight
        found.append(ask(ws, number, data.getvalue()))
    put(ws, mode="text")
    seen: list[int] = []
    while len(seen) < TEXTS:
        said = heard(ws, "image")
        seen += [said["frame"]] * (said["stamp"] is None)
    if any(b != a + 1 for a, b in pairwise(seen)) or seen[0]:
        raise RuntimeError(f"text frames {seen} should be 0, 1, 2, ...")
    return found


def play(model: str, device: str, acceleration: str, sessions: list[range]) -> Memory:
    """All sessions, a server each. RuntimeError where a frame is missing or out of order, or the server complains."""
    memory = Memory(torch.device(device))
    page = Server(port=0, max_viewers=1, max_fps=MANY, max_messages_per_second=MANY)
    kind = Acceleration(kind=acceleration)
    for k, numbers in enumerate(sessions):
        settings = Settings(
            model=model, device=device, mode="img2img", num_inference_steps=4, acceleration=kind, server=page, warmup=0
        )
        with Serving(settings) as serving:
            found: list[int] = []
            played = list(acts(numbers, seed=k))
            for i in range(0, len(played), ACTS):
                with serving.viewer() as ws:
                    heard(ws, "welcome")
                    for act in played[i : i + ACTS]:
                        found += play_act(ws, act)
                        memory.sample(act.numbers.stop)
                _left(serving)
            check_answers(found, numbers)
        del serving  # before the next one is made
        gc.collect()
    return memory


def _left(serving: Serving) -> None:
    """Wait until the server knows that its viewer is gone. RuntimeError where it never does."""
    end = time.monotonic() + WITHIN
    while serving.service.admission.inside or serving.service.viewers:
        if time.monotonic() > end:
            raise RuntimeError(f"a viewer that left is still there after {WITHIN:g} s")
        time.sleep(0.01)
