"""The files of integrations/touchdesigner, in plain Python: StreamFlow's OSC receiver takes what they send, and what they
show comes from its MJPEG page. TouchDesigner's operators are stood in for by the few attributes that the files use.
"""

import ast
import importlib
import re
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_control_input import extras, until
from test_osc_page import LiveShow, Show, value_of

from streamflow.app import config
from streamflow.io import TimedImage
from streamflow.io.mjpeg_server import MjpegSink

FOLDER = Path(__file__).resolve().parents[1] / "integrations/touchdesigner"
FILES = sorted(FOLDER.glob("*.py"))


@pytest.fixture
def kit(monkeypatch):
    """`kit("name")`: a file, imported as TouchDesigner imports a Text DAT of the component."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for path in FILES:
        sys.modules.pop(path.stem, None)


# -- what stands in for TouchDesigner ---------------------------------------------------------------------------------------


class Par(SimpleNamespace):
    def eval(self):
        return self.val


class Page:
    def __init__(self, owner, name):
        self.owner, self.name, self.pars = owner, name, []

    def _append(self, name, label, val):
        assert re.fullmatch(r"[A-Z][a-z0-9]*", name), f"TouchDesigner refuses the name {name}"
        par = Par(name=name, label=label, owner=self.owner, page=self, val=val)
        setattr(self.owner.par, name, par)
        self.pars.append(par)
        return (par,)

    def appendStr(self, name, label):
        return self._append(name, label, "")

    def appendInt(self, name, label):
        return self._append(name, label, 0)

    def appendFloat(self, name, label):
        return self._append(name, label, 0.0)

    def appendToggle(self, name, label):
        return self._append(name, label, False)

    def appendPulse(self, name, label):
        return self._append(name, label, False)

    def destroy(self):
        for par in self.pars:
            delattr(self.owner.par, par.name)
        self.owner.customPages.remove(self)


class Operator:
    """A component or a Script TOP: custom parameters, and what a Script TOP shows. extension: promoted."""

    path = "/project1/streamflow"

    def __init__(self):
        self.par, self.customPages, self.images, self.warnings = SimpleNamespace(), [], [], []
        self.extension = None

    def appendCustomPage(self, name):
        self.customPages.append(Page(self, name))
        return self.customPages[-1]

    def copyNumpyArray(self, array):
        assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 4 and array.flags.c_contiguous
        self.images.append(array)

    def addWarning(self, text):
        self.warnings.append(text)

    def __getattr__(self, name):  # TouchDesigner promotes the extension's members with a capital
        if name[0].isupper() and self.extension is not None:
            return getattr(self.extension, name)
        raise AttributeError(name)


def component(kit, **ports):
    owner = Operator()
    owner.extension = kit("StreamFlowExt").StreamFlowExt(owner)
    for name, port in ports.items():
        getattr(owner.par, name).val = port
    return owner


# -- files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_of_python_3_9_and_needs_what_touchdesigner_has(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
    nodes = list(ast.walk(tree))
    names = {one.module for one in nodes if isinstance(one, ast.ImportFrom)}
    names |= {alias.name for one in nodes if isinstance(one, ast.Import) for alias in one.names}
    allowed = {*sys.stdlib_module_names, "numpy", "cv2", "streamflow_link"}
    assert {name.split(".")[0] for name in names} <= allowed
    assert not any(isinstance(one, ast.Match) for one in nodes)


def test_the_settings_of_the_stage_are_valid():
    stage = config.load(FOLDER / "stage.yaml")
    assert stage.control.page == 9001 and stage.control.osc == "127.0.0.1:9000"
    assert stage.live.sinks == ("ndi:StreamFlow", "mjpeg:8080")
    assert all(one.address.startswith("osc:/") for one in stage.control.mappings)


# -- OSC --------------------------------------------------------------------------------------------------------------------

MESSAGES = [
    ("/guidance", 0.5),
    ("/seed", 7),
    ("/seed", 1 - 2**31),
    ("/large", 2**31),
    ("/text", "été"),
    ("/text", ""),
    ("/four", "four"),
    ("/many", 1, 2.5, "three", 4),
    ("/none",),
]


@extras
@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_a_message_is_the_one_that_python_osc_builds(message, kit):
    from pythonosc.osc_message_builder import OscMessageBuilder

    address, *values = message
    builder = OscMessageBuilder(address)
    for value in values:
        builder.add_arg(float(value) if value == 2**31 else value)
    assert kit("streamflow_link").encode(address, *values) == builder.build().dgram


@pytest.mark.parametrize(
    ("message", "error", "says"),
    [
        (("guidance", 1), ValueError, "begins with '/'"),
        (("/a", float("nan")), ValueError, "finite"),
        (("/a", 1e300), ValueError, "finite"),
        (("/a", 10**400), ValueError, "finite"),
        (("/a", None), TypeError, "numbers and texts, not None"),
        (("/a", True), TypeError, "not True"),
        (("/a", "x\0y"), ValueError, "zero byte"),
    ],
    ids=str,
)
def test_what_osc_does_not_have_is_refused(message, error, says, kit):
    with pytest.raises(error, match=says):
        kit("streamflow_link").encode(*message)


def test_what_converts_to_a_float_is_sent_as_one(kit):
    class Channel:  # of a CHOP, in TouchDesigner
        def __float__(self):
            return 0.5

    encode = kit("streamflow_link").encode
    assert encode("/a", Channel(), np.float32(0.5)) == encode("/a", 0.5, 0.5)


# -- the extension ----------------------------------------------------------------------------------------------------------

MAPPINGS = (
    {"address": "osc:/guidance", "field": "guidance_scale", "range": (1, 8)},
    {"address": "osc:/Look/seed_1", "field": "seed", "range": (0, 100), "source": (100, 0)},
    {"address": "osc:/look-seed1", "field": "delta"},
    {"address": "osc:/host", "field": "feedback"},
    {"address": "osc:/1", "field": "strength"},
    {"address": "osc:/prompt", "field": "prompt"},
)


@extras
def test_knobs_become_parameters_and_parameters_reach_the_stream(kit):
    show = Show(guidance_scale=4.5, seed=25, prompt="a fox")
    with show.open(MAPPINGS) as controls:
        owner = component(kit, Pageport=controls.page.port)
        own = owner.appendCustomPage("Mine").appendFloat("Knob1", "of the component's owner")[0]
        execute = kit("parameter_callbacks")
        execute.onPulse(owner.par.Refresh)
        knobs = {par.name: (par.label, par.val) for par in owner.customPages[-1].pars}
        assert knobs == {
            "Guidance": ("/guidance", 0.5),
            "Lookseed1": ("/Look/seed_1", 75),
            "Lookseed1x": ("/look-seed1", 0),
            "Hostx": ("/host", 0),
            "Knob1x": ("/1", 0),
            "Prompt": ("/prompt", "a fox"),
        }
        assert (owner.par.Lookseed1.min, owner.par.Lookseed1.max) == (0, 100)
        assert owner.par.Oscport.val == controls.osc_bound[1] and owner.par.Host.val == "127.0.0.1"
        for par in owner.customPages[-1].pars:  # as TouchDesigner calls after the parameters are made
            execute.onValueChange(par, None)
        owner.par.Guidance.val, owner.par.Prompt.val = 0.0, "été"
        for name in ("Guidance", "Prompt", "Host", "Pageport"):
            execute.onValueChange(getattr(owner.par, name), None)
        owner.Send("/1", 1)
        until(lambda: controls.tick(time.monotonic()) or "strength" in show.fields)
        assert show.fields == {"guidance_scale": 1, "seed": 25, "prompt": "été", "strength": 1}
        owner.Refresh()
        assert [page.name for page in owner.customPages] == ["StreamFlow", "Mine", "Knobs"] and owner.par.Prompt.val == "été"
        assert owner.par.Knob1 is own
        owner.Close()
        owner.Send("/guidance", 0.5)
        until(lambda: controls.tick(time.monotonic()) or show.fields["guidance_scale"] == 4.5)
        owner.Close()


def test_a_page_that_does_not_answer_changes_nothing(kit):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        owner = component(kit, Pageport=one.getsockname()[1])
        with pytest.raises(OSError):
            owner.Refresh()
    assert [page.name for page in owner.customPages] == ["StreamFlow"]
    owner.OnValueChange(owner.par.Host)
    again = kit("StreamFlowExt").StreamFlowExt(owner)  # as when the project is opened again
    assert len(owner.customPages) == 1
    again.Close()


# -- images -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def top(kit, monkeypatch):
    """A Script TOP with its callbacks, and the module of these."""
    pytest.importorskip("cv2", reason="needs OpenCV, which TouchDesigner has")
    callbacks = kit("script_top_callbacks")
    monkeypatch.setattr(callbacks, "CookLevel", SimpleNamespace(ALWAYS="always"), raising=False)
    monkeypatch.setattr(kit("streamflow_link"), "PAUSE", 0.05)
    made = Operator()
    callbacks.onSetupParameters(made)
    yield made, callbacks
    callbacks.close(made)
    assert not [one for one in threading.enumerate() if one.name == "streamflow frames"]


def image():
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :, 0], pixels[16:, :, 2] = 255, 255  # red above blue
    return TimedImage(pixels, 0.0)


def test_the_script_top_shows_the_newest_image_the_right_way_up(top):
    made, callbacks = top
    assert callbacks.onGetCookLevel(made) == "always"
    sink = MjpegSink(port=0)
    sink.open()
    made.par.Url.val = f"http://127.0.0.1:{sink.port}/"

    def cook():
        sink.write(image())
        callbacks.onCook(made)
        return made.images

    until(cook)
    shown = made.images[0]
    assert shown.shape == (32, 48, 4) and (shown[..., 3] == 255).all()
    assert np.abs(shown[4, 20, :3].astype(int) - (0, 0, 255)).max() < 12, "the first row is at the bottom"
    assert np.abs(shown[28, 20, :3].astype(int) - (255, 0, 0)).max() < 12
    made.warnings.clear()
    sink.close()
    port, count = sink.port, len(made.images)
    until(lambda: callbacks.onCook(made) or made.warnings)
    assert f"http://127.0.0.1:{port}/: " in made.warnings[0] and len(made.images) <= count + 1
    sink = MjpegSink(port=port)
    sink.open()
    made.images.clear()
    until(cook)
    callbacks.onCook(made)
    made.par.Active.val = False
    callbacks.onCook(made)
    assert callbacks.frames == {}
    sink.close()


def test_an_address_that_is_no_page_of_images_is_said(top, kit):
    made, callbacks = top
    with Show().open((), osc=None) as controls:
        made.par.Url.val = f"http://127.0.0.1:{controls.page.port}/"
        until(lambda: callbacks.onCook(made) or "no MJPEG page: 200 OK, text/html" in made.warnings[-1])
    with pytest.raises(ValueError, match="such as http://127.0.0.1:8080/"):
        kit("streamflow_link").Frames("ndi:StreamFlow")
    assert made.images == []


@extras
@pytest.mark.slow
def test_the_kit_and_a_real_show(top, kit):
    """Knobs of `streamflow live` move by the extension, and the Script TOP shows what it draws."""
    made, callbacks = top
    mjpeg = MjpegSink(port=0)
    mjpeg.open()
    port = mjpeg.port
    mjpeg.close()
    with LiveShow("--out", f"mjpeg:{port}", mappings=MAPPINGS[:2]) as show:
        seed = value_of(show.page, "/Look/seed_1")
        owner = component(kit, Pageport=show.page)
        owner.Refresh()
        owner.par.Lookseed1.val = 40.0
        owner.OnValueChange(owner.par.Lookseed1)
        until(lambda: value_of(show.page, "/Look/seed_1") == 60)
        assert seed == 2 and value_of(show.page, "/guidance") is not None
        made.par.Url.val = f"http://127.0.0.1:{port}/"
        until(lambda: callbacks.onCook(made) or len(made.images) > 1)
        owner.Close()
    assert made.images[-1].shape == (128, 128, 4) and made.images[-1][..., :3].std() > 5
