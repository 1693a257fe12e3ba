"""The page of controls: it shows every knob with its present value, moves those of OSC, and serves this machine alone."""

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, suppress
from types import SimpleNamespace

import pytest
from test_control_input import extras, send, until  # noqa: F401 - `send` is a fixture

from streamflow.app import config
from streamflow.app.commands import live
from streamflow.live.remote import Control, Mapping, open_control
from streamflow.live.remote.knobs import Knobs
from streamflow.live.remote.page import ControlPage

MAPPINGS = (
    {"address": "osc:/guidance", "field": "guidance_scale", "range": (1, 8)},
    {"address": "osc:/seed", "field": "seed", "range": (0, 100), "source": (100, 0)},
    {"address": "osc:/text", "field": "prompt"},
    {"address": "osc:/<b>", "field": "prompt_weights.1", "smoothing": 0.5},
)


def get(port, path="/osc.json"):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return json.load(answer) if path == "/osc.json" else answer.read().decode()


def post(port, data, path="/osc", **headers):
    """The status of a POST, and the error that it returns."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        said = answer.read().decode()
        return answer.status, json.loads(said)["error"] if said.startswith("{") else said


def value_of(port, address, key="value"):
    return {one["address"]: one for part in get(port).values() for one in part["addresses"]}[address][key]


class Show:
    """What a stream is for the controls: fields that `update` changes."""

    def __init__(self, **fields):
        self.fields = fields

    def update(self, **fields):
        if fields.get("guidance_scale", 0) > 7:
            raise ValueError("the guidance is too strong")
        self.fields |= fields

    def open(self, mappings=MAPPINGS, **settings):
        given = {"osc": "127.0.0.1:0", "page": 0, **settings}
        made = Control(mappings=tuple(Mapping(**one) for one in mappings), **given)
        return open_control(made, self.update, present=lambda: self.fields)


@pytest.fixture
def shown():
    show = Show(guidance_scale=4.5, seed=25, prompt=(("a fox", 0.5), ("an apple", 0.5)))
    with show.open() as controls:
        yield show, controls, controls.page.port


@extras
def test_the_json_describes_every_knob(shown):
    _, controls, port = shown
    found = get(port)
    assert found["osc"]["host"] == "127.0.0.1" and found["osc"]["port"] == controls.osc_bound[1]
    assert [one["address"] for one in found["osc"]["addresses"]] == ["/guidance", "/seed", "/text", "/<b>"]
    guidance, seed, text, weight = found["osc"]["addresses"]
    assert guidance == {
        "address": "/guidance",
        "field": "guidance_scale",
        "type": "number",
        "source": [0, 1],
        "range": [1, 8],
        "smoothing": 0,
        "value": 4.5,
        "at": 0.5,
        "refused": None,
    }
    assert (seed["source"], seed["range"], seed["value"], seed["at"]) == ([100, 0], [0, 100], 25, 75)
    assert (text["type"], text["range"], text["at"]) == ("text", None, None)
    assert text["value"] == [["a fox", 0.5], ["an apple", 0.5]]
    assert (weight["smoothing"], weight["value"], weight["at"]) == (0.5, None, None)
    assert found["midi"] == {"port": None, "addresses": []} and found["sound"] == {"inputs": [], "addresses": []}


def test_midi_and_sound_are_described():
    """The page alone, since this machine may have no devices."""
    mappings = (
        {"address": "midi:cc:1:74", "field": "delta"},
        {"address": "midi:tempo", "field": "feedback"},
        {"address": "audio:level", "field": "strength"},
        {"address": "link:beat", "field": "seed", "range": (0, 4)},
    )
    mappings = tuple(Mapping(**one) for one in mappings)
    settings = Control(page=0, midi="nanoKONTROL2", sound=("audio:default", "link:"), mappings=mappings)
    with closing(ControlPage(settings, None, Knobs(mappings), lambda: {"delta": 0.25}, {})) as page:
        found = get(page.port)
        assert post(page.port, {"address": "midi:cc:1:74", "value": 1})[0] == 404
    assert found["osc"] == {"host": None, "port": None, "addresses": []}
    assert found["midi"]["port"] == "nanoKONTROL2" and found["sound"]["inputs"] == ["audio:default", "link:"]
    controller, tempo = found["midi"]["addresses"]
    assert (controller["address"], controller["source"], controller["at"]) == ("midi:cc:1:74", [0, 127], 31.75)
    assert (tempo["address"], tempo["source"]) == ("midi:tempo", [60, 180])
    assert [one["address"] for one in found["sound"]["addresses"]] == ["audio:level", "link:beat"]


@extras
def test_values_follow_osc_and_the_page_moves_knobs_as_osc_does(shown, send):  # noqa: F811
    show, controls, port = shown
    send(controls, "/guidance", 0.0)
    until(lambda: controls.tick(time.monotonic()) or show.fields["guidance_scale"] == 1)
    assert value_of(port, "/guidance") == 1 and value_of(port, "/guidance", "at") == 0
    for address, value in (("/guidance", 5), ("/guidance", 0.2), ("/seed", 40), ("/text", "été"), ("/<b>", 0.5)):
        assert post(port, {"address": address, "value": value}) == (204, "")
    controls.tick(time.monotonic())
    assert show.fields["guidance_scale"] == pytest.approx(2.4) and show.fields["seed"] == 60
    assert show.fields["prompt"] == "été" and show.fields["prompt_weights"] == [1.0, 0.5]
    assert value_of(port, "/text") == "été" and value_of(port, "/seed", "at") == 40


@extras
def test_a_value_that_the_stream_refuses_is_said(shown):
    show, controls, port = shown
    for value, refused in ((1, "the guidance is too strong"), (0.5, None)):
        assert post(port, {"address": "/guidance", "value": value})[0] == 204
        controls.tick(time.monotonic())
        assert value_of(port, "/guidance", "refused") == refused
    assert show.fields["guidance_scale"] == 4.5


@extras
def test_what_is_learned_comes_to_the_page(shown):
    _, controls, port = shown
    controls.learn("delta")
    for value in (0, 1):
        controls.receive("osc:/new", value)
    assert [one["address"] for one in get(port)["osc"]["addresses"]][-1] == "/new"


WRONG = {
    "no JSON": (b"{", 400, "Expecting"),
    "no UTF-8": (b"\xff", 400, "decode"),
    "nested": (b"[" * 30_000, 400, "recursion"),
    "no object": ([1], 400, "address and a value"),
    "no value": ({"address": "/guidance"}, 400, "address and a value"),
    "more": ({"address": "/guidance", "value": 1, "field": "seed"}, 400, "address and a value"),
    "an address that is none": ({"address": 3, "value": 1}, 400, "address and a value"),
    "unknown": ({"address": "/gidance", "value": 1}, 404, "no knob has the OSC address /gidance"),
    "another input": ({"address": "audio:level", "value": 1}, 404, "audio:level"),
    "a text": ({"address": "/guidance", "value": "loud"}, 400, "guidance_scale takes one finite number"),
    "a bool": ({"address": "/guidance", "value": True}, 400, "one finite number"),
    "a list": ({"address": "/guidance", "value": [1]}, 400, "one finite number"),
    "NaN": (b'{"address": "/guidance", "value": NaN}', 400, "one finite number"),
    "a number": ({"address": "/text", "value": 3}, 400, "prompt takes one text"),
    "too large": ({"address": "/text", "value": "x" * 2**15}, 413, "32,768 bytes"),
}


@extras
def test_wrong_values_are_refused_and_change_nothing(shown):
    show, controls, port = shown
    before = dict(show.fields)
    for name, (data, status, says) in WRONG.items():
        found = post(port, data)
        assert found[0] == status and says in found[1], (name, found)
    good = {"address": "/seed", "value": 1}
    assert post(port, good, path="/osc.json")[0] == 404
    assert post(port, good, Content_Type="text/plain")[0] == 415
    assert post(port, b"", Transfer_Encoding="chunked")[0] == 411
    assert post(port, b"", Content_Length="-1")[0] == 411
    controls.tick(time.monotonic())
    assert show.fields == before


@extras
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Host": "evil.example"},
        {"Host": "192.168.1.5"},
        {"Sec_Fetch_Site": "cross-site"},
    ],
    ids=str,
)
def test_pages_of_other_origins_can_neither_read_nor_post(headers, shown):
    show, controls, port = shown
    assert post(port, {"address": "/seed", "value": 1}, **headers)[0] == 403
    controls.tick(time.monotonic())
    assert show.fields["seed"] == 25
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/osc.json", headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=10)


@extras
def test_its_own_page_may_post(shown):
    port = shown[2]
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}", "Sec_Fetch_Site": "same-origin"}
    assert post(port, {"address": "/seed", "value": 1}, **own)[0] == 204


@extras
def test_the_page_and_other_paths(shown):
    port = shown[2]
    assert "StreamFlow controls" in get(port, "/") and "osc.json" in get(port, "/page.js")
    for path in ("/page.py", "/../knobs.py", "/osc", "//etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(port, path)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/")
        head = connection.getresponse().headers
    assert "frame-ancestors 'none'" in head["Content-Security-Policy"]
    assert head["Cross-Origin-Resource-Policy"] == "same-origin"


def test_it_is_off_by_default_on_this_machine_alone_and_ends_with_the_controls():
    with Show().open((), osc=None, page=None) as controls:
        assert controls.page is None
    controls = Show().open((), osc=None)
    port = controls.page.port
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for host in others - {one for one in others if one.startswith("127.")}:
        with pytest.raises(OSError):
            socket.create_connection((host, port), timeout=2)
    with pytest.raises(OSError, match=f"the page of controls cannot listen at 127.0.0.1:{port}: .*in use"):
        Show().open((), osc=None, page=port)
    controls.close()
    assert not [one for one in threading.enumerate() if one.name == "streamflow control page"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)
    Show().open((), osc=None, page=port).close()  # the port is free again


def test_a_port_is_a_number():
    with pytest.raises(config.ConfigError, match=r"control.page: Input should be less than or equal to 65535, not 65536"):
        config.parse({"control": {"page": 65536}})


# -- streamflow live ------------------------------------------------------------------------------------------------------

COMMAND = "import sys; from streamflow.app.cli import main; sys.exit(main(sys.argv[1:]))"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class LiveShow:
    """`streamflow live` with the embedded model, a process with these OSC addresses. said: its line of JSON at the end."""

    def __init__(self, *argv, mappings=MAPPINGS):
        self.osc, self.page = free_port(), free_port()
        given = ["--prompt", "[[a red apple, 1.0], [a fox, 0.0]]", "--warmup", "0", "--acceleration.kind", "none"]
        given += ["--control.osc", str(self.osc), "--osc-page", str(self.page), "--live.target-fps", "4", "--json"]
        given += ["--control.mappings", json.dumps(mappings), "--cfg-type", "full", "--num-inference-steps", "1", *argv]
        self._command = [sys.executable, "-c", COMMAND, "live", *given]

    def __enter__(self):
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(ConnectionError, urllib.error.URLError):
                if get(self.page)["osc"]["addresses"][0]["value"] is not None:
                    return self
            time.sleep(0.05)
        self._process.kill()
        raise AssertionError(f"streamflow live does not show its page: {self._process.communicate()}")

    def __exit__(self, *error):
        self._process.send_signal(signal.SIGTERM)
        out, _ = self._process.communicate(timeout=60)
        self.said = json.loads(out.splitlines()[-1])
        assert self._process.returncode == 0


@pytest.mark.slow
def test_a_video_stream_has_values_too(pipes, monkeypatch):
    from diffusers.pipelines.helios import pipeline_helios
    from test_video import stream_of

    monkeypatch.setattr(pipeline_helios, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    stream = stream_of(pipes("helios"), "np")
    for changes in ({"prompt": "a lemon", "seed": 7}, {"prompt": "a fox"}, {"seed": 8}):
        before = live._values(stream)
        stream.update(**changes)
        after = live._values(stream)
        assert all(after[name] == value != before.get(name) for name, value in changes.items())
    stream.close()


@extras
@pytest.mark.slow
def test_the_page_of_a_show_has_the_streams_values_and_ends_with_it():
    from pythonosc.udp_client import SimpleUDPClient

    with LiveShow("--out", "null") as show, SimpleUDPClient("127.0.0.1", show.osc) as osc:
        assert value_of(show.page, "/seed") == 2 and value_of(show.page, "/<b>") == 0
        osc.send_message("/seed", 40)
        until(lambda: value_of(show.page, "/seed") == 60)
        assert post(show.page, {"address": "/text", "value": "a lemon"})[0] == 204
        until(lambda: value_of(show.page, "/text") == "a lemon")
        assert post(show.page, {"address": "/guidance", "value": 0.5})[0] == 204
        until(lambda: value_of(show.page, "/guidance") == 4.5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", show.page), timeout=10)
    assert show.said["errors"] == 0 and show.said["shown"] >= 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_in_a_browser():
    """A slider and a text move the stream, what moves elsewhere moves the slider, and texts are no HTML."""
    sync_playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright").sync_playwright
    mappings = tuple(Mapping(**one) for one in MAPPINGS)
    show, knobs = Show(guidance_scale=1.0, seed=25, prompt="<img src=x onerror=alert(1)>"), Knobs(mappings)
    refused = {"seed": "no such seed"}
    settings = Control(page=0, osc="9000", mappings=mappings)
    with (
        closing(ControlPage(settings, ("127.0.0.1", 9000), knobs, lambda: show.fields, refused)) as served,
        sync_playwright() as play,
    ):
        browser = play.chromium.launch(executable_path=shutil.which("chromium"))
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"http://localhost:{served.port}/")
        page.wait_for_selector("#status:text('connected')")
        slider = page.get_by_label("Value for /guidance")
        assert slider.input_value() == "0" and page.get_by_label("Value for /seed").input_value() == "75"
        assert "<img" in page.locator("#osc").inner_text() and page.locator("#osc img").count() == 0
        assert page.get_by_text("no such seed").count() == 1 and page.get_by_text("MIDI is off").count() == 1
        slider.fill("0.5")
        page.get_by_label("Value for /text").fill("a lemon")
        page.get_by_role("button", name="Send").click()

        def moved():
            show.fields |= knobs.due(time.monotonic())
            page.wait_for_timeout(20)  # lets the browser go on
            return show.fields["guidance_scale"] == 4.5 and show.fields["prompt"] == "a lemon"

        until(moved)
        page.wait_for_selector("td:text('“a lemon”')")
        show.fields["guidance_scale"] = 8.0
        until(lambda: page.wait_for_timeout(20) or slider.input_value() == "1")
        assert errors == []
        served.close()
        page.wait_for_selector("#status:text('has ended')")
        assert slider.is_disabled()
        browser.close()


def test_a_port_in_use_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert live.main(["--out", "null", "--seconds", "1", "--osc-page", str(port)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"streamflow live: error: the page of controls cannot listen at 127.0.0.1:{port}: ")
    assert said.count("\n") == 1
