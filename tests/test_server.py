"""The page's server: who gets in, what it takes from the network, and that every viewer gets its share."""

import asyncio
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the page needs the extra web")
pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("uvicorn", reason="the page needs the extra web")
connect = pytest.importorskip("websockets.sync.client", reason="the page needs the extra web").connect

import httpx  # noqa: E402
import uvicorn  # noqa: E402
from diffusers.pipelines.helios import pipeline_helios  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from random_pipelines import random_pipeline  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

from streamflow.app import config  # noqa: E402
from streamflow.app.cli import main  # noqa: E402
from streamflow.app.commands import serve  # noqa: E402
from streamflow.app.config import ConfigError, Settings  # noqa: E402
from streamflow.app.server import images, messages, tokens  # noqa: E402  # noqa: E402
from streamflow.app.server.admission import KEPT, Admission, Refusal  # noqa: E402
from streamflow.app.server.app import Service, create_app  # noqa: E402
from streamflow.app.server.connections import Connections, Listener, uvicorn_config  # noqa: E402
from streamflow.app.server.messages import BadMessage, DrawRequest  # noqa: E402
from streamflow.app.server.metrics import Metrics  # noqa: E402
from streamflow.app.server.safety import Bucket, check_binding  # noqa: E402
from streamflow.app.server.settings import Server  # noqa: E402
from streamflow.app.server.slot import LOADING, WARMING_UP, about_models, first_request, takes_negative  # noqa: E402
from streamflow.pretrained import EXAMPLE_PROMPTS  # noqa: E402

pytestmark = pytest.mark.extras
SECRET, OTHER = "a-token-of-sixteen-or-more", "another-token-of-sixteen"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def encoded(size=(40, 30), kind="PNG", color="red"):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, kind)
    return out.getvalue()


# -- parts ------------------------------------------------------------------------------------------------------------


def test_it_binds_beyond_this_machine_only_with_tokens_and_tls_or_a_proxy(tmp_path):
    some = tokens.parse(f"ann {SECRET}", "here")
    for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1"):
        check_binding(Server(host=host), tokens.Tokens())
    for host in ("0.0.0.0", "::", "192.168.1.2", "my.example"):
        with pytest.raises(ValueError, match="no tokens"):
            check_binding(Server(host=host, behind_proxy=True), tokens.Tokens())
        with pytest.raises(ValueError, match="in the clear"):
            check_binding(Server(host=host), some)
        check_binding(Server(host=host, behind_proxy=True), some)
        check_binding(Server(host=host, tls_certificate="a.pem", tls_key="b.pem"), some)


def test_tokens_come_from_a_file_or_the_environment_and_are_never_shown(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"# users\nann {SECRET} streams=2 fps=7.5\nbob {OTHER}\n")
    file.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        tokens.load(str(file))
    file.chmod(0o600)
    for found in (tokens.load(str(file)), tokens.load(None, {tokens.VARIABLE: file.read_text().replace("\n", ";")})):
        ann = found.holder(SECRET)
        assert (ann.name, ann.streams, ann.fps) == ("ann", 2, 7.5) and found.holder(OTHER).name == "bob"
        assert found.holder(SECRET[:-1]) is None and found.holder("") is None and found.holder("\udcff") is None
        assert SECRET not in repr(ann) + repr(vars(found))
    assert not tokens.load(None, {}) and tokens.Tokens().holder("").name == "anyone"
    for wrong in ("ann short", "ann", f"ann {SECRET} fsp=3", f"ann {SECRET} fps=x", f"ann {SECRET} streams=0"):
        with pytest.raises(ValueError, match="line 1") as error:
            tokens.parse(wrong, "here")
        assert SECRET not in str(error.value)
    with pytest.raises(ValueError, match="differ"):
        tokens.parse(f"ann {SECRET}\nann {OTHER}", "here")


def test_places_quotas_and_tickets():
    clock = Clock()
    gate = Admission(3, clock)
    ann = tokens.Holder("ann", streams=1, fps=2.0)
    ticket = gate.ticket(ann)
    with pytest.raises(Refusal, match="quota is 1") as refused:
        gate.ticket(ann)
    assert refused.value.retry_after > 0
    assert gate.enter("no ticket") is None and gate.enter(ticket) is ann and gate.enter(ticket) is None
    gate.ticket(tokens.ANYONE), gate.ticket(tokens.ANYONE)
    with pytest.raises(Refusal, match="all 3 session slots"):
        gate.ticket(tokens.ANYONE)
    clock.now = KEPT + 1  # tickets that nobody used
    late = gate.ticket(tokens.ANYONE)
    clock.now *= 2
    assert gate.enter(late) is None
    gate.leave(ann)
    assert gate.inside == 0 and gate.enter(gate.ticket(ann)) is ann
    assert gate.pace(ann) == gate.pace(ann) and gate.pace(tokens.ANYONE) == ()


