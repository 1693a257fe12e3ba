"""SkyReels without end: each block is that of the pipeline's call for long videos, with constant memory and cost."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import relative_error, slow

from streamflow import VideoStream

ROUNDING = torch.finfo(torch.float32).eps
SEED = 3
SHIFT = 4  # images a latent frame


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform values in [0, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def embeds(seed: int = 0) -> torch.Tensor:
    """The embeddings of a prompt."""
    return torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(seed))


# Windows of 6 latent frames, which begin with 2 of the window before; a block is 2.
SMALL = {"prompt_embeds": embeds(), "height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0}
SMALL |= {"base_num_frames": 21, "overlap_history": 5, "causal_block_size": 2, "ar_step": 1}
GUIDED = {"guidance_scale": 3.0, "negative_prompt_embeds": embeds(1)}
CACHED = {"use_kv_cache": True}
VIDEO = {"video": random(1, 13, 3, 16, 16)}
IMAGE = {"image": random(1, 3, 16, 16), "causal_block_size": 1, "base_num_frames": 13}


def stream_of(pipe, output_type: str = "latent", **call) -> VideoStream:
    stream = VideoStream(pipe, output_type=output_type)
    stream.prepare(seed=SEED, **{**SMALL, **call})
    return stream


def latents(stream: VideoStream, chunks: int) -> torch.Tensor:
    """The latents of the next chunks, in one."""
    return torch.cat([chunk.latents for chunk in stream.chunks(chunks)], dim=2)


def own(pipe, windows: int, output_type: str = "latent", **call) -> torch.Tensor:
    """What the pipeline's own call draws in so many windows, of all noise from one generator."""
    call = {"prompt": None, **SMALL, **call}
    call.pop("use_kv_cache", None)
    base, overlap = ((call[name] - 1) // SHIFT + 1 for name in ("base_num_frames", "overlap_history"))
    frames = base + (windows - 1) * (base - overlap)
    before = pipe.transformer.config.num_frame_per_block
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # `addnoise_condition` has no other generator
        try:
            drawn = pipe(**call, num_frames=(frames - 1) * SHIFT + 1, output_type=output_type).frames
        finally:
            pipe.transformer._set_ar_attention(before)
    return torch.as_tensor(drawn)


@contextmanager
def recorded(pipe, added: dict[int, torch.Tensor] | None = None) -> Iterator[list[int]]:
    """How many frames each call of the network has. added: to the outputs of these calls."""
    calls: list[int] = []

    def hook(module, arguments, keywords, output):
        calls.append(keywords["hidden_states"].shape[2])
        more = (added or {}).get(len(calls) - 1)
        return None if more is None else (output[0] + more,)

    handle = pipe.transformer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


# -- equal to the pipeline -------------------------------------------------------------------------------------------------

CASES = {
    "text": ("skyreels", {}),
    "text-guided": ("skyreels", GUIDED),
    "text-one-frame": ("skyreels", {"causal_block_size": None, "ar_step": 2}),
    "text-together": ("skyreels", {"ar_step": 0}),
    "text-one-by-one": ("skyreels", {"ar_step": 9}),
    "text-noise": ("skyreels", {"addnoise_condition": 20}),
    "text-long-overlap": ("skyreels", {"overlap_history": 13}),
    "text-16-fps": ("skyreels", {"fps": 16, "attention_kwargs": {}}),
    "image": ("skyreels-image", IMAGE),
    "image-noise": ("skyreels-image", {**IMAGE, "addnoise_condition": 20, "ar_step": 0}),
    "image-guided": ("skyreels-image", {**IMAGE, **GUIDED, "base_num_frames": 17}),
    "video": ("skyreels-video", {**VIDEO, "base_num_frames": 13}),
    "video-guided": ("skyreels-video", {**VIDEO, **GUIDED}),
    "video-short": ("skyreels-video", {"video": random(1, 5, 3, 16, 16), "overlap_history": 13}),
}
QUICK = {"text-noise", "image", "video"}


@pytest.mark.parametrize("case", [case if case in QUICK else slow(case) for case in CASES])
def test_each_chunk_is_a_block_of_the_pipelines_long_video(case, pipes):
    """Latents to the bit. Decoded part after part, they are decoded as a whole."""
    family, call = CASES[case]
    pipe, windows = pipes(family), 2 if case in QUICK else 4
    drawn, pixels = own(pipe, windows, **call), own(pipe, windows, "pt", **call)[0]
    block = {**SMALL, **call}["causal_block_size"] or 1
    stream = stream_of(pipe, "pt", **call)
    chunks = list(stream.chunks(drawn.shape[2] // block))
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks], dim=2), drawn)
    images = torch.cat([chunk.images for chunk in chunks])
    assert images.shape == pixels.shape and (images - pixels).abs().max() < 3e-7
    assert [frame.id for chunk in chunks for frame in chunk.frames()] == list(range(len(pixels)))
    assert not torch.equal(drawn[:, :, :1], drawn[:, :, -1:]), "frames that are alike would prove nothing"


