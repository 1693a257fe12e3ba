"""One test for each fault of StreamDiffusion 0.1.1 that a flow's stream could share, by its number: what ours does instead.

Faults 1 to 9 and 12 are of its pipeline and its filter, 10 and 13 to 16 of its assumptions, 17 and 18 of its age.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import time

import diffusers
import numpy as np
import pytest
import torch
from conftest import PROMPT, noises, relative_error, slow, streamed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from streamdiffusion.image_filter import SimilarImageFilter as OriginalFilter

from streamflow import StreamFlow
from streamflow.image_filter import SimilarImageFilter
from streamflow.image_utils import pil2tensor, postprocess_image

MODES = ("none", "full", "self", "initialize")
OTHER = "a blue whale, flat vector"


def close(a, b, tolerance=1e-4) -> bool:
    return a.shape == b.shape and a.isfinite().all() and relative_error(a, b) <= tolerance


@pytest.mark.parametrize(
    ("cfg_type", "add_noise"),
    [*((mode, False) for mode in MODES), ("self", True), *(slow(mode, True) for mode in ("none", "full", "initialize"))],
)
def test_fault_01_a_frame_buffer_of_any_size_draws_every_frame(stream_of, cfg_type, add_noise):
    """Rows move by F, all F leave, and each keeps its own noise, anchor and prompt."""
    alone = stream_of("sd3", [0, 1, 3], cfg_type=cfg_type, do_add_noise=add_noise, use_denoising_batch=False)
    expected = streamed(alone, noises(alone, 8))
    for frames in (2, 4):
        stream = stream_of("sd3", [0, 1, 3], cfg_type=cfg_type, do_add_noise=add_noise, frame_buffer_size=frames)
        assert close(streamed(stream, noises(stream, 8)), expected)


@pytest.mark.parametrize("cfg_type", MODES)
def test_fault_02_update_prompt_keeps_the_guidance_and_the_negative_prompt(stream_of, cfg_type):
    prepare = {"negative_prompt": "blurry", "guidance_scale": 3.0}
    stream = stream_of("sd3", cfg_type=cfg_type, frame_buffer_size=2, prepare=prepare)
    stream.update_prompt(OTHER)
    fresh = stream_of("sd3", cfg_type=cfg_type, frame_buffer_size=2)
    fresh.prepare(OTHER, num_inference_steps=4, **prepare)
    drawn = stream.txt2img(4)
    assert torch.equal(drawn, fresh.txt2img(4))
    if cfg_type in ("full", "initialize"):
        fresh.prepare(OTHER, num_inference_steps=4, guidance_scale=3.0)
        assert not close(drawn, fresh.txt2img(4), 1e-3), "the negative prompt acts"


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("cfg_type", MODES)
def test_fault_03_guidance_of_one_or_less_is_no_guidance_in_every_mode(stream_of, cfg_type, scale):
    stream = stream_of("sd3", [0, 2], cfg_type=cfg_type, prepare={"guidance_scale": scale, "negative_prompt": "blurry"})
    plain = stream_of("sd3", [0, 2])
    assert close(stream.txt2img(2), plain.txt2img(2))


@pytest.mark.parametrize("cfg_type", MODES)
def test_fault_04_without_the_batch_every_mode_draws_the_same(stream_of, cfg_type):
    """StreamDiffusion cannot do `full` there, and its residual guidance has nothing to be residual to."""
    prepare = {"guidance_scale": 4.0, "negative_prompt": "blurry"}
    batch = stream_of("sd3", [1, 2, 3], cfg_type=cfg_type, prepare=prepare)
    loop = stream_of("sd3", [1, 2, 3], cfg_type=cfg_type, prepare=prepare, use_denoising_batch=False)
    x = noises(batch, 5)
    anchors = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) if cfg_type == "self" else None
    drawn = []
    for stream in (batch, loop):
        given = [None] * 5 if anchors is None else anchors.split(1)
        out = [stream.predict_x0_batch(row, anchor=a) for row, a in zip(x.split(1), given, strict=True)]
        drawn.append(torch.cat([one for one in out if one is not None] + stream.flush()))
    assert close(*drawn)
    if cfg_type != "none":
        plain = stream_of("sd3", [1, 2, 3])
        assert not close(drawn[0], streamed(plain, x), 1e-2), "guidance acts"


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_fault_05_no_output_is_garbage_none_lost_none_doubled(stream_of, picture, stages):
    indices = list(range(4 - stages, 4)) if stages < 4 else [0, 1, 2, 3]
    loop = stream_of("sd3", indices, use_denoising_batch=False)
    expected = loop.decode_image(streamed(loop, noises(loop, 6)))

    ticks = stream_of("sd3", indices)
    outputs = [ticks.predict_x0_batch(x) for x in noises(ticks, 6).split(1)]
    assert [out is None for out in outputs] == [True] * (stages - 1) + [False] * (7 - stages), "None while it fills"
    latents = torch.cat([out for out in outputs if out is not None] + ticks.flush())
    assert close(ticks.decode_image(latents), expected) and ticks.flush() == []

    text = stream_of("sd3", indices)
    drawn = torch.cat([text.txt2img() for _ in range(6)])
    assert close(drawn, expected), "the first call fills the ring"
    assert len(text.flush()) == stages - 1

    frames = list(stream_of("sd3", indices).frames([None] * 6))
    assert [frame.id for frame in frames] == list(range(6))
    assert close(torch.stack([frame.image for frame in frames]), expected)

    if stages < 4:
        images = stream_of("sd3", indices)
        calls = [images(picture(k)) for k in range(5)]
        left = images.flush()
        loop.prepare(PROMPT, num_inference_steps=4)
        alone = [loop(picture(k)) for k in range(5)]
        in_order = [alone[0]] * (stages - 1) + alone[: 6 - stages]
        assert all(close(a, b) for a, b in zip(calls, in_order, strict=True))
        assert len(left) == stages - 1, "copies are no frames"
        assert all(close(images.decode_image(a), b) for a, b in zip(left, alone[6 - stages :], strict=True))


def test_fault_06_the_seed_sets_all_noise_of_text_and_of_images(stream_of, picture):
    """Text frames have their own noise each; image frames share one, or have their own where asked for."""

    def draw(seed, disturb=False, **options):
        text = stream_of("sd3", [0, 2], prepare={"seed": seed}, **options)
        images = stream_of("sd3", [2, 3], prepare={"seed": seed}, **options)
        if disturb:
            torch.manual_seed(99)
        drawn = [text.txt2img(), text.txt2img()] + [images(picture(1)) for _ in range(3)]
        return torch.cat(drawn)

    state = torch.get_rng_state()
    fixed, again, other = draw(4), draw(4, disturb=True), draw(5)
    fresh = draw(4, noise="frame")
    torch.set_rng_state(state)
    assert torch.equal(fixed, again)
    assert not any(close(a[None], b[None], 1e-3) for a, b in zip(fixed, other, strict=True))
    assert not close(fixed[:1], fixed[1:2], 1e-3), "two text frames differ"
    assert close(fixed[3:4], fixed[4:5], 1e-5), "a still picture stays still"
    assert not close(fresh[3:4], fresh[4:5], 1e-3), "noise='frame' is fresh for each"


def test_fault_07_streams_share_no_random_state_and_encoding_is_no_lottery(stream_of, picture):
    alone = stream_of("sd3", [2, 3])
    expected = [alone.txt2img() for _ in range(3)]
    one, other = stream_of("sd3", [2, 3]), stream_of("sd3", [2, 3])
    before = torch.get_rng_state()
    for k in range(3):
        assert torch.equal(one.txt2img(), expected[k]) and torch.equal(other.txt2img(), expected[k])
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert inspect.signature(StreamFlow.prepare).parameters["generator"].default is None

    given, twin = (torch.Generator().manual_seed(7) for _ in range(2))
    one.prepare(PROMPT, num_inference_steps=4, generator=given)
    assert one.generator is given and torch.equal(given.get_state(), twin.get_state()), "used as it is, not reseeded"
    one.prepare(PROMPT, num_inference_steps=4, generator=None)
    assert torch.equal(one.txt2img(), expected[0])
    x = one.preprocess(picture(1))
    assert torch.equal(one.encode_image(x), one.encode_image(x))
    mode = one.vae.encode(x).latent_dist.mode()
    clean = one.add_noise((mode - one.vae.config.shift_factor) * one.vae.config.scaling_factor, one.init_noise[:1], 0)
    assert close(one.encode_image(x), clean, 1e-6)


@pytest.mark.parametrize("add_noise", [False, True], ids=["euler", "renoise"])
def test_fault_08_without_the_batch_the_noise_is_kept_and_seeded(stream_of, add_noise):
    options = {"use_denoising_batch": False, "do_add_noise": add_noise}
    stream, twin = stream_of("sd3", **options), stream_of("sd3", **options)
    noise = stream.init_noise.clone()
    drawn = stream.txt2img()
    assert torch.equal(stream.init_noise, noise) and torch.equal(twin.init_noise, noise)
    torch.manual_seed(1)
    assert torch.equal(twin.txt2img(), drawn)


@pytest.mark.parametrize("value", [0.5, 0.75, 1.0])
def test_fault_09_a_normalised_image_is_not_normalised_twice(stream_of, value):
    """StreamDiffusion guesses by the least value: a constant 0.5 became 0.0."""
    stream = stream_of("sd3", [2, 3])
    once = stream.preprocess(torch.full((3, 64, 64), value))
    assert torch.equal(once, torch.full((1, 3, 64, 64), 2 * value - 1))
    assert stream.preprocess(once) is once
    plain = torch.full((3, 64, 64), value)
    other = stream_of("sd3", [2, 3], input_range=(-1, 1))
    twin = stream_of("sd3", [2, 3])
    assert torch.equal(stream(once), twin(plain))
    assert torch.equal(other.preprocess(plain), torch.full((1, 3, 64, 64), value))


def test_fault_10_sizes_follow_the_vaes_own_factor(pipes):
    sd3 = pipes("sd3")
    for blocks, factor in ((2, 2), (3, 4)):
        vae = AutoencoderKL(
            latent_channels=16,
            block_out_channels=(8,) * blocks,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            norm_num_groups=4,
            scaling_factor=1.5,
            shift_factor=0.1,
        )
        pipe = StableDiffusion3Pipeline(**{**sd3.components, "vae": vae})
        stream = StreamFlow(pipe, [3], width=16 * factor, height=8 * factor, cfg_type="none")
        stream.prepare(PROMPT, num_inference_steps=4)
        assert (stream.latent_height, stream.latent_width) == (8, 16)
        assert stream.image_processor.config.vae_scale_factor == factor
        assert stream.image_processor.config.do_resize is True
        assert stream.txt2img().shape == (1, 3, 8 * factor, 16 * factor)
        assert stream(Image.new("RGB", (16 * factor, 8 * factor))).shape == (1, 3, 8 * factor, 16 * factor)
    flux = StreamFlow(pipes("flux"), [0], height=32, width=96)
    flux.prepare(PROMPT, num_inference_steps=1)
    assert flux.txt2img().shape == (1, 3, 32, 96)


def test_fault_11_the_seed_is_kept_by_everything_that_does_not_name_it(stream_of):
    stream = stream_of("sd3", [0, 2], prepare={"seed": 7})
    reference = torch.cat([stream.frame_noise(k) for k in range(3)])
    stream.update_prompt(OTHER)
    stream.update(guidance_scale=2.0, t_index_list=[0, 1])
    stream.txt2img()
    assert torch.equal(torch.cat([stream.frame_noise(k) for k in range(3)]), reference)


def test_fault_12_the_filter_counts_skips_in_a_row_and_never_waits(stream_of, picture, monkeypatch):
    one, other = torch.ones(1, 3, 8, 8), -torch.ones(1, 3, 8, 8)

    def skips_after(make, history):
        return [make(x) is None for x in [*history, *[other] * 5]][len(history) :]

    assert skips_after(SimilarImageFilter(0.5, 2), []) == [False, True, True, False, True]
    assert skips_after(SimilarImageFilter(0.5, 2), [one, one]) == [False, True, True, False, True]
    assert skips_after(OriginalFilter(0.5, 2), [one, one]) != skips_after(OriginalFilter(0.5, 2), []), "its is cumulative"

    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("the caller was made to wait"))
    stream = stream_of("sd3", [2, 3])
    stream.enable_similar_image_filter(threshold=0.5, max_skip_frame=2)
    first = stream(picture(0))
    held = stream.x_t_latent_buffer.clone()
    assert torch.equal(stream(picture(0)), first) and torch.equal(stream(picture(0)), first)
    assert torch.equal(stream.x_t_latent_buffer, held), "a skipped frame costs nothing"
    assert stream.similar_filter.skip_count == 2
    stream(picture(0))
    assert stream.similar_filter.skip_count == 0, "after two skips in a row it is drawn"
    stream.prepare(PROMPT, num_inference_steps=4)
    assert stream.similar_filter.prev_tensor is None and stream.similar_filter.skip_count == 0
    frames = list(stream.frames([picture(0)] * 3 + [Image.new("RGB", (64, 64), "white")]))
    assert [frame.skipped for frame in frames] == [False, True, True, False]
    assert torch.equal(frames[1].image, frames[0].image) and not torch.equal(frames[3].image, frames[0].image)
    stream.disable_similar_image_filter()
    stream.prepare(PROMPT, num_inference_steps=4)
    assert not any(frame.skipped for frame in stream.frames([picture(0)] * 3))


def test_fault_12_a_skipped_frame_gets_the_image_that_it_resembles(stream_of, picture):
    """Also where another kind of frame was drawn in between."""
    stream = stream_of("sd3", [2, 3])
    stream.enable_similar_image_filter(threshold=0.5)
    frames = list(stream.frames([picture(0), None, picture(0)]))
    assert not frames[2].skipped or torch.equal(frames[2].image, frames[0].image)


def test_fault_12_after_text_a_skipped_image_does_not_show_the_text(stream_of, picture):
    stream = stream_of("sd3", [3])
    stream.enable_similar_image_filter(threshold=0.5)
    first, text = stream(picture(0)), stream.txt2img()
    again = stream(picture(0))
    assert close(again, first) and not close(again, text, 1e-2)


def test_fault_13_nothing_of_cuda_is_touched_on_another_device(stream_of, picture, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.cuda was called")

    for name in ("Event", "synchronize", "current_stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    stream = stream_of("sd3", [2, 3])
    stream(picture(0)), stream.txt2img()
    stream.flush()
    for frame in stream.frames([picture(0), None]):
        assert frame.ready() and frame.wait() is frame
    assert stream.inference_time_ema > 0


def test_fault_14_the_schedule_is_the_flows_own_and_the_pipes_scheduler_is_untouched(pipes, stream_of):
    pipe = pipes("sd3", scheduler={"shift": 2.3})
    before = {name: repr(value) for name, value in vars(pipe.scheduler).items()}
    stream = StreamFlow(pipe, [0, 3, 6], cfg_type="none")
    stream.prepare(PROMPT, num_inference_steps=7)
    stream.txt2img()
    assert {name: repr(value) for name, value in vars(pipe.scheduler).items()} == before
    own = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    own.set_timesteps(7)
    assert stream.timesteps.dtype == torch.float32 and torch.equal(stream.timesteps, own.timesteps)
    assert any(t != round(t) for t in stream.timesteps.tolist()), "fractions of a timestep are kept"
    assert torch.equal(stream.beta_prod_t_sqrt.flatten(), own.sigmas[[0, 3, 6]])
    assert isinstance(stream.scheduler, FlowMatchEulerDiscreteScheduler) and stream.scheduler is not pipe.scheduler


@pytest.mark.parametrize("family", ["sd3", "flux", "instaflow"])
def test_fault_15_channels_shift_packing_and_network_come_from_the_pipeline(stream_of, family):
    stream = stream_of(family, [2, 3])
    vae, pipe = stream.vae, stream.pipe
    latents = torch.randn((1, *stream._model.shape), generator=torch.Generator().manual_seed(0))
    z = latents
    if family == "flux":
        z = type(pipe)._unpack_latents(latents, 64, 64, 8)
    assert z.shape[1] == vae.config.latent_channels == (4 if family == "instaflow" else 16)
    with torch.no_grad():
        expected = vae.decode(z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample.clamp(-1, 1)
    assert torch.equal(stream.decode_image(latents), expected)
    assert stream.unet is (pipe.unet if family == "instaflow" else pipe.transformer)
    names = set(stream._denoiser.state.prompt.cond.rows) | set(stream._denoiser.state.prompt.cond.shared)
    extra = {"sd3": {"pooled_projections"}, "flux": {"pooled_projections", "guidance", "txt_ids", "img_ids"}}
    assert names == {"encoder_hidden_states"} | extra.get(family, set())


def test_fault_16_halves_are_the_networks_and_coefficients_are_float32(stream_of, picture):
    stream = stream_of("sd3", [2, 3], dtype=torch.bfloat16)
    assert stream.dtype == torch.bfloat16 and stream.timesteps.dtype == torch.float32
    rows = stream._denoiser.engine.rows
    assert {t.dtype for t in (rows.sigma, rows.sigma_next, rows.t)} == {torch.float32}
    for drawn in (stream.txt2img(), stream(picture(0))):
        assert drawn.dtype == torch.bfloat16 and drawn.isfinite().all()
        image = postprocess_image(drawn)[0]
        assert np.asarray(image).std() > 0
    assert pil2tensor(picture(0)).dtype == torch.float32
    assert stream.frame_noise(0).dtype == torch.bfloat16
    assert torch.equal(stream.frame_noise(0), stream_of("sd3", [2, 3]).frame_noise(0).bfloat16())


def test_fault_17_loras_are_fused_by_todays_names(stream_of, monkeypatch):
    stream = stream_of("sd3")
    calls = []
    monkeypatch.setattr(
        type(stream.pipe), "fuse_lora", lambda self, components, **kwargs: calls.append({"components": components, **kwargs})
    )
    stream.fuse_lora()
    stream.fuse_lora(True, False, 0.5, True)
    assert calls[0]["components"] == ["transformer", "text_encoder", "text_encoder_2"]
    assert calls[1] == {"components": ["transformer"], "lora_scale": 0.5, "safe_fusing": True, "adapter_names": None}
    assert not {"fuse_unet", "fuse_text_encoder"} & set(calls[0])
    with pytest.raises(NotImplementedError, match="a rectified flow does that by itself"):
        stream.load_lcm_lora()


def test_fault_18_todays_diffusers_does_and_streamdiffusions_tensorrt_is_not_touched(stream_of):
    assert tuple(map(int, diffusers.__version__.split(".")[:2])) > (0, 24), "newer than the one that StreamDiffusion pins"
    stream_of("sd3").txt2img()
    assert not any(name.startswith("streamdiffusion.acceleration") for name in sys.modules)
    assert importlib.util.find_spec("streamdiffusion.acceleration") is not None, "it is there, and left alone"
