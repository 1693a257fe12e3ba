"""Control nets in the stream: diffusers' own ControlNet pipelines to the bit, each frame with its own image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from conftest import PROMPT, never_waiting, relative_error
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from random_pipelines import random_tiny_vae
from random_pipelines.control import random_control

from streamflow import StreamFlow
from streamflow.benchmark.full_size import SCHEDULERS
from streamflow.stream.frames import Input

FRAMES = 4
STEPS = 4
SHORT = {"max_sequence_length": 40}
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "blurry, much too blurry"}
TRUE = {"true_cfg_scale": 3.0, "negative_prompt": "blurry, much too blurry"}


@dataclass(frozen=True)
class Case:
    """A family and diffusers' ControlNet pipeline of it. both: arguments of prepare and of the pipeline; call: only of the
    pipeline; net: of the control net's config; mode: of a union net."""

    family: str
    pipeline: str
    cfg_type: str = "none"
    both: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    net: dict[str, Any] = field(default_factory=dict)
    mode: int | None = None
    dtype: torch.dtype = torch.float32


SD3, FLUX, QWEN = "StableDiffusion3ControlNetPipeline", "FluxControlNetPipeline", "QwenImageControlNetPipeline"
SD, SDXL = "StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"
UNGUIDED = {"guidance_scale": 1.0}
DEV = {**SHORT, "guidance_scale": 2.5}
CASES = {
    "sd3": Case("sd3", SD3, both=SHORT, call=UNGUIDED),
    "sd3-guided": Case("sd3", SD3, "full", {**SHORT, **GUIDED}),
    "sd3-zeros": Case("sd3", SD3, "full", {**SHORT, **GUIDED}, net={"force_zeros_for_pooled_projection": True}),
    "sd3-bfloat16": Case("sd3", SD3, both=SHORT, call=UNGUIDED, dtype=torch.bfloat16),
    "flux-guided": Case("flux", FLUX, "full", {**DEV, **TRUE}),
    "flux-union": Case("flux", FLUX, both=DEV, net={"num_mode": 3}, mode=2),
    "flux-pixels": Case("flux", FLUX, both=DEV, net={"conditioning_embedding_channels": 16, "patch_size": 2}),
    "qwen-guided": Case("qwenimage", QWEN, "full", {**SHORT, **TRUE}),
    "instaflow-guided": Case("instaflow", SD, "full", GUIDED),
    "sdxl-guided": Case("sdxl", SDXL, "full", GUIDED),
}
PLAIN = ("sd3-guided",)
SLOW = tuple(name for name in CASES if name not in (*PLAIN, "sd3"))


