"""Inpainting in the stream: diffusers' own inpainting to the bit, frame by frame, with the mask of each frame on its way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import PROMPT, never_waiting, relative_error
from PIL import Image

from streamflow import StreamFlow
from streamflow.conditioning.inpaint import read_mask
from streamflow.image_utils import pil2tensor
from streamflow.models.families.flux import unpack
from streamflow.stream.frames import Input

FRAMES = 4
SHORT = {"max_sequence_length": 40}


def mask_of(k: int, size: int = 64) -> Image.Image:
    """White in a box that depends on k; its edges lie inside of latents, not between them."""
    mask = np.zeros((size, size), np.uint8)
    mask[3 + 8 * k : 37 + 8 * k, 11:50] = 255
    return Image.fromarray(mask)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return relative_error(a, b) <= 1e-5


@dataclass(frozen=True)
class Case:
    """A family, and diffusers' inpainting pipeline of it. noise: from a frame's noise to the form in which that draws it."""

    family: str
    pipeline: str
    cfg_type: str = "none"
    prepare: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    noise: Callable[[StreamFlow, torch.Tensor], torch.Tensor] = lambda stream, noise: noise


def _unpacked(stream: StreamFlow, noise: torch.Tensor) -> torch.Tensor:
    return unpack(noise, stream.height // 16, stream.width // 16)


CASES = {
    "sd3": Case("sd3", "StableDiffusion3InpaintPipeline", call={"guidance_scale": 1.0}),
    "sd3-guided": Case(
        "sd3", "StableDiffusion3InpaintPipeline", "full", {"guidance_scale": 4.0, "negative_prompt": "blurry"}
    ),
    "sd3-bfloat16": Case("sd3", "StableDiffusion3InpaintPipeline", call={"guidance_scale": 1.0}, dtype=torch.bfloat16),
    "flux": Case("flux", "FluxInpaintPipeline", prepare={"guidance_scale": 2.5}, noise=_unpacked),
    "zimage": Case("zimage", "ZImageInpaintPipeline", prepare=SHORT, call={"guidance_scale": 0.0}),
}
PLAIN = (("sd3", 0), ("flux", 1))


def pipelines_own(case: Case, stream: StreamFlow, picture, mask, noise, strength, monkeypatch) -> torch.Tensor:
    """The latents of diffusers' own pipeline after every step, from this image, mask and noise."""
    cls = getattr(diffusers, case.pipeline)
    pipe = cls(**stream.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    module = sys.modules[cls.__module__]
    drawn = case.noise(stream, noise)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: drawn)
    if hasattr(module, "retrieve_latents"):
        monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    steps = []

    def keep(_, step, t, tensors):
        steps.append(tensors["latents"].clone())
        return {}

    pipe(
        **{"prompt": PROMPT, "num_inference_steps": 4, "height": 64, "width": 64, **case.prepare, **case.call},
        image=stream.preprocess(picture).as_subclass(torch.Tensor),
        mask_image=mask,
        strength=strength,
        output_type="latent",
        callback_on_step_end=keep,
    )
    return torch.stack(steps)


@pytest.mark.parametrize(
    "name,strength,start",
    [
        pytest.param(name, strength, start, marks=[pytest.mark.slow] * ((name, start) not in PLAIN))
        for name in CASES
        for strength, start in ((1.0, 0), (0.75, 1))
    ],
)
def test_every_frame_is_diffusers_own_inpainting_to_the_bit(name, strength, start, pipes, picture, monkeypatch):
    case = CASES[name]
    stream = StreamFlow(
        pipes(case.family, case.dtype), range(start, 4), cfg_type=case.cfg_type, noise="frame", height=64, width=64
    )
    stream.prepare(PROMPT, num_inference_steps=4, **case.prepare)
    stream.velocity = stream.adapter.row_by_row(case.cfg_type == "full")
    trace = stream.trace(FRAMES)
    list(stream.frames(Input(picture(k), mask_of(k)) for k in range(FRAMES)))
    assert trace.done
    for k in range(FRAMES):
        noise = stream.frame_noise(k)
        own = pipelines_own(case, stream, picture(k), mask_of(k), noise, strength, monkeypatch)
        assert torch.equal(trace.frames[k].x[1:], own[:, 0]), k


def latents_and_pictures(stream, inputs):
    """(x0 of every frame, its image), both in order."""
    trace = stream.trace(len(inputs))
    pictures = torch.stack([frame.image for frame in stream.frames(inputs)])
    return torch.stack([trace.frames[k].x[-1] for k in range(len(inputs))]), pictures


