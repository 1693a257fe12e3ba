"""StreamDiffusion's habits on a GPU: images in [-1, 1], checks that wait for nothing, and state that is assigned."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPT, never_waiting, relative_error
from random_pipelines import random_pipeline, random_tiny_vae

from streamflow.image_utils import pil2tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.fixture
def image_stream(cuda_stream):
    def make(**options):
        options = {"cfg_type": "self", "prepare": {"guidance_scale": 3.0, "strength": 0.75}, **options}
        return cuda_stream("sd3", 4, **options)

    return make


def test_tensors_that_are_marked_are_not_taken_for_another_range(image_stream, picture):
    expected = image_stream()(picture(1))
    ways = {
        "pil2tensor": lambda stream: pil2tensor(picture(1)),
        "cast and moved": lambda stream: torch.cat([pil2tensor(picture(1))]).to(device="cuda", dtype=torch.float16),
        "image_processor": lambda stream: stream.image_processor.preprocess(picture(1), 64, 64).to("cuda"),
        "preprocess": lambda stream: stream.preprocess(picture(1)).pin_memory().to("cuda", non_blocking=True)[0],
    }
    for name, way in ways.items():
        stream = image_stream()
        assert relative_error(stream(way(stream)), expected) < 5e-3, name


def bad_image(value: float) -> torch.Tensor:
    return torch.full((3, 64, 64), value, device="cuda")


@pytest.mark.parametrize(("value", "says"), [(1.5, "run from 1.5 to 1.5, outside of .0, 1."), (float("nan"), "holds NaN")])
def test_a_bad_image_on_the_device_is_named_a_call_later_and_no_other_frame_is_lost(image_stream, value, says):
    good = [torch.rand(3, 64, 64, device="cuda") for _ in range(5)]
    stream, twin = image_stream(cfg_type="none"), image_stream(cfg_type="none")
    with never_waiting():
        stream(good[0]), stream(bad_image(value))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=f"the image of frame 1 {says}|the values of the image of frame 1 {says}"):
        stream(good[1])
    outputs = [stream(image) for image in good[1:]]
    twin(good[0]), twin(good[0])
    expected = [twin(image) for image in good[1:]]
    stages = len(stream.t_list)
    for k in range(stages, len(outputs)):
        assert torch.equal(outputs[k], expected[k]), "frames of good images are what they are beside another one"


def test_frames_name_the_bad_image_and_leave_the_rest_to_flush(image_stream):
    stream = image_stream(cfg_type="none")
    images = [torch.rand(3, 64, 64, device="cuda") for _ in range(6)]
    images[1] = bad_image(-2.0)

    def given():
        for image in images:
            torch.cuda.synchronize()
            yield image

    with pytest.raises(ValueError, match="values of the image of frame 1 run from -2 to -2"):
        list(stream.frames(given()))
    assert stream.flush()


def test_checks_can_be_made_at_once(image_stream):
    stream = image_stream(check_inputs=True)
    with pytest.raises(ValueError, match="values of the image run from 1.5"):
        stream(bad_image(1.5))


def test_floats_on_the_device_are_checked_without_a_wait(image_stream):
    stream = image_stream()
    images = [torch.rand(3, 64, 64, device="cuda") for _ in range(8)]
    for image in images[:3]:
        stream(image)
    with never_waiting():
        for image in images[3:]:
            stream(image)


ACTING = {
    "cfg_type": lambda s: "none",
    "delta": lambda s: 0.2,
    "do_add_noise": lambda s: True,
    "generator": lambda s: torch.Generator().manual_seed(9),
    "guidance_scale": lambda s: 6.0,
    "init_noise": lambda s: -s.init_noise,
    "prompt_embeds": lambda s: -s.prompt_embeds,
    "seed": lambda s: 11,
    "stock_noise": lambda s: -3.0 * s.stock_noise,
    "t_list": lambda s: [1, 3],
    "vae": lambda s: random_tiny_vae(16).to("cuda"),
    "x_t_latent_buffer": lambda s: -s.x_t_latent_buffer,
}


@pytest.mark.parametrize("kind", ["none", "cuda-graph"])
@pytest.mark.parametrize("name", ACTING)
def test_what_is_assigned_acts(image_stream, picture, name, kind):
    drawn = []
    for assign in (False, True):
        stream = image_stream()
        stream.accelerate(kind)
        for k in range(4):
            stream(picture(k))
        if assign:
            setattr(stream, name, ACTING[name](stream))
        drawn.append(torch.stack([stream(picture(k)) for k in range(4, 9)]))
    assert torch.isfinite(drawn[1]).all() and not torch.allclose(*drawn, atol=1e-3)


def test_frames_under_way_finish_first_under_a_graph(cuda_stream):
    options = {"prepare": {"guidance_scale": 4.0, "negative_prompt": "blurry"}}
    stream, plain = (cuda_stream("sd3", 3, cfg_type="none", **options) for _ in range(2))
    other = cuda_stream("sd3", 3, cfg_type="full", **options)

    def drawn(one, count, between):
        done = []
        for k in range(count):
            between(k)
            done.append(one.predict_x0_batch(one.frame_noise(k)))
        return torch.cat([x for x in done if x is not None] + one.flush())

    for one in (stream, plain, other):
        one.accelerate("cuda-graph")
    mixed = drawn(stream, 6, lambda k: k == 3 and setattr(stream, "cfg_type", "full"))
    before, after = (drawn(one, 6, lambda k: None) for one in (plain, other))
    assert relative_error(mixed[:3], before[:3]) < 1e-3 and relative_error(mixed[3:], after[3:]) < 1e-3


@pytest.mark.parametrize("kind", ["none", "cuda-graph", "compile"])
def test_a_compiled_network_is_streamed(kind):
    from streamflow import StreamFlow

    drawn = []
    for compiled in (False, True):
        pipe = random_pipeline("sd3").to("cuda", torch.float16)
        if compiled:
            pipe.transformer = torch.compile(pipe.transformer)
        stream = StreamFlow(pipe, range(2), width=64, height=64, cfg_type="none")
        if kind != "none" and compiled:
            stream.accelerate(kind)
        stream.prepare(PROMPT, num_inference_steps=2)
        drawn.append(torch.cat([stream.txt2img() for _ in range(3)]).float())
    assert (drawn[0] - drawn[1]).abs().max() < 0.05


def test_a_pipe_that_was_moved_is_refused():
    from streamflow import StreamFlow

    pipe = random_pipeline("sd3")
    stream = StreamFlow(pipe, range(2), width=64, height=64, cfg_type="none")
    pipe.to("cuda")
    with pytest.raises(ValueError, match="moved, pipe.to.*, from torch.float32 on cpu to torch.float32 on cuda:0"):
        stream.prepare(PROMPT, num_inference_steps=2)
