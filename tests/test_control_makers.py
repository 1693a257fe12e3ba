"""Control images made from the frames: to the bit those that are made beforehand, and no frame with another one's."""

from __future__ import annotations

import sys
import threading
import time
from types import MappingProxyType

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import PROMPT
from random_pipelines.control import random_control

from streamflow import StreamFlow, StreamFlowWrapper
from streamflow.app import config
from streamflow.app.server.settings import UNUSED
from streamflow.conditioning import control_makers
from streamflow.conditioning.control_makers import ControlMaker, as_maker
from streamflow.image_utils import uint8_pixels
from streamflow.samples import IMAGE
from streamflow.stream.frames import Input

STEPS = 4
CASES = MappingProxyType({"sd3": {"max_sequence_length": 40}, "instaflow": {}})  # nets of latents, and of pixels


def inverted(image: PIL.Image.Image) -> PIL.Image.Image:
    """A control image that differs from frame to frame, without OpenCV."""
    return PIL.Image.fromarray(255 - np.asarray(image))


@pytest.fixture
def stream_of(pipes):
    """`stream_of(family, maker, **options)`: an image-to-image stream with a control net, and what is drawn of it."""

    def make(family: str = "sd3", maker=None, **options) -> StreamFlow:
        stream = StreamFlow(pipes(family), range(1, STEPS), cfg_type="none", family=family, **options)
        network = getattr(stream.pipe, "unet", None) or stream.pipe.transformer
        stream.add_control("edges", random_control(network), maker=maker)
        stream.prepare(PROMPT, num_inference_steps=STEPS, **CASES[family])
        return stream

    return make


def drawn(stream: StreamFlow, images, controls) -> torch.Tensor:
    inputs = [Input(one, control=control) for one, control in zip(images, controls, strict=True)]
    return torch.stack([frame.image for frame in stream.frames(inputs)])


@pytest.mark.parametrize(
    "family, frames", [("sd3", 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("sd3", 1), ("instaflow", 2)))]
)
def test_frames_have_the_bits_of_those_whose_control_images_are_made_beforehand(family, frames, stream_of, picture):
    pictures = [picture(k) for k in range(5)]
    stream = stream_of(family, frame_buffer_size=frames)
    made = drawn(stream, pictures, [{"edges": inverted(one)} for one in pictures])
    assert not torch.equal(made, drawn(stream, pictures, [{"edges": one} for one in pictures])), "the net acts"
    stream.prepare(PROMPT, num_inference_steps=STEPS, **CASES[family])
    assert torch.equal(drawn(stream, pictures, [inverted] * 5), made)
    stream.prepare(PROMPT, num_inference_steps=STEPS, **CASES[family])
    mixed = [{"edges": inverted}, {"edges": inverted(pictures[1])}, inverted, {"edges": inverted(pictures[3])}, inverted]
    assert torch.equal(drawn(stream, pictures, mixed), made)
    stream.prepare(PROMPT, num_inference_steps=STEPS, **CASES[family])
    stream.set_control_maker("edges", inverted)
    assert torch.equal(torch.stack([frame.image for frame in stream.frames(pictures)]), made)