def test_a_bucket_lets_through_its_rate():
    clock = Clock()
    bucket, passed = Bucket(5, 2, clock), 0
    for _ in range(1000):
        clock.now += 0.01
        passed += bucket.take()
    assert 50 <= passed <= 52 and 0 < bucket.wait() <= 0.2


def test_images_are_decoded_safely():
    for kind in images.FORMATS:
        image = images.decode(encoded((40, 30), kind), 10_000, 16, 16)
        assert image.size == (16, 16) and image.mode == "RGB" and image.getpixel((8, 8))[0] > 240
    whole = encoded((64, 64), "PNG")
    bomb = bytearray(encoded((8, 8), "PNG"))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    for bad in (
        b"",
        b"GIF89a",
        whole[: len(whole) // 2],
        encoded(kind="BMP"),
        encoded(kind="GIF"),
        bytes(bomb),
        os.urandom(99),
    ):
        with pytest.raises(BadMessage):
            images.decode(bad, 10_000, 16, 16)
    with pytest.raises(BadMessage, match="has 101x100 pixels, and at most 10000 are read"):
        images.decode(encoded((101, 100)), 10_000, 16, 16)
    for bad in (b"1234", struct.pack(">d", float("nan")) + b"x"):
        with pytest.raises(BadMessage, match="clock"):
            images.split(bad)


def test_requests_are_checked_field_by_field():
    request = DrawRequest(model="m")
    new = messages.changed(request, {"prompt": "a", "other": "b", "blend": 0.25, "guidance": 3}, ("m",), 8)
    assert new.prompts == [("a", 0.75), ("b", 0.25)] and request.prompt == ""
    assert new.model_copy(update={"blend": 0.0}).prompts == "a" and new.model_copy(update={"blend": 1.0}).prompts == "b"
    for fields in (
        *({"seed": -1}, {"seed": 2**32}, {"steps": 0}, {"steps": 9}, {"steps": 1.5}, {"blend": 2}, {"mode": "x"}),
        *(
            {"prompt": 3},
            {"prompt": "x" * 501},
            {"negative": "x" * 501},
            {"model": "/etc/passwd"},
            {"t_index_list": [0]},
            {"running": 1},
            [1],
            None,
        ),
    ):
        with pytest.raises(BadMessage):
            messages.changed(request, fields, ("m",), 8)
    with pytest.raises(BadMessage) as error:
        messages.changed(request, {"seed": -1, "strength": 7}, ("m",), 8)
    assert "seed" in str(error.value) and "strength" in str(error.value)
    with pytest.raises(BadMessage, match="strength: Input should be greater than 0"):
        messages.changed(request, {"strength": 0}, ("m",), 8)
    for text in ("", "[]", "{}", '{"type": 3}', '{"type": "set", "a": NaN}', "[" * 100_000, "9" * 5000, "\x00"):
        with pytest.raises(BadMessage):
            messages.read(text)


def test_two_prompts_of_the_settings_are_blended_at_first():
    request = first_request(Settings(prompt=(("a cat", 3.0), ("a dog", 1.0))))
    assert (request.prompt, request.other, request.blend) == ("a cat", "a dog", 0.25)
    assert request.prompts == [("a cat", 0.75), ("a dog", 0.25)]
    assert (
        first_request(Settings(prompt="a cat")).prompts
        == first_request(Settings(prompt=(("a cat", 2.0),))).prompts
        == "a cat"
    )
    with pytest.raises(ValueError, match="blends two prompts, and the settings have 3"):
        first_request(Settings(prompt=(("a", 1.0), ("b", 1.0), ("c", 1.0))))


def test_only_safetensors_of_the_owner_and_settings_that_fit():
    assert config.parse({"server": {"port": 0, "loras": {"ink": "ink.safetensors"}}}).server.loras == {
        "ink": "ink.safetensors"
    }
    wrong = (
        {"loras": {"a": "a.pt"}},
        {"models": {"a": "b.ckpt"}},
        {"tls_key": "k"},
        {"models": {"a": "b"}, "loras": {"a": "c"}},
    )
    for one in wrong:
        with pytest.raises(ConfigError, match="server"):
            config.parse({"server": one})
    for unused in ({"t_index_list": (0,)}, {"devices": ("cpu", "cpu")}, {"similar_image_filter": {}}):
        with pytest.raises(ValueError, match=f"does not use {next(iter(unused))}"):
            Service(Settings(**unused), tokens.Tokens())


def test_the_state_says_what_the_server_does_while_it_opens_the_model():
    service = Service(Settings(), tokens.parse(f"ann {SECRET}", "here"))

    async def answers():
        transport = httpx.ASGITransport(create_app(service))  # the model's thread is not started
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            ann = {"authorization": f"Bearer {SECRET}"}
            asked = ("/session", ann), ("/session?page=true", ann), ("/session?page=true", {}), ("/session", {})
            return [await client.get("/health/ready"), *[await client.post(url, headers=held) for url, held in asked]]

    for phase, done, of in ((LOADING, 0, 1), (WARMING_UP, 2, 4)):
        service._note_progress(phase, done, of)
        health, plain, page, unknown, refused = asyncio.run(answers())
        assert [one.status_code for one in (health, plain, page, unknown, refused)] == [503, 503, 200, 200, 401]
        for one in (health, plain, page):
            said = one.json()
            assert (said["state"], said["done"], said["of"]) == (phase, done, of) and said["seconds"] >= 0
        assert plain.json()["message"] == phase and unknown.json() == {"state": "token required"}
    service.pools.shutdown()


def test_examples_and_notes_are_of_the_embedded_model_and_negative_prompts_of_some_kinds_of_guidance():
    settings = Settings(model="a/b", server=Server(models={"emoji": "embedded", "other": "c/d"}))
    about = about_models(settings)
    assert set(about) == {"emoji"} and about["emoji"]["examples"] == EXAMPLE_PROMPTS
    assert set(about_models(Settings(server=Server(loras={"ink": "ink.safetensors"})))) == {"model", "ink"}
    kinds = ("none", "full", "self", "initialize")
    assert [takes_negative(Settings(cfg_type=kind)) for kind in kinds] == [False, True, False, True]
    assert first_request(Settings(cfg_type="full", negative_prompt="blurred")).negative == "blurred"
    assert first_request(Settings()).guidance == 1 and first_request(Settings(model="a/b")).guidance == 2


def parsed(text):
    """Prometheus' text format: {sample: value}; AssertionError for a line that is none."""
    samples = {}
    for line in text.splitlines():
        if not line.startswith("# HELP ") and not re.fullmatch(r"# TYPE \w+ (counter|gauge|histogram)", line):
            match = re.fullmatch(r'([a-z_]+(?:\{[a-z]+="[^"]*"\})?) ([-+0-9.e]+)', line)
            assert match, line
            samples[match[1]] = float(match[2])
    return samples


def test_metrics_are_in_prometheus_format():
    metrics = Metrics()
    metrics.count("drops", "in")
    metrics.gauge("viewers", "there", lambda: 3)
    for seconds in (0.0001, 0.3, 99):
        metrics.observe("tick_seconds", seconds)
    said = parsed(metrics.text())
    assert said['streamflow_drops_total{kind="in"}'] == 1 and said["streamflow_viewers"] == 3
    buckets = [value for name, value in said.items() if name.startswith("streamflow_tick_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[0] == 1 and buckets[-1] == said["streamflow_tick_seconds_count"] == 3


# -- a server ---------------------------------------------------------------------------------------------------------


class Running:
    """A server in a thread of this process, and what talks to it."""

    def __init__(self, held=None, given=None, **server):
        self.settings = Settings(
            device="cpu",
            num_inference_steps=1,
            acceleration=config.Acceleration(kind="none"),
            server=Server(port=0, **server),
            **(given or {}),
        )
        self.service = Service(self.settings, held or tokens.Tokens())
        self.connections = Connections(self.settings.server, self.service.refusals)
        listening = Listener("127.0.0.1", 0, self.connections)
        self.host = f"127.0.0.1:{listening.getsockname()[1]}"
        made = uvicorn_config(create_app(self.service), self.settings.server, self.connections)
        self.uvicorn = uvicorn.Server(made)
        self.thread = threading.Thread(target=self.uvicorn.run, args=([listening],))
        self.thread.start()
        while not self.uvicorn.started or self.service.state in (LOADING, WARMING_UP):
            time.sleep(0.01)
        assert self.service.state == "ready"

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive() and not self.service.worker.is_alive() and not self.service.worker.slots

    def call(self, method, path, token=None, **headers):
        authorization = {"authorization": f"Bearer {token}"} if token else {}
        return httpx.request(method, f"http://{self.host}{path}", headers={**authorization, **headers})

    def viewer(self, token=None):
        answer = self.call("POST", "/session", token)
        assert answer.status_code == 200, answer.text
        return connect(f"ws://{self.host}/stream", subprotocols=["streamflow", answer.json()["ticket"]], max_size=None)


@pytest.fixture(scope="module")
def server():
    running = Running(max_viewers=2, max_message_bytes=100_000, max_image_pixels=100_000, max_steps=2)
    yield running
    running.close()


def heard(ws, kind):
    """The next message of this kind: (it, its data); images on the way are acknowledged."""
    while True:
        message = ws.recv(30)
        if isinstance(message, bytes):
            (length,) = struct.unpack_from(">I", message)
            said, data = json.loads(message[4 : 4 + length]), message[4 + length :]
        else:
            said, data = json.loads(message), None
        if said["type"] == "image":
            ws.send('{"type": "ack"}')
        if said["type"] == kind:
            return said, data


def put(ws, **settings):
    ws.send(json.dumps({"type": "set", "settings": settings}))
    return heard(ws, "settings")[0]["settings"]


def drawn(ws, count=4):
    """The last of so many images: what was on its way before has passed."""
    for _ in range(count):
        said, data = heard(ws, "image")
    return said, Image.open(io.BytesIO(data)).convert("RGB")


def gone(service):
    deadline = time.monotonic() + 10
    while service.admission.inside or service.viewers:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_viewer_draws_text_and_images(server):
    with server.viewer() as ws:
        welcome = heard(ws, "welcome")[0]
        assert welcome["about"]["model"]["examples"] == list(EXAMPLE_PROMPTS) and welcome["limits"]["negative"] is False
        assert welcome["models"] == ["model"] and (welcome["width"], welcome["height"]) == (128, 128)
        put(ws, motion="still", prompt="a red apple, 3d render")
        apple = drawn(ws, 2)[1]
        assert put(ws, prompt="a fox, 3d render")["prompt"] == "a fox, 3d render"
        said, fox = drawn(ws, 2)
        assert fox.size == (128, 128) and fox.tobytes() != apple.tobytes() and len(said["ring"]) == 1
        put(ws, mode="image", steps=2, strength=0.5)
        said["stamp"] = None
        for stamp in (1.5, 2.5):
            ws.send(struct.pack(">d", stamp) + encoded((60, 40), "JPEG"))
            while said["stamp"] != stamp:  # text that was in flight comes first
                said, restyled = drawn(ws, 1)
        assert said["age_ms"] > 0 and restyled.tobytes() != fox.tobytes()
        ws.send('{"type": "gif"}')
        animated = Image.open(io.BytesIO(heard(ws, "gif")[1]))
        assert animated.format == "GIF" and animated.n_frames > 1
    gone(server.service)


def test_only_so_many_viewers_and_a_closed_tab_frees_its_place(server):
    with server.viewer():
        with server.viewer():
            refused = server.call("POST", "/session")
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert "2 session slots" in refused.json()["message"]
        while server.service.admission.inside > 1:
            time.sleep(0.01)
        with server.viewer() as third:
            assert heard(third, "welcome")
    gone(server.service)


def test_foreign_pages_and_sockets_without_a_ticket_are_refused(server):
    own = f"http://{server.host}"
    assert server.call("POST", "/session", Origin="https://evil.example").status_code == 403
    assert server.call("GET", "/", Host="evil.example").status_code == 403  # a name that resolves to us
    assert server.call("POST", "/session", Host="evil.example", Origin="http://evil.example").status_code == 403
    for headers in ({}, {"Origin": "null"}, {"Origin": "https://evil.example"}, {"Origin": own}):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://{server.host}/stream", subprotocols=["streamflow", "guess"], additional_headers=headers)
        assert refused.value.response.status_code == 403


def test_pages_health_and_metrics(server):
    page = server.call("GET", "/", Origin=f"http://{server.host}")
    assert (
        page.status_code == 200
        and "StreamFlow" in page.text
        and "default-src 'self'" in page.headers["content-security-policy"]
    )
    for name in re.findall(r'(?:src|href)="([a-z]+\.[a-z]+)"', page.text):
        assert server.call("GET", f"/{name}").status_code == 200
    for path in ("/app.py", "/..%2fconfig.py", "/%2e%2e/config.py", "/etc/passwd", "//etc/passwd", "/docs", "/openapi.json"):
        assert server.call("GET", path).status_code in (403, 404)
    assert server.call("GET", "/health/live").status_code == server.call("GET", "/health/ready").status_code == 200
    said = parsed(server.call("GET", "/metrics").text)
    assert {"streamflow_viewers", "streamflow_queue_age_seconds", "streamflow_memory_bytes"} <= set(said)
    assert "streamflow_end_to_end_seconds_count" in said


def test_hostile_messages_never_stop_it(server):
    import random

    dice = random.Random(5)
    good = json.dumps({"type": "set", "settings": {"prompt": "a", "seed": 3, "blend": 0.5}})
    with server.viewer() as ws:
        heard(ws, "welcome")
        for _ in range(25):
            text = list(good)
            for _ in range(3):
                text[dice.randrange(len(text))] = chr(dice.randrange(1, 0xD7FF))
            ws.send("".join(text))
        for bad in (b"", b"\0" * 8, struct.pack(">d", 1.0) + os.urandom(5000)):
            ws.send(bad)
        assert heard(ws, "error") and drawn(ws, 1)
    with server.viewer() as ws:  # wrong again and again
        with pytest.raises(ConnectionClosed) as closed:
            for _ in range(100):
                ws.send('{"type": "exec"}')
            while True:
                ws.recv(10)
        assert closed.value.rcvd.code == 4400
    with server.viewer() as ws:  # a flood
        with pytest.raises(ConnectionClosed) as closed:
            for _ in range(5000):
                ws.send('{"type": "ack"}')
            while True:
                ws.recv(10)
        # What the client still sends may reset the connection before it has read the server's reason.
        assert closed.value.rcvd is None or closed.value.rcvd.code == 4429
        assert parsed(server.call("GET", "/metrics").text)['streamflow_refused_total{kind="flood"}'] == 1
    with server.viewer() as ws:  # a message that is too large
        with pytest.raises(ConnectionClosed) as closed:
            ws.send("x" * 200_000)
            while True:
                ws.recv(10)
        assert closed.value.rcvd.code == 1009
    gone(server.service)
    with server.viewer() as ws:
        assert drawn(ws, 1)
    gone(server.service)


@pytest.mark.slow
def test_tokens_and_quotas_over_the_network(caplog):
    running = Running(tokens.parse(f"ann {SECRET} streams=1 fps=2\nbob {OTHER}", "here"), max_viewers=3)
    try:
        assert running.call("POST", "/session").status_code == 401
        opened = running.call("POST", "/session?page=true")
        assert opened.status_code == 200 and opened.json() == {"state": "token required"}
        said = parsed(running.service.metrics.text())
        assert said['streamflow_refused_total{kind="no token"}'] == said['streamflow_refused_total{kind="token"}'] == 1
        assert running.call("GET", "/metrics").status_code == 401 and running.call("GET", "/health/live").status_code == 200
        assert running.call("GET", "/metrics", OTHER).status_code == 200
        with running.viewer(SECRET) as ws:
            over = running.call("POST", "/session", SECRET)
            assert (
                over.status_code == 429 and "quota is 1" in over.json()["message"] and int(over.headers["retry-after"]) > 0
            )
            assert running.call("POST", "/session", OTHER).status_code == 200
            began = time.monotonic()
            drawn(ws, 6)
            assert 6 / (time.monotonic() - began) < 3.1  # two a second, and one at once
        tries = [running.call("POST", "/session", "wrong" * 5).status_code for _ in range(30)]
        assert set(tries) == {401, 429}
        assert SECRET not in caplog.text and OTHER not in caplog.text
    finally:
        running.close()


@pytest.mark.slow
def test_viewers_share_the_model_fairly_and_the_newest_image_wins():
    running = Running(max_viewers=3)
    counts, until = [0, 0, 0], time.monotonic() + 12

    def watch(k):
        with running.viewer() as ws:
            if k == 0:  # images far faster than they can be drawn
                put(ws, mode="image", strength=1.0)
            while time.monotonic() < until:
                for _ in range(10 if k == 0 else 0):
                    ws.send(struct.pack(">d", time.monotonic()) + encoded())
                said, _ = heard(ws, "image")
                counts[k] += 1

    try:
        threads = [threading.Thread(target=watch, args=(k,)) for k in range(3)]
        [one.start() for one in threads], [one.join(60) for one in threads]
        assert min(counts) >= 0.8 * sum(counts) / 3, counts
        said = parsed(running.service.metrics.text())
        assert said['streamflow_drops_total{kind="in"}'] > counts[0]
    finally:
        running.close()


@pytest.mark.parametrize("host", ["::1", "[::1]", "LocalHost"])
@pytest.mark.slow
def test_the_url_that_is_printed_can_be_opened(host, capsys, monkeypatch):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    answers, run = [], uvicorn.Server.run

    def run_briefly(self, sockets):
        def ask():
            url = json.loads(capsys.readouterr().out)["url"]
            while not self.started:
                time.sleep(0.01)
            while httpx.get(f"{url}/health").status_code != 200:
                time.sleep(0.05)
            answers.append(httpx.get(f"{url}/"))
            self.should_exit = True

        threading.Thread(target=ask).start()
        run(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "run", run_briefly)
    # threads of other servers in this process go on, and would make the command end the process
    monkeypatch.setattr(Service, "ended", lambda self, timeout: self.worker.join(60) or not self.worker.is_alive())
    flags = ["--host", host, "--port", "0", "--json", "--device", "cpu", "--num-inference-steps", "1"]
    with warnings.catch_warnings():
        assert serve.main(flags) == 0
        with warnings.catch_warnings(record=True) as told:
            read_corrupt_exif()
    assert [one.status_code for one in answers] == [200] and not told


def read_corrupt_exif():
    """Read an image of which Pillow warns."""
    data = b"II*\0\x08\0\0\0\x05\0" + b"\x0f\x01\x02\0\xff\0\0\0\xff\0\0\0"
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=b"Exif\0\0" + data)
    ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))