@pytest.fixture(autouse=True)
def still(monkeypatch):
    """Pipelines draw a control image's latent from the VAE's posterior; here its mode, as a stream does."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture(scope="module")
def nets(pipes):
    """`nets(case, seed)`: a control net for the pipeline of a case, made once."""
    made = {}

    def get(case: Case, seed: int = 0):
        key = case.family, case.dtype, repr(case.net), seed
        if key not in made:
            pipe = pipes(case.family, case.dtype)
            made[key] = random_control(getattr(pipe, "unet", None) or pipe.transformer, seed, **case.net)
        return made[key]

    return get


def stream_of(case: Case, pipes, **options) -> StreamFlow:
    stream = StreamFlow(pipes(case.family, case.dtype), range(STEPS), cfg_type=case.cfg_type, family=case.family, **options)
    stream.prepare(PROMPT, num_inference_steps=STEPS, **case.both)
    return stream


def pipelines_own(case: Case, stream: StreamFlow, net, images, noise, scale, start=0.0, end=1.0) -> torch.Tensor:
    """What diffusers' own pipeline draws of this noise: an image in [-1, 1]."""
    parts = stream.pipe.components
    if case.family in SCHEDULERS:
        parts["scheduler"] = SCHEDULERS[case.family]()
    pipe = getattr(diffusers, case.pipeline)(**parts, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    unet = case.pipeline in (SD, SDXL)
    if unet:  # these want tensors in [0, 1], and take them as they are
        images = [(stream.preprocess(one).as_subclass(torch.Tensor) + 1) / 2 for one in images]
    arguments = {"image" if unet else "control_image": images if isinstance(net, _MULTI) else images[0]}
    if case.mode is not None:
        arguments["control_mode"] = case.mode
    window = {"control_guidance_start": start, "control_guidance_end": end}
    size = {"height": stream.height, "width": stream.width, "num_inference_steps": STEPS, "output_type": "latent"}
    call = {**arguments, **window, **size, **case.both, **case.call, "controlnet_conditioning_scale": scale}
    with one_by_one(stream.pipe.vae):
        return stream.decode_image(pipe(PROMPT, latents=noise, **call).images)


_MULTI = (diffusers.SD3MultiControlNetModel, diffusers.FluxMultiControlNetModel, diffusers.MultiControlNetModel)


class one_by_one:
    """Inside, a VAE encodes the two copies of an image that guidance asks for as a stream does the one."""

    def __init__(self, vae):
        self.vae = vae

    def __enter__(self):
        self.vae.use_slicing = True

    def __exit__(self, *error):
        self.vae.use_slicing = False


def drawn(stream: StreamFlow, controls: list[dict], **each) -> torch.Tensor:
    return torch.stack([frame.image for frame in stream.frames([Input(control=one, **each) for one in controls])])


@pytest.mark.parametrize("name", [*PLAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_each_frame_with_its_own_image_is_the_pipelines_to_the_bit(name, pipes, nets, picture):
    case = CASES[name]
    stream, net = stream_of(case, pipes), nets(case)
    uncontrolled = stream.txt2img()
    stream.prepare(PROMPT, num_inference_steps=STEPS, **case.both)
    stream.add_control("edges", net, 0.7, 0.2, 0.8, case.mode)
    controls = [{"edges": picture(k)} for k in range(FRAMES)]
    own = [pipelines_own(case, stream, net, [picture(k)], stream.frame_noise(k), 0.7, 0.2, 0.8) for k in range(FRAMES)]
    assert relative_error(own[0], uncontrolled) > 1e-3, "a net without effect would prove nothing"
    if case.dtype == torch.float32:
        assert relative_error(drawn(stream, controls), torch.cat(own)) <= 1e-4
    stream.prepare(PROMPT, num_inference_steps=STEPS, **case.both)
    stream.velocity = stream.adapter.row_by_row(case.cfg_type == "full")
    assert torch.equal(drawn(stream, controls), torch.cat(own))


def test_a_scale_changes_for_all_rows_and_two_nets_add_up(pipes, nets, picture):
    """A frame whose scale changes after k of its steps is one under two equal nets, the first until then and the second
    from then on."""
    case = CASES["sd3"]
    stream, net = stream_of(case, pipes), nets(case)
    stream.add_control("edges", net, 0.3)
    stream.velocity = stream.adapter.row_by_row(False)
    pair = diffusers.SD3MultiControlNetModel([net, net])

    def inputs():
        for k in range(FRAMES):
            if k == 2:
                stream.set_control_scale("edges", 1.5)
            yield Input(control={"edges": picture(k)})

    frames = torch.stack([frame.image for frame in stream.frames(inputs())])
    assert stream.controls == {"edges": 1.5}
    for k, at in enumerate((0.5, 0.25)):
        images, noise = [picture(k)] * 2, stream.frame_noise(k)
        own = pipelines_own(case, stream, pair, images, noise, [0.3, 1.5], [0.0, at], [at, 1.0])
        assert torch.equal(frames[k : k + 1], own)
    for k in (2, 3):
        assert torch.equal(frames[k : k + 1], pipelines_own(case, stream, net, [picture(k)], stream.frame_noise(k), 1.5))

    other = nets(case, seed=1)
    two = stream_of(case, pipes)
    two.add_control("edges", net, 0.6)
    two.add_control("depth", other, 0.9, end=0.5)
    two.velocity = two.adapter.row_by_row(False)
    controls = [{"depth": picture(k + 3), "edges": picture(k)} for k in range(2)]
    pair = diffusers.SD3MultiControlNetModel([net, other])
    for k, image in enumerate(drawn(two, controls)):
        images, noise = [picture(k), picture(k + 3)], two.frame_noise(k)
        assert torch.equal(image[None], pipelines_own(case, two, pair, images, noise, [0.6, 0.9], [0.0, 0.0], [1.0, 0.5]))


def test_every_way_to_call_draws_the_same(pipes, nets, picture):
    """Frame buffers, the loop, images in, txt2img, a wrapped pipeline, and a prompt that is set again in between."""
    case = CASES["sd3-guided"]
    net = nets(case)
    loop = stream_of(case, pipes, use_denoising_batch=False)
    loop.add_control("edges", net)
    pictures = [picture(k) for k in range(FRAMES)]
    controls = [{"edges": one} for one in pictures]
    texts = drawn(loop, controls)
    grouped = stream_of(case, pipes, frame_buffer_size=2)
    grouped.add_control("edges", net)
    assert relative_error(drawn(grouped, controls), texts) <= 1e-5
    grouped.reset()
    assert relative_error(grouped.txt2img(4, control={"edges": pictures}), texts) <= 1e-5

    pipe = getattr(diffusers, SD3)(**pipes("sd3").components, controlnet=net)
    wrapped = StreamFlow(pipe, range(1, STEPS), cfg_type="full")
    wrapped.prepare(PROMPT, num_inference_steps=STEPS, **case.both)
    assert wrapped.controls == {"control": 1.0}
    loop.prepare(PROMPT, num_inference_steps=STEPS, strength=0.75, **case.both)
    expected = [loop(picture(9), control=one) for one in controls]
    shown = [wrapped(picture(9), control={"control": one}) for one in pictures[:3]]
    wrapped.update_prompt(PROMPT)
    shown += [wrapped(picture(9), control={"control": pictures[3]}) for _ in range(3)]
    assert relative_error(torch.cat(shown[2:6]), torch.cat(expected)) <= 1e-5


def test_nets_come_and_go_and_frames_under_way_finish_with_what_they_had(pipes, nets, picture):
    case = CASES["sd3"]
    stream = stream_of(case, pipes)
    plain = torch.cat([stream.txt2img() for _ in range(3)])
    stream.reset()
    stream.txt2img(latents=stream.frame_noise(0))
    stream.add_control("edges", nets(case), 2.0)
    control = {"edges": picture()}
    mixed = [stream.txt2img(control=control) for _ in range(4)]
    assert relative_error(torch.cat(mixed[:2]), plain[1:3]) <= 1e-5, "frames 1 and 2 entered without a net"
    stream.remove_control("edges")
    assert stream.controls == {} and stream.velocity.__class__ is stream.adapter.Velocity
    stream.prepare(PROMPT, num_inference_steps=STEPS, **case.both)
    assert torch.equal(torch.cat([stream.txt2img() for _ in range(3)]), plain)


def test_the_similarity_filter_sees_the_images_of_control_nets(pipes, nets, picture):
    stream = stream_of(CASES["sd3"], pipes)
    stream.add_control("edges", nets(CASES["sd3"]))
    stream.enable_similar_image_filter(threshold=0.99)
    for _ in range(stream.denoising_steps_num):  # none is skipped until those with the net have left
        first = stream(picture(), control={"edges": picture()})
    assert torch.equal(stream(picture(), control={"edges": picture()}), first) and stream.similar_filter.skip_count == 1
    stream(picture(), control={"edges": picture(3)})
    assert stream.similar_filter.skip_count == 0, "it is drawn"


def test_what_cannot_be_is_refused_and_nothing_has_changed(pipes, nets, picture):
    case = CASES["sd3"]
    stream, net = stream_of(case, pipes), nets(case)
    with pytest.raises(ValueError, match="no control is named 'edges'; there are none"):
        stream.txt2img(control={"edges": picture()})
    stream.add_control("edges", net)
    before, velocity, ids = stream.controls, stream.velocity, stream._denoiser.next_id
    transformer = stream.unet
    flux = random_control(pipes("flux").transformer)
    refused = {
        "are SD3ControlNetModels, not FluxControlNetModel": lambda: stream.add_control("b", flux),
        "pooled_projection_dim 40, this network 48": lambda: stream.add_control(
            "b", random_control(transformer, pooled_projection_dim=40)
        ),
        "1 channels beside": lambda: stream.add_control("b", random_control(transformer, extra_conditioning_channels=1)),
        r"has \(1,\) blocks and 'edges' \(2,\)": lambda: stream.add_control("b", random_control(transformer, num_layers=1)),
        "in dtype torch.bfloat16": lambda: stream.add_control("b", random_control(transformer).to(torch.bfloat16)),
        "no union net": lambda: stream.add_control("b", net, mode=1),
        "0 <= start < end <= 1": lambda: stream.add_control("b", net, 1.0, 0.5, 0.5),
        "must be finite": lambda: stream.add_control("b", net, float("nan")),
        "there is a control named 'edges'": lambda: stream.add_control("edges", net),
        "no control is named 'depth'; there are 'edges'": lambda: stream.remove_control("depth"),
        "must be a number": lambda: stream.set_control_scale("edges", "much"),
        "no image for control 'edges'": stream.txt2img,
        "no image for control 'edges': pass": lambda: stream(picture()),
        "mapping of names to images": lambda: stream(picture(), control=picture()),
        "2 images for control 'edges' of 1 frames": lambda: stream(picture(), control={"edges": [picture()] * 2}),
        "no control is named 'depth'": lambda: stream(picture(), control={"edges": picture(), "depth": picture()}),
        "no image for control": lambda: next(stream.frames([None])),
        "no image for control 'edges': pass control": lambda: stream.predict_x0_batch(stream.frame_noise(0)),
    }
    for message, call in refused.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert (stream.controls, stream.velocity, stream._denoiser.next_id) == (before, velocity, ids)
    stream.velocity = stream.adapter.row_by_row(False)
    with pytest.raises(RuntimeError, match="RowByRow, and control nets belong under it"):
        stream.remove_control("edges")
    with pytest.raises(NotImplementedError, match="no control nets that ZImage streams"):
        StreamFlow(pipes("zimage"), [0], cfg_type="none").add_control("edges", net)


@pytest.mark.slow
def test_an_accelerated_stream_is_controlled_too(pipes, nets, picture):
    case = CASES["sd3-guided"]
    plain, fast = stream_of(case, pipes), stream_of(case, pipes)
    for stream in (plain, fast):
        stream.vae = random_tiny_vae(16)
        stream.add_control("edges", nets(case))
    fast.accelerate("compile", backend="eager")
    expected, pictures = [], []
    for stream, found in ((plain, expected), (fast, pictures)):
        found += [stream.txt2img(control={"edges": picture(k)}) for k in range(3)]
        stream.set_control_scale("edges", 0.2)
        found += [stream.txt2img(control={"edges": picture(k)}) for k in range(3)]
    assert fast.acceleration == "compile"
    assert relative_error(torch.cat(pictures), torch.cat(expected)) <= 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_images_and_scales_change_without_a_new_graph_and_without_waiting(cuda_stream, picture):
    stream, loop = cuda_stream(), cuda_stream(use_denoising_batch=False)
    stream.accelerate("cuda-graph")
    for one in (stream, loop):
        one.add_control("edges", random_control(one.unet))
    shown = [{"edges": stream.preprocess(picture(k)).pin_memory()} for k in range(4)]
    drawn(stream, shown)
    captured = stream.velocity.captured
    stream.set_control_scale("edges", 0.4)
    loop.set_control_scale("edges", 0.4)
    stream.reset()  # frame ids, and with them noise, begin anew
    with never_waiting():
        frames = drawn(stream, shown)
    assert stream.velocity.captured == captured == 1
    assert relative_error(frames, drawn(loop, shown)) <= 1e-3
