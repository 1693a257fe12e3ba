"""The style image of a viewer: one more reference of that viewer's frames, where the model takes several."""

import io
import json
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the page needs the extra web")
pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("uvicorn", reason="the page needs the extra web")
pytest.importorskip("websockets", reason="the page needs the extra web")

import PIL.Image  # noqa: E402
import torch  # noqa: E402
from random_pipelines import random_pipeline  # noqa: E402
from test_server import Running, drawn, encoded, gone, heard, put  # noqa: E402

from streamflow.app.config import parse  # noqa: E402
from streamflow.app.server.images import Style  # noqa: E402
from streamflow.app.server.messages import DrawRequest  # noqa: E402
from streamflow.app.server.slot import Slot, warm  # noqa: E402

pytestmark = pytest.mark.extras
SIZE = {"width": 64, "height": 64}
IMAGE = DrawRequest(mode="image", prompt="a red apple", steps=2, motion="still", seed=3)
TEXT = IMAGE.model_copy(update={"mode": "text"})


def scene(k, width=64, height=64):
    pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def klein():
    pipe = random_pipeline("flux2-klein", is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def slot(klein):
    return Slot(klein, parse(SIZE), {})


def turns(slot, request, style, images):
    """The last of the images that are drawn in these turns."""
    slot.apply(request, style)
    return [slot.draw(image) for image in images][-1].pixels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.usefixtures("full_float32")
def test_frames_on_a_gpu_are_the_pipelines_with_one_more_reference():
    pipe = random_pipeline("flux2-klein", is_distilled=True).to("cuda")
    test_frames_are_the_pipelines_with_one_more_reference(Slot(pipe, parse(SIZE), {}), pipe)


def test_frames_are_the_pipelines_with_one_more_reference(slot, klein):
    warm(slot, IMAGE)
    style = Style(scene(9))
    for request, image in ((IMAGE, scene(0)), (TEXT, None)):
        got = turns(slot, request, style, [image] * 3)
        noise = slot._stream.frame_noise(0)
        references = [one for one in (image, style.image) if one is not None]
        call = {**SIZE, "prompt": request.prompt, "num_inference_steps": 2, "guidance_scale": 1.0}
        (want,) = klein(image=references, latents=noise, **call).images
        assert np.abs(got.astype(int) - np.asarray(want).astype(int)).max() <= 1


@pytest.mark.parametrize("request_, image", [(IMAGE, scene(0)), (TEXT, None)], ids=["image", "text"])
def test_without_the_style_the_images_are_as_before_to_the_bit(slot, request_, image):
    plain = turns(slot, request_, None, [image] * 4)
    styled = turns(slot, request_, Style(scene(9)), [image] * 4)
    other = turns(slot, request_, Style(scene(8)), [image] * 4)
    assert not np.array_equal(plain, styled) and not np.array_equal(styled, other)
    assert np.array_equal(turns(slot, request_, None, [image] * 4), plain)
    turns(slot, request_, Style(scene(9)), [image] * 4)
    slot.reset()  # for the next viewer
    assert np.array_equal(turns(slot, request_, None, [image] * 4), plain)


def test_the_style_is_encoded_once(slot, monkeypatch):
    count, codec = [], type(slot._stream.codec)
    plain = codec.encode
    monkeypatch.setattr(codec, "encode", lambda self, pixels: count.append(len(pixels)) or plain(self, pixels))
    turns(slot, IMAGE, Style(scene(9)), [scene(k) for k in range(6)])
    assert len(count) == 6 + 1


def test_a_settled_slot_draws_again_with_another_style(slot):
    style = Style(scene(9))
    turns(slot, TEXT, None, [None] * 4)
    assert slot.settled(TEXT) and not slot.settled(TEXT, style)
    turns(slot, TEXT, style, [None] * 4)
    assert slot.settled(TEXT, style) and not slot.settled(TEXT)


def test_only_models_that_take_several_references_take_a_style(klein, slot):
    assert slot.check_style((64, 64)) and Slot(random_pipeline("sd3"), parse(SIZE), {}).check_style is None
    with pytest.raises(ValueError, match="63x64 pixels: Flux2KleinPipeline takes sides of 64"):
        slot.check_style((63, 64))
    kontext = Slot(random_pipeline("flux-kontext"), parse(SIZE), {})
    assert kontext.check_style is None
    kontext.apply(IMAGE, Style(scene(9)))  # chosen while another model was served
    assert kontext.draw(scene(0)) is not None


# -- over the network -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(klein, tmp_path_factory):
    place = tmp_path_factory.mktemp("edit")
    klein.save_pretrained(place / "klein")
    random_pipeline("flux-kontext").save_pretrained(place / "kontext")
    given = {"model": str(place / "klein"), "width": 64, "height": 64}
    running = Running(None, given, max_viewers=2, max_message_bytes=200_000, models={"one": str(place / "kontext")})
    yield running
    running.close()


def use(ws, data):
    """Send a style image, or take it away with None. Return the one in use, or None."""
    ws.send(json.dumps({"type": "style", "image": data is not None}))
    if data is not None:
        ws.send(data)
    _, shown = heard(ws, "style")
    return PIL.Image.open(io.BytesIO(shown)) if shown else None


def refused(ws, data):
    """The error of a style image that is refused."""
    ws.send(json.dumps({"type": "style", "image": True}))
    ws.send(data)
    return heard(ws, "error")[0]["message"]


def restyled(ws, k, stamp):
    """What is drawn of image k."""
    ws.send(struct.pack(">d", stamp) + png(scene(k)))
    while True:
        said, image = drawn(ws, 1)
        if said["stamp"] == stamp:
            return image.tobytes()


def test_one_viewers_images_have_the_style_and_anothers_do_not(server):
    with server.viewer() as ann, server.viewer() as bob:
        for ws in (ann, bob):
            assert heard(ws, "welcome")[0]["styled"] == ["model"]
            put(ws, mode="image", motion="still", prompt="a red apple")
        plain = restyled(ann, 0, 1.0)
        assert restyled(bob, 0, 1.0) == plain
        shown = use(ann, png(scene(9, 100, 80)))
        assert shown.size == (64, 64) and shown.format == "JPEG"
        styled = restyled(ann, 0, 2.0)
        for stamp in (3.0, 4.0):  # in turn
            assert restyled(bob, 0, stamp) == plain and restyled(ann, 0, stamp) == styled != plain
        assert use(ann, None) is None
        assert restyled(ann, 0, 5.0) == restyled(bob, 0, 5.0) == plain
        put(ann, mode="text")
        before = drawn(ann, 2)[1].tobytes()
        use(ann, png(scene(9)))
        assert drawn(ann, 2)[1].tobytes() != before
    gone(server.service)
    with server.viewer() as ws:  # in a slot that had a style
        put(ws, mode="image", motion="still", prompt="a red apple")
        assert restyled(ws, 0, 1.0) == plain
    gone(server.service)


def test_a_style_that_is_refused_changes_nothing(server):
    most = 16 * 64 * 64
    bomb = bytearray(encoded((8, 8), "PNG"))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    wrong = {
        b"no image": "is no image in JPEG, PNG, WEBP",
        encoded((64, 64), "GIF"): "is no image in JPEG, PNG, WEBP",
        png(scene(1))[:2000]: "cannot be read",
        encoded((257, 256)): f"257x256 pixels, and at most {most} are read",
        bytes(bomb): "DecompressionBombError",
        encoded((80, 63)): "a reference of 80x63 pixels: Flux2KleinPipeline takes sides of 64",
        encoded((640, 64)): "the longer at most 8 times the shorter",
        b"": "empty",
    }
    with server.viewer() as ws:
        put(ws, mode="image", motion="still", prompt="a red apple")
        use(ws, png(scene(9)))
        styled = restyled(ws, 0, 1.0)
        for data, reason in wrong.items():
            assert reason in refused(ws, data)
        assert restyled(ws, 0, 2.0) == styled
        for image in ("yes", 1, None):
            ws.send(json.dumps({"type": "style", "image": image}))
            assert heard(ws, "error")[0]["message"].startswith("image: true before a style image")
        put(ws, model="one")
        assert refused(ws, png(scene(9))) == "model: one takes no style image"
        assert restyled(ws, 0, 3.0) != styled
        put(ws, model="model")
        assert restyled(ws, 0, 4.0) == styled
    gone(server.service)