def test_pillow_warns_of_corrupt_exif():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_corrupt_exif()
    assert any("Corrupt EXIF" in str(one.message) for one in told)


@pytest.mark.parametrize("seconds", [0.2, 0.4])
def test_a_tls_handshake_that_never_ends_is_closed(seconds):
    async def connect_in_silence():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = await asyncio.get_running_loop().create_server(asyncio.Protocol, sock=listening, ssl=context)
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            began = time.monotonic()
            with suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()
            server.close()
            return time.monotonic() - began

    config = uvicorn_config(None, Server(request_seconds=seconds), None)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        assert seconds * 0.9 <= runner.run(connect_in_silence()) < 30


def test_the_command_names_the_address_only_where_it_cannot_listen_there(capsys):
    """A file or folder that is missing has nothing to do with the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for given, message in {
            ("--port", port): rf"the server cannot listen at 127\.0\.0\.1:{port}: .*in use",
            ("--control-net", "/no/net", "--control-maker", "canny"): "there is no folder '/no/net'",
            ("--server.token-file", "/no/tokens"): r"\[Errno 2\] .*'/no/tokens'",
        }.items():
            assert main(["serve", *given]) == 1
            assert re.match(f"streamflow serve: error: {message}", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, to make a certificate")
def test_sigterm_ends_it_within_five_seconds_and_tls_is_served(tmp_path):
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate, "-keyout", key]
    subprocess.run(made, check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=certificate)
    command = "import sys; from streamflow.app.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["serve", "--port", "0", "--json", "--num-inference-steps", "1", "--server.max-viewers", "1"]
    arguments += ["--server.tls-certificate", certificate, "--server.tls-key", key]
    with subprocess.Popen([sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = json.loads(process.stdout.readline())["url"]
            with httpx.Client(base_url=url, verify=trusted) as client:
                deadline = time.monotonic() + 120
                while client.get("/health/ready").status_code != 200:
                    assert client.get("/health/live").status_code == 200 and time.monotonic() < deadline
                    time.sleep(0.2)
                ticket = client.post("/session").json()["ticket"]
            assert url.startswith("https://")
            address = url.replace("https", "wss") + "/stream"
            with connect(address, subprotocols=["streamflow", ticket], ssl=trusted) as ws:
                drawn(ws, 2)
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0  # five on a machine that does nothing else
        finally:
            process.kill()


# -- a video model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "helios"
    random_pipeline("helios").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def showing(video_model, monkeypatch):
    monkeypatch.setattr(pipeline_helios, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    arguments = {"num_latent_frames_per_chunk": 3}
    given = {"model": video_model, "prompt": "a fox", "width": 32, "height": 32, "cfg_type": "full"}
    running = Running(given={**given, "video": config.VideoModel(arguments=arguments)}, max_viewers=3)
    yield running
    running.close()


@pytest.mark.slow
def test_all_viewers_see_one_video_and_one_changes_it_for_all(showing):
    with showing.viewer() as one, showing.viewer() as two:
        welcome = heard(one, "welcome")[0]
        assert (
            welcome["limits"]["video"] and welcome["settings"]["prompt"] == "a fox" and welcome["settings"]["guidance"] == 1
        )
        assert (welcome["width"], welcome["height"]) == (32, 32) and heard(two, "welcome")
        seen = {}, {}
        for _ in range(20):
            for ws, frames in zip((one, two), seen, strict=True):
                said, data = heard(ws, "image")
                frames[said["frame"]] = data
        both = seen[0].keys() & seen[1].keys()
        assert len(both) > 5 and all(seen[0][frame] == seen[1][frame] for frame in both)
        assert sorted(seen[0]) == list(seen[0])
        put(one, prompt="a lighthouse", seed=5)
        followed = heard(two, "settings")[0]
        assert followed["shared"] and (followed["settings"]["prompt"], followed["settings"]["seed"]) == ("a lighthouse", 5)
        stream = showing.service.worker.slots["model"][0].stream
        assert stream.seed == 5
        with showing.viewer() as late:
            assert heard(late, "welcome")[0]["settings"]["prompt"] == "a lighthouse" and heard(late, "image")
    gone(showing.service)


@pytest.mark.slow
def test_what_a_shared_video_does_not_take_is_reported_and_taken_back(showing):
    with showing.viewer() as ws:
        for fields in ({"mode": "image"}, {"steps": 3}, {"other": "a dog", "blend": 0.5}):
            put(ws, **fields)
            assert (
                "a video that all viewers share takes prompt, negative, guidance, seed only"
                in heard(ws, "error")[0]["message"]
            )
            assert heard(ws, "settings")[0]["settings"] == showing.service.request.model_dump()
        assert heard(ws, "image") and showing.service.worker.restarts == 0
        put(ws, guidance=3.0)
        put(ws, running=False)
    gone(showing.service)
    show = next(one for one in threading.enumerate() if one.name == "streamflow live drawing")
    drawn = show.drawn
    time.sleep(0.5)
    assert show.drawn <= drawn + 18, "no viewer watches, and the video pauses"


@pytest.mark.slow
def test_a_change_that_fails_leaves_the_video_and_an_error_of_the_thread_opens_it_again(showing, monkeypatch):
    worker = showing.service.worker
    with showing.viewer() as ws:
        heard(ws, "image")
        stream = worker.slots["model"][0].stream
        real = stream.update

        def failing(**changes):
            stream.update = real
            raise MemoryError("secret words")

        stream.update = failing
        put(ws, prompt="secret words")
        assert heard(ws, "error")[0]["message"] == "the change failed (MemoryError)"
        assert heard(ws, "settings")[0]["settings"]["prompt"] == "a fox" and heard(ws, "image")
        put(ws, prompt="a lighthouse")

        def ended(*_):
            del worker._apply
            raise SystemExit

        while worker.request.prompt != "a lighthouse":
            time.sleep(0.01)
        worker._apply = ended
        put(ws, seed=9)
        while worker.restarts == 0 or not worker.ready.is_set() or worker.request.seed != 9:
            heard(ws, "image") if worker.ready.is_set() else time.sleep(0.01)
        assert heard(ws, "image") and worker.slots["model"][0].stream is not stream
        assert worker.slots["model"][0].stream.seed == 9 and worker.request.prompt == "a lighthouse"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": Server(models={"other": "embedded"})}, "server.models: a video model does not use it"),
        ({"references": ("a.png",)}, "references: a video model does not use it"),
        ({"model": "embedded", "video": config.VideoModel(image="a.png")}, "video.image: embedded is no video model"),
    ],
)
def test_settings_that_a_video_has_not_are_refused(changes, message, video_model):
    with pytest.raises(ValueError, match=message):
        Service(Settings(**{"model": video_model, **changes}), tokens.Tokens())