@pytest.mark.parametrize("frames", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_calls_with_several_frames_and_several_nets(frames, stream_of, picture):
    made, given = stream_of(frame_buffer_size=frames), stream_of(frame_buffer_size=frames)
    for stream in (made, given):
        stream.add_control("other", random_control(stream.unet, seed=1))
    for k in range(4):
        images = [picture(frames * k + i) for i in range(frames)]
        beforehand = {"edges": [inverted(one) for one in images], "other": images}
        expected = given(images, control=beforehand)
        assert torch.equal(made(images, control={"edges": inverted, "other": images}), expected)
    with pytest.raises(ValueError, match="one control net, and there are edges, other"):
        made(images, control=inverted)


def test_images_of_another_size_and_a_sequential_stream(stream_of, picture):
    image = picture(1, (96, 80))
    stream = stream_of(use_denoising_batch=False)
    assert (stream.width, stream.height) != image.size
    as_seen = PIL.Image.fromarray(uint8_pixels(stream.preprocess(image))[0])
    seen = []
    assert torch.equal(
        stream(image, control=lambda one: seen.append(one) or inverted(one)),
        stream(image, control={"edges": inverted(as_seen)}),
    )
    assert seen[0].size == (stream.width, stream.height) and seen[0].mode == "RGB"


def test_a_maker_runs_once_a_drawn_frame_in_order_and_beside_the_encoding(stream_of, picture):
    threads, counted, encoding = [], [], threading.Event()

    def maker(image):
        assert encoding.wait(60), "the frame is encoded meanwhile"
        threads.append(threading.current_thread())
        counted.append(np.asarray(image)[0, 0].tolist())
        return inverted(image)

    stream = stream_of(maker=maker)
    encode = stream._model.encode
    stream._model.encode = lambda images: encoding.set() or encode(images)
    for _ in stream.frames(picture(k) for k in range(4)):
        encoding.clear()
    assert counted == [np.asarray(picture(k))[0, 0].tolist() for k in range(4)]
    assert threading.current_thread() not in threads and not any(one.is_alive() for one in threads)


def test_a_frame_that_the_filter_skips_makes_no_control_image(stream_of, picture):
    made = []

    def maker(image):
        made.append(image)
        return inverted(image)

    stream = stream_of()
    stream.enable_similar_image_filter(threshold=0.99, max_skip_frame=100)
    same = [stream(picture(), control=maker) for _ in range(8)]
    assert len(made) < 8 and stream.similar_filter.skip_count == 8 - len(made)
    count = len(made)
    assert torch.equal(same[-1], stream(picture(), control=maker)) and len(made) == count
    stream(picture(), control=lambda image: maker(image))
    assert len(made) == count + 1, "another maker draws an equal image anew"
    frames = list(stream_of(maker=maker).frames([]))
    assert frames == []


def test_threads_that_share_a_maker_wait_for_each_other(monkeypatch):
    """As the streams of several models do on a page, where an error may leave a maker running."""
    inside, most = [], []

    def make(image):
        inside.append(image)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return image

    monkeypatch.setitem(control_makers.PLAIN, "canny", lambda: make)
    maker, image = ControlMaker("canny"), PIL.Image.new("RGB", (8, 8))
    threads = [threading.Thread(target=maker, args=(image,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_an_error_of_a_maker_loses_no_frame(stream_of, picture):
    failing = [False]

    def maker(image):
        if failing[0]:
            raise RuntimeError("no edges today")
        return inverted(image)

    whole, broken = stream_of(maker=inverted), stream_of(maker=maker)
    pictures = [picture(k) for k in range(6)]
    expected = [whole(one) for one in pictures] + whole.flush()
    found = []
    for k, one in enumerate(pictures):
        if k in (0, 2, 5):
            failing[0] = True
            with pytest.raises(RuntimeError, match="no edges today"):
                broken(picture(9))
            failing[0] = False
        found.append(broken(one))
    found += broken.flush()
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_frames_that_have_entered_stay_where_a_maker_ends_the_loop(stream_of, picture):
    stream = stream_of(maker=inverted)

    def images(last):
        yield picture(0)
        yield picture(1)
        yield last()

    def flushed(last):
        with pytest.raises(ZeroDivisionError):
            list(stream.frames(images(last)))
        latents = stream.flush()
        stream.prepare(PROMPT, num_inference_steps=STEPS, **CASES["sd3"])
        return torch.stack(latents)

    expected = flushed(lambda: 1 / 0)
    assert len(expected) == 2
    assert torch.equal(flushed(lambda: Input(picture(2), control=lambda image: 1 / 0)), expected)


def test_what_cannot_be_is_refused_and_nothing_has_changed(stream_of, picture, monkeypatch):
    stream = stream_of()
    missing = dict.fromkeys(("cv2", "controlnet_aux"))

    def without(call):
        with monkeypatch.context() as patched:
            for name in missing:
                patched.setitem(sys.modules, name, None)
            control_makers._named.cache_clear()
            return call()

    refused = {
        "no control maker is named 'cany': choose one of canny, lineart, depth": lambda: stream(picture(), control="cany"),
        "'depth' needs a model, .*ControlMaker\\('depth', model='depth-": lambda: stream(
            picture(), control={"edges": "depth"}
        ),
        "'pose' needs a model": lambda: stream.set_control_maker("edges", "pose"),
        "'canny' needs no model, and 'x' was": lambda: ControlMaker("canny", "x"),
        r"pip install 'streamflow-rf\[control-images\]'": lambda: without(lambda: stream(picture(), control="canny")),
        "pip install controlnet-aux": lambda: without(lambda: ControlMaker("soft-edge", "owner/name")),
        "image of control 'edges' is to be made from the frame's own image": lambda: stream.txt2img(control=inverted),
        "frame that is drawn from noise has none: pass": lambda: next(stream.frames([Input(control={"edges": inverted})])),
        "no image for control 'edges'": lambda: stream(picture(), control={"edges": None}),
        "or a maker such as 'canny', not Image: pass control={'edges'": lambda: stream(picture(), control=picture()),
        "2 images for control 'edges' of 1 frames": lambda: stream(picture(), control=lambda image: [image, image]),
        "no control is named 'depth'": lambda: stream.set_control_maker("depth", inverted),
        "ControlMaker or a function of an image, not int": lambda: stream.set_control_maker("edges", 3),
        "no control maker is named 'x'": lambda: stream.add_control("more", random_control(stream.unet), maker="x"),
    }
    expected = stream(picture(), control={"edges": inverted(picture())})
    stream.reset()
    for message, call in refused.items():
        with pytest.raises((TypeError, ValueError, ImportError), match=message):
            call()
    assert torch.equal(stream(picture(), control=inverted), expected) and stream.controls == {"edges": 1.0}
    stream.set_control_maker("edges", inverted)
    with pytest.raises(ValueError, match="no image for control 'edges'"):
        stream.txt2img()
    stream.set_control_maker("edges", None)
    with pytest.raises(ValueError, match="no image for control 'edges'"):
        stream(picture())
    stream.set_control_maker("edges", inverted)
    stream.remove_control("edges")
    stream.add_control("edges", random_control(stream.unet))
    with pytest.raises(ValueError, match="no image for control 'edges'"):
        stream(picture())


@pytest.mark.extras
class TestOpenCV:
    """Makers without a model."""

    @pytest.fixture(autouse=True)
    def opencv(self):
        self.cv2 = pytest.importorskip("cv2")

    @pytest.mark.parametrize("name", ["canny", pytest.param("lineart", marks=pytest.mark.slow)])
    def test_a_name_in_the_place_of_an_image(self, name, stream_of):
        image = PIL.Image.open(IMAGE).convert("RGB").resize((64, 64))
        stream = stream_of()
        made = ControlMaker(name)(image)
        expected = stream(image, control={"edges": made})
        stream.reset()
        assert torch.equal(stream(image, control=name), expected) and as_maker(name) is as_maker(name)

    @pytest.mark.parametrize("name", ["canny", "lineart"])
    def test_a_square_has_white_lines_on_black_where_its_border_is(self, name):
        image = PIL.Image.new("RGB", (64, 48), "white")
        image.paste((0, 0, 0), (20, 10, 22, 40))
        made = ControlMaker(name)(image)
        assert made.size == image.size and made.mode == "RGB"
        pixels = np.asarray(made).max(-1)
        assert pixels[25, 18:24].max() > 200 and pixels[:, :10].max() < 20 and pixels[:, 50:].max() < 20

    def test_what_is_black_has_no_lines(self):
        noise = np.random.default_rng(0).integers(0, 4, (48, 64, 3), np.uint8)  # of a camera in the dark
        for pixels in (0 * noise, noise):
            assert np.asarray(ControlMaker("lineart")(PIL.Image.fromarray(pixels))).max() < 20


def random_depth_model(folder) -> str:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
        is_hybrid=False,
    )
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_depth_by_a_model_of_transformers(tmp_path, stream_of, picture):
    maker = ControlMaker("depth", random_depth_model(tmp_path), device="cpu")
    made = maker(picture())
    assert made.size == picture().size and made.mode == "RGB" and len(np.unique(np.asarray(made))) > 8
    assert not np.array_equal(np.asarray(made), np.asarray(maker(picture(5))))
    stream = stream_of()
    expected = stream(picture(), control={"edges": made})
    stream.reset()
    assert torch.equal(stream(picture(), control=maker), expected)
    with pytest.raises(OSError):
        ControlMaker("depth", str(tmp_path / "nothing"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_depth_on_a_cuda_stream_of_its_own(tmp_path, picture):
    host, device = (ControlMaker("depth", random_depth_model(tmp_path), device=one) for one in ("cpu", "cuda"))
    for k in range(3):
        difference = np.asarray(host(picture(k))).astype(int) - np.asarray(device(picture(k)))
        assert np.abs(difference).max() <= 3
    assert device._side != torch.cuda.current_stream()


@pytest.mark.slow
def test_soft_edges_by_a_model_of_controlnet_aux(tmp_path, picture):
    hed = pytest.importorskip("controlnet_aux.hed", exc_type=ImportError)
    torch.manual_seed(0)
    torch.save(hed.ControlNetHED_Apache2().state_dict(), tmp_path / "ControlNetHED.pth")
    maker = ControlMaker("soft-edge", str(tmp_path), device="cpu")
    made = maker(picture(0, (64, 48)))
    assert made.size == (64, 48) and made.mode == "RGB"
    assert not np.array_equal(np.asarray(made), np.asarray(maker(picture(5, (64, 48)))))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"control_net": "owner/name"}, "control net, 'owner/name', needs a control maker such as 'canny'"),
        ({"control_maker_model": "owner/name"}, "a model of a control maker, 'owner/name', needs a control maker"),
        ({"control_maker": inverted, "mode": "txt2img"}, "mode 'txt2img' has none: choose mode 'img2img'"),
        ({"control_maker": "cany"}, "no control maker is named 'cany'"),
        ({"control_maker": inverted, "control_maker_model": "x"}, "for a control maker that is given by its name"),
    ],
)
def test_the_wrapper_refuses_before_it_loads(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreamFlowWrapper("no/model", **arguments)


@pytest.mark.parametrize("net", ["", "/no/net", "~/no/net", "net"])
def test_a_control_net_that_is_no_folder_is_refused_before_the_model_is_loaded(net):
    with pytest.raises(FileNotFoundError, match=f"there is no folder '{net}': pass a hub id"):
        StreamFlowWrapper("no/model", control_net=net, control_maker=inverted)


@pytest.mark.slow
def test_the_wrapper_loads_a_net_with_its_maker(tmp_path):
    image = PIL.Image.open(IMAGE).convert("RGB").resize((128, 128))
    prepare = {"prompt": PROMPT, "num_inference_steps": 4, "strength": 0.5}
    plain = StreamFlowWrapper("embedded", acceleration="none", output_type="latent", prepare=prepare)
    net = random_control(plain.stream.unet)
    net.save_pretrained(tmp_path)
    plain.stream.add_control("control", net, 0.5)
    expected = plain.stream(image, control={"control": inverted(image)})
    named = {"control_net": str(tmp_path), "control_scale": 0.5, "acceleration": "none", "output_type": "latent"}
    with StreamFlowWrapper("embedded", control_maker=inverted, prepare=prepare, **named) as wrapper:
        assert torch.equal(wrapper(image), expected[0]) and wrapper.stream.controls == {"control": 0.5}
    with pytest.raises(ValueError, match="one control net, and there are none: give the control net"):
        StreamFlowWrapper("embedded", control_maker=inverted)


@pytest.mark.slow
def test_live_draws_with_control_images_of_its_source(tmp_path, stream_of, picture):
    """The recorded images are those of calls with the images given by hand."""
    (tmp_path / "in").mkdir()
    pictures = [picture(k) for k in range(4)]
    for k, one in enumerate(pictures):
        one.save(tmp_path / "in" / f"{k}.png")
    stream = stream_of(use_denoising_batch=False)
    size = stream.width, stream.height
    assert pictures[0].size == size
    expected = [uint8_pixels(stream(one, control={"edges": inverted(one)}))[0] for one in pictures]
    stream.reset()
    stream.set_control_maker("edges", inverted)
    with stream.live(
        str(tmp_path / "in"), f"folder:{tmp_path}/out", policy="every", mode="sequential", target_fps=100
    ) as show:
        assert show.wait().errors == 0
    shown = [np.asarray(PIL.Image.open(one)) for one in sorted((tmp_path / "out").glob("*.png"))]
    for one in expected:
        assert any(np.array_equal(one, other) for other in shown)


def test_settings_of_a_control_net_reach_the_wrapper_and_the_page(tmp_path):
    given = {
        "mode": "img2img",
        "controlnet": {"net": "owner/net", "maker": "depth", "maker_model": "owner/depth", "scale": 0.5},
    }
    arguments = config.parse(given).wrapper_arguments()
    names = ("control_net", "control_maker", "control_maker_model", "control_scale")
    assert [arguments[name] for name in names] == ["owner/net", "depth", "owner/depth", 0.5]
    assert "controlnet" not in UNUSED, "the page uses them too"