@pytest.mark.parametrize(
    "cfg_type,add_noise",
    [
        pytest.param(mode, again, marks=[pytest.mark.slow] * ((mode, again) not in (("full", False), ("self", True))))
        for mode in ("none", "full", "self", "initialize")
        for again in (False, True)
    ],
)
def test_known_latents_and_pixels_come_out_equal_and_each_frame_keeps_its_mask(cfg_type, add_noise, stream_of, picture):
    """In a full ring, with and without a frame buffer and in the sequential loop; the last frame has no mask at all."""
    masks = [mask_of(0), mask_of(2), mask_of(3), None]
    inputs = [Input(picture(k), mask=mask) for k, mask in enumerate(masks)]
    options = {"cfg_type": cfg_type, "do_add_noise": add_noise, "prepare": {"guidance_scale": 3.0}}
    streams = [stream_of("sd3", [1, 2, 3], **options, **more) for more in ({}, {"frame_buffer_size": 3}, LOOP)]
    (drawn, pictures), *others = (latents_and_pictures(stream, inputs) for stream in streams)
    for other, others_pictures in others:
        assert close(other, drawn) and close(others_pictures, pictures)
    for k, mask in enumerate(masks[:3]):
        shown = streams[0].preprocess(picture(k))
        x0 = streams[0].codec.encode(shown)[0]
        kept = torch.from_numpy(np.array(mask)[::8, ::8] == 0)
        assert kept.any() and not kept.all()
        assert torch.equal(drawn[k][:, kept], x0[:, kept])
        assert relative_error(drawn[k][None, :, ~kept], x0[None, :, ~kept]) > 0.05
        known = torch.from_numpy(np.array(mask) == 0)
        decoded = streams[0].decode_image(drawn[k][None])[0]
        assert torch.equal(pictures[k][:, known], shown[0][:, known])
        assert torch.equal(pictures[k][:, ~known], decoded[:, ~known])
    plain = stream_of("sd3", [1, 2, 3], **options, **LOOP)
    assert close(latents_and_pictures(plain, [picture(3)])[0], drawn[3:]), "no mask, no known part"


LOOP = {"use_denoising_batch": False}


def test_what_inpaint_sets_holds_for_frames_that_enter_from_then_on(stream_of, picture):
    """Text frames around a known image, another mask in between, then none: each as it would be drawn alone."""
    settings = [(picture(0), mask_of(0)), (picture(1), mask_of(3), False), (None,), (None,)]
    streams = stream_of("flux"), stream_of("flux", **LOOP)
    traces = [stream.trace(4) for stream in streams]
    for setting in settings:
        for stream in streams:
            stream.inpaint(*setting)
            stream.predict_x0_batch(stream.frame_noise(stream._denoiser.next_id))
    streams[0].flush()
    ring, loop = ({k: one.x for k, one in trace.frames.items()} for trace in traces)
    assert sorted(ring) == [0, 1, 2, 3] and all(close(ring[k], loop[k]) for k in ring)
    x0 = streams[0].codec.encode(streams[0].preprocess(picture(1)))
    mask = streams[0].adapter.latent_mask(read_mask(mask_of(3), 64, 64).float(), 64, 64)
    known = mask[0] == 0
    assert torch.equal(ring[1][-1][known], x0[0][known]) and not torch.equal(ring[2][-1][known], x0[0][known])
    plain = stream_of("flux", **LOOP)
    assert close(ring[3][-1:], plain.predict_x0_batch(plain.frame_noise(3)))


def test_calls_with_a_mask_or_a_standing_one_and_with_or_without_pasting(stream_of, picture):
    """The ring's calls lag behind the loop's by S - 1; a standing mask without an image keeps each frame's own."""
    ring, loop = stream_of("sd3", [2, 3]), stream_of("sd3", [2, 3], **LOOP)
    masks = np.stack([np.array(mask_of(k)) for k in range(3)])
    given = [torch.from_numpy(masks[k] > 0) for k in range(3)]
    expected = [loop(picture(k), mask=given[k]) for k in range(3)]
    drawn = [ring(picture(k), mask=given[k]) for k in (0, 1, 2, 2)]
    for a, b in zip(drawn, [expected[0], *expected], strict=True):
        assert close(a, b)
    loop.inpaint(mask=masks[1] / 255.0)
    assert torch.equal(loop(picture(1)), expected[1])
    loop.inpaint(mask=Image.fromarray(masks[1]).convert("RGB"), paste=False)
    unpasted = loop(picture(1))
    assert torch.equal(unpasted[..., given[1]], expected[1][..., given[1]])
    assert not torch.equal(unpasted[..., ~given[1]], expected[1][..., ~given[1]])
    loop.inpaint(mask=masks[1])
    loop.prepare("a green pear", num_inference_steps=4)
    shown, known = loop.preprocess(picture(2)), ~given[1]
    assert torch.equal(loop(picture(2))[..., known], shown[..., known]), "it stays through prepare"
    loop.inpaint(None)
    assert not torch.equal(loop(picture(2))[..., known], shown[..., known])


def test_rows_of_a_frame_buffer_have_a_known_image_each(stream_of, picture):
    grouped = stream_of("sd3", frame_buffer_size=2)
    grouped.inpaint([picture(0), picture(1)], [mask_of(0), mask_of(2)])
    both = grouped.txt2img(2)
    for k in range(2):
        alone = stream_of("sd3", **LOOP)
        alone.inpaint(picture(k), mask_of(2 * k))
        assert close(both[k : k + 1], alone.txt2img(2)[k : k + 1])