ASYNCHRONOUS = [(ar_step, steps) for ar_step in (1, 2) for steps in (4, 6)]


@pytest.mark.parametrize(("ar_step", "steps"), [ASYNCHRONOUS[0], *(slow(*one) for one in ASYNCHRONOUS[1:])])
def test_a_ring_of_blocks_is_the_asynchronous_pipeline(ar_step, steps, pipes):
    """With and without keys that are kept: each frame of several windows within four times rounding."""
    pipe, call = pipes("skyreels"), {"ar_step": ar_step, "num_inference_steps": steps, **GUIDED}
    drawn = own(pipe, 2 if (ar_step, steps) == ASYNCHRONOUS[0] else 5, **call)
    for cached in (False, True):
        found = latents(stream_of(pipe, use_kv_cache=cached, **call), drawn.shape[2] // 2)
        error = relative_error(found.transpose(0, 2), drawn.transpose(0, 2))
        assert error < 4 * ROUNDING and (cached or error == 0)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_the_first_window_is_the_pipelines_short_video(cached, pipes):
    call = {"base_num_frames": 57, "overlap_history": 17, "causal_block_size": 5, "num_inference_steps": 6}
    drawn = own(pipes("skyreels"), 1, **call)
    found = latents(stream_of(pipes("skyreels"), use_kv_cache=cached, **call), 3)
    assert relative_error(found.transpose(0, 2), drawn.transpose(0, 2)) < 4 * ROUNDING


@pytest.mark.parametrize("family", ["skyreels", slow("skyreels-video")])
def test_a_block_leaves_before_the_window_is_drawn(family, pipes):
    """The first after its own steps; each other one `ar_step` steps later."""
    pipe, call = pipes(family), VIDEO if family == "skyreels-video" else {}
    with recorded(pipe) as calls:
        ends = [len(calls) for _ in stream_of(pipe, ar_step=2, num_inference_steps=4, **call).chunks(5)]
    assert ends == ([4, 6, 8, 8 + 4, 8 + 6] if family == "skyreels" else [0, 4, 6, 6 + 4, 6 + 6])


def test_kept_keys_save_what_is_finished_and_what_is_not_begun(pipes):
    """The network sees the blocks that are denoised, and each finished one once more."""
    pipe = pipes("skyreels")
    with recorded(pipe) as calls:
        latents(stream_of(pipe, ar_step=4, num_inference_steps=4, **CACHED), 5)
    first, second = [2] * 4 + [4, 2, 2, 2] * 2, [4, 2, 2, 2] * 2
    assert calls == first + second
    with recorded(pipe) as calls:
        latents(stream_of(pipe, ar_step=4, num_inference_steps=4), 3)
    assert calls == [6] * len(first)


@pytest.mark.slow
def test_half_precision_equals_the_pipeline_too(pipes):
    pipe = pipes("skyreels", torch.bfloat16)
    drawn = own(pipe, 2, **GUIDED)
    assert torch.equal(latents(stream_of(pipe, **GUIDED), 5), drawn)
    kept = latents(stream_of(pipe, **GUIDED, **CACHED), 5)
    assert kept.dtype == drawn.dtype and relative_error(kept, drawn) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_images_are_of_the_output_type(output_type, pipes):
    pipe = pipes("skyreels")
    pixels = stream_of(pipe, "pt")().images
    image = stream_of(pipe, output_type)().images[0]
    assert isinstance(image, PIL.Image.Image if output_type == "pil" else np.ndarray)
    image = np.asarray(image) / (255 if output_type == "pil" else 1)
    assert np.abs(image - pixels[0].permute(1, 2, 0).numpy()).max() <= 0.51 / 255


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("cached", [False, True])
def test_a_gpu_draws_the_pipelines_blocks_too(cached, pipes):
    """Kernels differ with the number of tokens, so that kept keys round otherwise."""
    pipe, call = copy.deepcopy(pipes("skyreels")).to("cuda"), {**GUIDED, "num_inference_steps": 4}
    given = {name: one.cuda() if isinstance(one, torch.Tensor) else one for name, one in {**SMALL, **call}.items()}
    generator = torch.Generator("cuda").manual_seed(SEED)
    drawn = pipe(prompt=None, **given, num_frames=37, generator=generator, output_type="latent").frames
    found = latents(stream_of(pipe, use_kv_cache=cached, **call), 5)
    assert found.is_cuda and relative_error(found.transpose(0, 2), drawn.transpose(0, 2)) < (1e-4 if cached else 1e-6)


# -- the pipeline is left alone --------------------------------------------------------------------------------------------


def test_the_pipeline_is_left_as_it_was_and_may_be_called_between_chunks(pipes):
    pipe = copy.deepcopy(pipes("skyreels"))
    plain = own(pipe, 2)
    before, config = dict(vars(pipe)), dict(pipe.transformer.config)
    processors = pipe.transformer.attn_processors
    stream = stream_of(pipe, **CACHED)
    first = latents(stream, 2)
    assert pipe.transformer.attn_processors == processors and dict(pipe.transformer.config) == config
    pipe(prompt=None, **{**SMALL, "causal_block_size": 3}, num_frames=21, output_type="latent")
    assert pipe.transformer.config.num_frame_per_block == 3
    found = torch.cat([first, latents(stream, 3)], dim=2)
    assert pipe.transformer.config.num_frame_per_block == 3
    assert relative_error(found, plain) < 4 * ROUNDING
    added = {name for name, value in vars(pipe).items() if before.get(name) is not value}
    assert all(name.startswith("_") for name in added), added
    with recorded(pipe, {1: torch.tensor(math.nan)}), pytest.raises(FloatingPointError):
        latents(stream_of(pipe, **CACHED), 1)
    assert pipe.transformer.attn_processors == processors and pipe.transformer.config.num_frame_per_block == 3


@pytest.mark.slow
def test_no_block_size_is_that_of_the_network(pipes):
    pipe = copy.deepcopy(pipes("skyreels"))
    pipe.transformer._set_ar_attention(2)
    stream, plain = stream_of(pipe, causal_block_size=None, **CACHED), stream_of(pipes("skyreels"), **CACHED)
    first = latents(stream, 1)
    pipe.transformer._set_ar_attention(3)
    stream.update(guidance_scale=1.0)
    assert torch.equal(torch.cat([first, latents(stream, 3)], dim=2), latents(plain, 4))


@pytest.mark.slow
def test_streams_of_one_pipe_in_turn_are_each_what_they_are_alone(pipes):
    pipe = pipes("skyreels")
    calls = [CACHED, {**CACHED, "prompt_embeds": embeds(4), "ar_step": 2}, {"causal_block_size": 1}]
    alone = [latents(stream_of(pipe, **call), 5) for call in calls]
    streams = [stream_of(pipe, **call) for call in calls]
    drawn = [[stream() for stream in streams] for _ in range(5)]
    for k in range(len(calls)):
        assert torch.equal(torch.cat([chunks[k].latents for chunks in drawn], dim=2), alone[k])


# -- without end -----------------------------------------------------------------------------------------------------------


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors inside."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)
    elif dataclasses.is_dataclass(value) or hasattr(value, "step"):
        yield from tensors(dict(vars(value)))


@pytest.mark.parametrize(
    ("chunks", "call"),
    [
        (9, {**CACHED, **GUIDED}),
        slow(20, {}),
        slow(20, {"ar_step": 2, "num_inference_steps": 5}),
        slow(1000, {**CACHED, "num_inference_steps": 1}),
    ],
)
def test_without_end_memory_and_cost_are_constant(chunks, call, pipes):
    """A window has two new blocks: what is carried, and the calls of the network, are as one window before."""
    pipe, sizes, costs, ids = pipes("skyreels"), [], [], []
    stream = stream_of(pipe, "pt", **call)
    with recorded(pipe) as calls:
        for chunk in stream.chunks(chunks):
            ids += [frame.id for frame in chunk.frames()]
            sizes.append(
                sorted((*one.shape, one.untyped_storage().nbytes()) for one in tensors(stream._video.state.position.history))
            )
            costs.append(list(calls))
            calls.clear()
    assert ids == list(range(chunks * 2 * SHIFT - 3))
    assert len(sizes[5]) > 20 and all(sizes[k] == sizes[k - 2] for k in range(5, chunks))
    assert all(costs[k] == costs[k - 2] for k in range(5, chunks))


@pytest.mark.parametrize(("changed_at", "cached"), [(2, True), slow(1, True), slow(1, False), slow(3, True), slow(3, False)])
def test_a_prompt_that_changes_acts_on_the_next_steps_of_all_blocks(changed_at, cached, pipes):
    """As in the pipeline, whose callback changes the prompt after the same step. Blocks that are given stay."""
    pipe, ends = pipes("skyreels"), iter(range(10**6))
    call = {**GUIDED, "use_kv_cache": cached}
    stream, plain = stream_of(pipe, **call), latents(stream_of(pipe, **call), 5)
    with recorded(pipe) as calls:
        first = latents(stream, changed_at)
    steps = len(calls) // 2
    assert stream.update(prompt_embeds=embeds(7)) == 1
    found = torch.cat([first, latents(stream, 5 - changed_at)], dim=2)
    drawn = own(
        pipe,
        2,
        **GUIDED,
        callback_on_step_end=lambda *_: {"prompt_embeds": embeds(7)} if next(ends) == steps - 1 else {},
    )
    given = 2 * changed_at
    assert torch.equal(found[:, :, :given], plain[:, :, :given]) and not torch.equal(found, plain)
    bound = 6 * ROUNDING * cached  # a step with guidance of 3 adds three times one network output and twice the other
    assert relative_error(found.transpose(0, 2), drawn.transpose(0, 2)) <= bound


@pytest.mark.slow
def test_guidance_may_be_turned_on_and_off(pipes):
    """Kept keys are those of the same prompt, whatever was drawn between."""
    pipe, found = pipes("skyreels"), []
    for kept in (False, True):
        stream = stream_of(pipe, negative_prompt_embeds=embeds(1), use_kv_cache=kept)
        parts = [latents(stream, 1)]
        for scale in (3.0, 1.0, 2.0):
            stream.update(guidance_scale=scale)
            parts.append(latents(stream, 2))
        found.append(torch.cat(parts, dim=2))
    assert relative_error(found[1], found[0]) < 4 * ROUNDING


# -- seeds and faults ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_seeds_and_reset(pipes):
    pipe = pipes("skyreels")
    plain = latents(stream_of(pipe), 5)
    stream = VideoStream(pipe, output_type="latent")
    stream.prepare(generator=torch.Generator().manual_seed(SEED), **SMALL)
    assert torch.equal(latents(stream, 4), plain[:, :, :8])
    stream.reset()
    with torch.inference_mode():
        first = latents(stream, 1)
    assert torch.equal(torch.cat([first, latents(stream, 4)], dim=2), plain)
    stream.reset()
    stream.update(seed=5)  # acts where noise is drawn
    other = latents(stream, 2)
    assert not torch.equal(other, plain[:, :, :4])
    stream.update(seed=6)
    assert torch.equal(latents(stream, 1), latents(stream_of_seed(pipe, 5), 3)[:, :, 4:]), "the noise of a window stays"


def stream_of_seed(pipe, seed: int) -> VideoStream:
    stream = VideoStream(pipe, output_type="latent")
    stream.prepare(seed=seed, **SMALL)
    return stream


@pytest.mark.parametrize(
    ("bad", "call"), [(3, CACHED), slow(0, CACHED), slow(6, CACHED), slow(3, {"addnoise_condition": 20})]
)
def test_a_chunk_with_nan_is_dropped_and_drawn_again(bad, call, pipes):
    """In the first window and in the next one, with what was drawn of its noise."""
    pipe, faults = pipes("skyreels"), []
    plain, stream, drawn = latents(stream_of(pipe, **call), 5), stream_of(pipe, **call), []
    with recorded(pipe, {bad: torch.tensor(math.nan)}):
        while len(drawn) < 5:
            try:
                drawn.append(stream().latents)
            except FloatingPointError as error:
                faults.append(str(error))
                assert f"chunk {len(drawn)}," in faults[-1]
    assert torch.equal(torch.cat(drawn, dim=2), plain) and len(faults) == 1


def test_a_block_that_is_not_finite_is_noticed_while_it_is_denoised(pipes):
    """Chunk 0 is finite itself, but would leave NaN to chunk 1 for ever."""
    pipe, added = pipes("skyreels"), torch.zeros(1, 1, 6, 1, 1)
    added[:, :, 2:4] = math.nan
    plain, stream = latents(stream_of(pipe), 2), stream_of(pipe)
    with recorded(pipe, {1: added}), pytest.raises(FloatingPointError, match="chunk 0, or a block that is denoised with it"):
        stream()
    assert torch.equal(latents(stream, 2), plain)


@pytest.mark.parametrize("fails_at", [2, slow(4)])
def test_a_chunk_ahead_of_the_next_window_leaves_kept_keys_as_they_are(fails_at, pipes):
    """The last chunk of a window fails in its decode, once the next window has begun, and is drawn again."""
    pipe, decodes = pipes("skyreels"), iter(range(10**9))

    def process(images):
        if next(decodes) == fails_at:
            raise MemoryError
        return images

    stream = VideoStream(pipe, output_type="pt", decode_on="cpu", postprocess=process)
    stream.prepare(seed=SEED, **{**SMALL, **CACHED})
    drawn = [stream().latents for _ in range(fails_at)]
    with pytest.raises(MemoryError):
        stream()
    drawn += [stream().latents for _ in range(2)]
    assert torch.equal(torch.cat(drawn, dim=2), latents(stream_of(pipe, **CACHED), fails_at + 2))
    stream.close()


@pytest.mark.slow
def test_what_is_returned_is_the_callers(pipes):
    pipe = pipes("skyreels")
    plain, stream = latents(stream_of(pipe, **CACHED), 5), stream_of(pipe, **CACHED)
    for k in range(5):
        chunk = stream()
        assert torch.equal(chunk.latents, plain[:, :, 2 * k : 2 * k + 2])
        chunk.latents.fill_(math.nan)


# -- what cannot be --------------------------------------------------------------------------------------------------------

BAD = [
    ("skyreels", {"overlap_history": None}, "pass overlap_history=17 or 37"),
    ("skyreels", {"overlap_history": 2.5}, "overlap_history must be an integer"),
    ("skyreels", {"overlap_history": 21}, "overlap_history 21 is 6 latent frames, and base_num_frames 21 is 6"),
    ("skyreels", {"overlap_history": 9}, "overlap_history 9 is 3 latent frames.* of 2: pass overlap_history=5"),
    ("skyreels", {"base_num_frames": 25}, "base_num_frames 25 is 7 latent frames.* of 2: pass base_num_frames=21"),
    ("skyreels", {"base_num_frames": None}, "base_num_frames must be an integer"),
    ("skyreels", {"base_num_frames": 133}, "base_num_frames 133 needs 34 positions, and the network has 32"),
    ("skyreels", {"width": 528}, "width 528 needs 33 positions, and the network has 32"),
    ("skyreels", {"ar_step": -1}, "ar_step must be an integer from 0 to 65,536"),
    ("skyreels", {"causal_block_size": 0}, "causal_block_size must be an integer from 1 to 65,536"),
    ("skyreels", {"fps": "24"}, "fps must be an integer"),
    ("skyreels", {"addnoise_condition": None}, "addnoise_condition is a number from 0 to 1000, not None"),
    ("skyreels", {"addnoise_condition": -2}, "addnoise_condition is a number from 0 to 1000, not -2"),
    ("skyreels", {"use_kv_cache": 1}, "use_kv_cache must be True or False"),
    ("skyreels", {"use_kv_cache": True, "causal_block_size": 1}, "use_kv_cache needs causal_block_size=2 or more"),
    ("skyreels", {"use_kv_cache": True, "addnoise_condition": 20}, "use_kv_cache needs addnoise_condition=0, not 20"),
    ("skyreels", {"num_frames": 21}, "num_frames .* has no end"),
    ("skyreels", {"latents": random(1, 16, 6, 2, 2)}, "latents .*generator"),
    ("skyreels", {"prompt_embeds": None}, "Provide either"),
    ("skyreels", {"height": 24}, "divisible by 16"),
    ("skyreels", {"keys": True}, "takes no 'keys'; it takes .*use_kv_cache"),
    ("skyreels-image", {}, "Provide either `image`"),
    ("skyreels-image", {"image": random(1, 3, 16, 16)}, "causal_block_size is 1, not 2.* the image 5 times"),
    ("skyreels-image", {**IMAGE, "last_image": random(1, 3, 16, 16)}, "last_image .* has none"),
    ("skyreels-image", {"image_embeds": random(1, 4), "causal_block_size": 1}, "image_embeds .* pass image"),
    ("skyreels-image", {**IMAGE, "image": random(2, 3, 16, 16)}, "one video, and these are 2"),
    ("skyreels-image", {**IMAGE, "image": random(1, 3, 16, 16) * math.nan}, "image holds NaN"),
    ("skyreels-video", {}, "goes on from a video: pass video="),
    ("skyreels-video", {"video": random(1, 4, 3, 16, 16)}, "video has 4 frames, and a block is 5"),
    ("skyreels-video", {"video": random(1, 9, 3, 16, 16) * math.inf}, "video holds NaN"),
    ("skyreels-video", {"video": random(1, 9, 1, 16, 16)}, "video has 1 channels, and the VAE takes 3"),
]


@pytest.mark.parametrize(("family", "given", "message"), BAD)
def test_bad_input_is_refused_with_a_line_and_changes_nothing(family, given, message, pipes):
    stream = stream_of(pipes(family), **{"skyreels": {}, "skyreels-image": IMAGE, "skyreels-video": VIDEO}[family])
    video, history = stream._video, stream._video.state.position.history
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        stream.prepare(**{**SMALL, **given})
    assert "\n" not in str(raised.value)
    assert stream._video is video and video.state.position.history is history


def test_what_cannot_change_from_chunk_to_chunk(pipes):
    stream = stream_of(pipes("skyreels"))
    for given in ({"num_inference_steps": 5}, {"ar_step": 2}, {"use_kv_cache": True}, {"attention_kwargs": {}}):
        with pytest.raises(ValueError, match="cannot change from chunk to chunk: .*These can: .*guidance_scale"):
            stream.update(**given)


def test_kept_keys_need_the_networks_own_attention_and_a_stream_its_scheduler(pipes):
    pipe = copy.deepcopy(pipes("skyreels"))

    class Other(type(pipe.transformer.blocks[0].attn1.processor)):
        pass

    pipe.transformer.blocks[0].attn1.set_processor(Other())
    stream = stream_of(pipe)
    with pytest.raises(ValueError, match="own SkyReelsV2AttnProcessor in the network, not Other"):
        stream.prepare(**SMALL, use_kv_cache=True)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="`mu` must be passed"):
        stream.prepare(**SMALL)
    pipe.vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        stream.prepare(**SMALL)
