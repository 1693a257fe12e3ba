"""A control net on the page: each viewer's frames are steered by control images made from them, and the page shows these."""

import io
import struct

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the page needs the extra web")
pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("uvicorn", reason="the page needs the extra web")
pytest.importorskip("websockets", reason="the page needs the extra web")

import PIL.Image  # noqa: E402
from random_pipelines.control import random_control  # noqa: E402
from test_control_makers import inverted  # noqa: E402
from test_server import Running, gone, heard, put  # noqa: E402
from test_server_style import IMAGE, png, scene  # noqa: E402

from streamflow import StreamFlow  # noqa: E402
from streamflow.app.config import parse  # noqa: E402
from streamflow.app.server import messages  # noqa: E402
from streamflow.app.server.app import Service  # noqa: E402
from streamflow.app.server.messages import BadMessage, DrawRequest  # noqa: E402
from streamflow.app.server.slot import ControlNet, Slot, first_request, warm  # noqa: E402
from streamflow.app.server.tokens import Tokens  # noqa: E402
from streamflow.conditioning.control_makers import ControlMaker  # noqa: E402
from streamflow.image_utils import uint8_pixels  # noqa: E402

pytestmark = pytest.mark.extras
SHOWN = IMAGE.model_copy(update={"show_control": True})


@pytest.fixture
def slots(pipes):
    """Two slots of one pipe and one control net, warm."""
    pipe = pipes("sd3")
    control = ControlNet(random_control(pipe.transformer), inverted, 0.8)
    made = [Slot(pipe, parse({"width": 64, "height": 64}), {}, control) for _ in range(2)]
    for one in made:
        warm(one, IMAGE)
    return made


def test_viewers_draw_what_the_stream_draws_and_see_their_own_control_images(slots, pipes):
    stream = StreamFlow(pipes("sd3"), width=64, height=64, cfg_type="none")
    stream.add_control("control", random_control(stream.unet), 0.8)
    images = [[scene(10 * viewer + k) for k in range(3)] for viewer in range(2)]
    for slot, request in zip(slots, (SHOWN, IMAGE), strict=True):
        slot.apply(request)
    got = [[slot.draw(own[k]) for slot, own in zip(slots, images, strict=True)] for k in range(3)]  # in turn
    for viewer in range(2):
        stream.prepare(IMAGE.prompt, num_inference_steps=2, strength=0.5, seed=3)
        for k, image in enumerate(images[viewer]):
            want = uint8_pixels(stream(image, control={"control": inverted(image)}))[0]
            assert np.array_equal(got[k][viewer].pixels, want)
    for k, image in enumerate(images[0]):
        assert np.array_equal(got[k][0].control, inverted(image)) and got[k][1].control is None
    slots[0].reset()
    slots[0].apply(IMAGE)
    assert slots[0].draw(images[1][0]).control is None


def test_settings_and_messages_that_do_not_fit_are_refused():
    canny = {"controlnet": {"net": "owner/net", "maker": "canny"}}
    for given, says in {
        "needs a control maker such as 'canny'": {"controlnet": {"net": "owner/net"}},
        "no control maker is named 'cany'": {"controlnet": {"maker": "cany"}},
        "'depth' needs a model": {"controlnet": {"maker": "depth"}},
        "a control net fits one model: leave other of server.models out": {**canny, "server": {"models": {"other": "a/b"}}},
    }.items():
        with pytest.raises(ValueError, match=given):
            Service(parse(says), Tokens())
    assert parse({"controlnet": {"net": "", "maker": "", "maker_model": ""}}) == parse({}), "empty texts are left out"
    assert first_request(parse(canny)).mode == "image" and first_request(parse({})).mode == "text"
    assert messages.changed(IMAGE, {"show_control": True, "model": "m"}, ("m",), 8, control=True).show_control
    service = Service(parse(canny), Tokens())
    service.worker.models = ("m",)
    assert service.changed(IMAGE, {"show_control": True, "model": "m"}).show_control
    with pytest.raises(BadMessage, match="choose image"):
        service.changed(IMAGE, {"mode": "text", "model": "m"})
    with pytest.raises(BadMessage, match="mode: control images are made from images: choose image"):
        messages.changed(IMAGE, {"mode": "text", "model": "m"}, ("m",), 8, control=True)
    with pytest.raises(BadMessage, match="show_control: this server draws without a control net"):
        messages.changed(DrawRequest(), {"show_control": True, "model": "m"}, ("m",), 8)


@pytest.mark.slow
def test_a_control_image_is_sent_before_the_image_of_a_viewer_that_wants_it(pipes, tmp_path):
    pytest.importorskip("cv2", reason="needs OpenCV")
    pipe = pipes("sd3")
    pipe.save_pretrained(tmp_path / "model")
    random_control(pipe.transformer).save_pretrained(tmp_path / "net")
    net = {"net": str(tmp_path / "net"), "maker": "canny"}
    given = parse({"model": str(tmp_path / "model"), "width": 64, "height": 64, "controlnet": net})
    running = Running(None, {name: getattr(given, name) for name in given.model_fields_set}, max_viewers=2)
    try:
        with running.viewer() as ann, running.viewer() as bob:
            for ws in (ann, bob):
                welcome, _ = heard(ws, "welcome")
                assert welcome["limits"]["control"] and welcome["settings"]["mode"] == "image"
                put(ws, motion="still", prompt="a red apple", steps=2)
            bob.send('{"type": "set", "settings": {"mode": "text"}}')
            assert "choose image" in heard(bob, "error")[0]["message"]
            put(ann, show_control=True)
            for ws, k in ((bob, 1), (ann, 2)):
                ws.send(struct.pack(">d", 1.0) + png(scene(k)))
            _, data = heard(ann, "control")
            shown = PIL.Image.open(io.BytesIO(data))
            want = ControlMaker("canny")(scene(2))
            assert shown.format == "JPEG" and np.abs(np.asarray(shown).astype(int) - np.asarray(want)).mean() < 20
            assert heard(ann, "image")[0]["stamp"] == 1.0, "the image follows its control image"
            put(ann, show_control=False)
            for stamp in (2.0, 3.0):
                for ws in (ann, bob):
                    ws.send(struct.pack(">d", stamp) + png(scene(3)))
                    types = []
                    while "image" not in types:
                        message = ws.recv(30)
                        if isinstance(message, bytes):
                            types.append("control" if b'"control"' in message[:64] else "image")
                    ws.send('{"type": "ack"}')
                    assert "control" not in types
        gone(running.service)
    finally:
        running.close()