def test_the_similarity_filter_sees_the_mask(stream_of, picture):
    stream = stream_of("sd3", [3], noise="frame")
    stream.enable_similar_image_filter(threshold=0.99)
    first = stream(picture(), mask=mask_of(0))
    assert torch.equal(stream(picture(), mask=mask_of(0)), first) and stream.similar_filter.skip_count == 1
    assert not torch.equal(stream(picture(), mask=mask_of(3)), first) and stream.similar_filter.skip_count == 0
    stream.inpaint(mask=mask_of(1))
    assert not torch.equal(stream(picture()), first) and stream.similar_filter.skip_count == 0


BAD = {
    "size": (np.zeros((64, 32)), "a mask of 32x64 for a stream of 64x64"),
    "values": (np.full((64, 64), 7.0), r"from 7 to 7, outside of \[0, 1\]"),
    "nan": (torch.full((64, 64), torch.nan), "from nan to nan"),
    "colours": (torch.zeros(1, 3, 64, 64), "it has no colours"),
    "mode": (Image.new("RGBA", (64, 64)), "a mask in mode RGBA"),
    "count": (np.zeros((3, 64, 64)), "3 masks for a frame buffer of 1"),
    "empty": ([], "an empty list of masks"),
    "dtype": (torch.zeros(64, 64, dtype=torch.int32), "not torch.int32"),
    "kind": ("white", "not str"),
}


@pytest.fixture(scope="module")
def prepared(pipes):
    stream = StreamFlow(pipes("sd3"), [2, 3], cfg_type="none")
    stream.prepare(PROMPT, num_inference_steps=4)
    return stream


@pytest.mark.parametrize("mask,message", BAD.values(), ids=BAD)
def test_a_bad_mask_is_refused_and_nothing_has_changed(mask, message, prepared, picture):
    prepared.inpaint(picture(0), mask_of(0))
    before, ids = prepared._inpainting._regions, prepared._denoiser.next_id
    for call in (lambda: prepared.inpaint(picture(1), mask), lambda: prepared(picture(1), mask=mask)):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert prepared._inpainting._regions is before and prepared._denoiser.next_id == ids


def test_a_mask_needs_an_image_and_an_image_a_mask(prepared, picture):
    with pytest.raises(ValueError, match="needs a mask"):
        prepared.inpaint(picture(0))
    with pytest.raises(ValueError, match="2 images for a frame buffer of 1"):
        prepared.inpaint([picture(0), picture(1)], mask_of(0))
    with pytest.raises(ValueError, match="there is none: pass both"):
        prepared(mask=mask_of(0))
    with pytest.raises(TypeError, match="paste is True or False"):
        prepared.inpaint(picture(0), mask_of(0), paste="soft")
    prepared.inpaint(mask=mask_of(0))
    for call in (prepared.txt2img, lambda: next(prepared.frames([None]))):
        prepared.reset()
        with pytest.raises(ValueError, match="drawn from noise has none"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_masks_come_and_go_without_a_new_graph_and_without_waiting(cuda_stream, picture):
    stream, loop = cuda_stream(frame_buffer_size=2), cuda_stream(use_denoising_batch=False)
    stream.accelerate("cuda-graph")
    pictures = [stream.preprocess(picture(k)).pin_memory() for k in range(4)]
    masks = [read_mask(mask_of(k), 64, 64) for k in range(3)] + [None]
    inputs = [Input(one, mask=mask) for one, mask in zip(pictures, masks, strict=True)]
    list(stream.frames(inputs))
    captured = stream.velocity.captured
    with never_waiting():
        drawn = list(stream.frames(inputs))
    assert stream.velocity.captured == captured == 1
    expected = [frame.image for frame in loop.frames(inputs)]
    assert relative_error(torch.stack([frame.image for frame in drawn]), torch.stack(expected)) <= 1e-2


def test_a_frame_after_one_from_noise_has_the_region_of_its_own_row(stream_of, picture):
    """Two rows a group with regions of their own; a frame from noise between two images pushes the first by itself."""
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, :32], masks[1, :, 32:] = 1.0, 1.0
    known = torch.cat([pil2tensor(picture(k)) for k in (5, 6)])

    def drawn(inputs):
        stream = stream_of("sd3", [1, 2, 3], frame_buffer_size=2)
        stream.inpaint(known, masks)
        return [frame.image for frame in stream.frames(inputs)]

    mixed = drawn([picture(0), None, picture(1)])
    for image, mask, kept in ((mixed[0], masks[0], known[0]), (mixed[2], masks[0], known[0])):
        assert torch.allclose(image[:, mask[0] == 0], kept[:, mask[0] == 0], atol=1e-5), "both enter in row 0"
