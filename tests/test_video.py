"""A video without end: each chunk equals the pipeline's own to the bit, with constant memory, whatever disturbs it."""

from __future__ import annotations

import copy
import inspect
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import slow
from diffusers.pipelines.helios import pipeline_helios
from random_pipelines import random_pipeline
from random_pipelines.video import wan_vae

from streamflow import StreamFlow, VideoStream
from streamflow.io import TimedImage
from streamflow.models import VIDEO_PIPELINES
from streamflow.models.pipe_parts import TEXT_PACKAGES
from streamflow.models.video_kinds import REASONS
from streamflow.video import VideoFrame

ROOT = Path(__file__).parents[1]
FRAMES = 9  # a chunk of the small Helios: 3 latent frames
SEED = 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform values in [0, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def embeds(seed: int = 0) -> torch.Tensor:
    """The embeddings of a prompt."""
    return torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SMALL = {"prompt_embeds": embeds(), "height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0}
SMALL |= {"num_latent_frames_per_chunk": 3}
PYRAMID = {"prompt_embeds": embeds(), "height": 64, "width": 64, "guidance_scale": 1.0}
PYRAMID |= {"pyramid_num_inference_steps_list": [1, 1, 1], "num_latent_frames_per_chunk": 3}
GUIDED = {"guidance_scale": 3.0, "negative_prompt_embeds": embeds(1)}


def stream_of(pipe, output_type: str = "latent", **call) -> VideoStream:
    """A prepared stream, by default of the small Helios."""
    stream = VideoStream(pipe, output_type=output_type)
    stream.prepare(seed=SEED, **{**SMALL, **call})
    return stream


def latents(stream: VideoStream, chunks: int | None) -> list[torch.Tensor]:
    """The latents of the next chunks; None: of all."""
    return [chunk.latents for chunk in stream.chunks(chunks)]


def equal(some, others) -> bool:
    """Whether two sequences hold the same tensors to the bit."""
    return len(some) == len(others) and all(map(torch.equal, some, others))


@contextmanager
def hooked(pipe, act: Callable[[int], float | None]):
    """Calls `act` with the number of each call of the network, from 0. A number that it returns is added to the output."""
    calls = iter(range(10**9))

    def hook(module, arguments, output):
        added = act(next(calls))
        return None if added is None else tuple(one + added for one in output)

    handle = pipe.transformer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# -- equal to the pipeline -------------------------------------------------------------------------------------------------

CASES = {
    "helios": ("helios", SMALL),
    "helios-guided": ("helios", {**SMALL, **GUIDED}),
    "helios-image": ("helios", {**SMALL, "image": random(1, 3, 16, 16)}),
    "helios-image-latents": (
        "helios",
        {**SMALL, "image_latents": random(1, 16, 1, 2, 2), "fake_image_latents": random(1, 16, 1, 2, 2, seed=1)},
    ),
    "helios-video": ("helios", {**SMALL, "video": random(1, 20, 3, 16, 16)}),
    "helios-long-video": ("helios", {**SMALL, "video": random(1, 100, 3, 16, 16)}),
    "helios-video-latents": (
        "helios",
        {**SMALL, "video_latents": random(1, 16, 6, 2, 2), "image_latents": random(1, 16, 1, 2, 2)}
        | {"add_noise_to_image_latents": False},
    ),
    "helios-second-first-frame": ("helios", {**SMALL, "is_skip_first_chunk": True}),
    "helios-sizes": ("helios", {**SMALL, "history_sizes": [1, 4, 2], "num_latent_frames_per_chunk": 9}),
    "helios-one-latent": ("helios", {**SMALL, "num_latent_frames_per_chunk": 1}),
    "distilled": ("helios-distilled", {**PYRAMID, "is_amplify_first_chunk": True}),
    "pyramid-guided-image": ("helios-pyramid", {**PYRAMID, **GUIDED, "image": random(1, 3, 64, 64)}),
    "pyramid-video": ("helios-pyramid", {**PYRAMID, "video": random(1, 40, 3, 64, 64)}),
}
SLOW = {"helios-long-video", "helios-video-latents", "pyramid-video", "helios-one-latent"}


@pytest.mark.parametrize("case", [slow(case) if case in SLOW else case for case in CASES])
def test_each_chunk_is_that_of_a_longer_call_of_the_pipeline(case, pipes):
    """Latents and pixels, to the bit. A call's latents begin with what it was given."""
    family, call = CASES[case]
    pipe = pipes(family)
    frames = (call.get("num_latent_frames_per_chunk", 9) - 1) * 4 + 1
    count, steps = (
        (3, call["num_inference_steps"]) if family == "helios" else (2, sum(call["pyramid_num_inference_steps_list"]))
    )
    own: list[torch.Tensor] = []
    pixels = pipe(
        **call,
        num_frames=count * frames,
        generator=seeded(),
        output_type="pt",
        callback_on_step_end=lambda pipe, step, timestep, tensors: own.append(tensors["latents"]) or {},
    ).frames[0]
    first = len(own) - steps * (count - 1)  # of the steps of the second chunk
    own = [own[first - 1], *own[first + steps - 1 :: steps]]
    stream = VideoStream(pipe, output_type="pt")
    stream.prepare(generator=seeded(), **call)
    chunks = list(stream.chunks(count))
    assert equal([chunk.latents for chunk in chunks], own)
    images = torch.cat([chunk.images for chunk in chunks])
    assert len(images) == count * frames and len(images) - 3 <= len(pixels)  # the pipeline drops up to three at the end
    assert torch.equal(images[: len(pixels)], pixels)
    assert [chunk.first_frame for chunk in chunks] == [k * frames for k in range(count)]
    assert not torch.equal(own[0][:, :, :1], own[-1][:, :, -1:]), "chunks that are alike would prove nothing"


@pytest.mark.parametrize("context", [slow(0), 1, slow(2)])
def test_anyflows_chunks_are_those_of_a_longer_call(context, pipes):
    """The given video leaves with the first chunk. Decoded part after part, it is decoded as a whole."""
    pipe, sizes = pipes("anyflow-far", full_chunk_limit=2), [1, 2, 2, 2][: 3 + context // 2]
    given = sum(sizes[:context])
    call = {"prompt_embeds": embeds(), "height": 32, "width": 32, "num_inference_steps": 1, **GUIDED}
    if context:
        call["video"] = random(1, 4 * given - 3, 3, 32, 32)
    generator = seeded()  # of the draws, chunk by chunk
    draws = [torch.randn(1, 16, size, 4, 4, generator=generator) for size in sizes[context:]]
    noise = torch.cat([torch.zeros(1, 16, given, 4, 4), *draws], dim=2)
    own: list[torch.Tensor] = []
    pixels = pipe(
        **call,
        latents=noise,
        num_frames=4 * sum(sizes) - 3,
        chunk_partition=sizes,
        output_type="pt",
        callback_on_step_end=lambda pipe, step, timestep, tensors: own.append(tensors["latents"].transpose(1, 2)) or {},
    ).frames[0]
    stream = VideoStream(pipe, output_type="pt")
    stream.prepare(seed=SEED, chunk_partition=[1, 2], **call)
    chunks = list(stream.chunks(len(draws)))
    assert equal([chunk.latents[:, :, -size:] for chunk, size in zip(chunks, sizes[context:], strict=True)], own)
    images = torch.cat([chunk.images for chunk in chunks])
    assert images.shape == pixels.shape and (images - pixels).abs().max() < 3e-7
    assert [frame.id for chunk in chunks for frame in chunk.frames()] == list(range(len(pixels)))


def test_a_video_of_anyflow_ends_with_the_networks_positions(pipes):
    stream = VideoStream(pipes("anyflow-far", rope_max_seq_len=4), output_type="pil")
    stream.prepare(prompt_embeds=embeds(), height=32, width=32, num_inference_steps=1, chunk_partition=(1, 2))
    assert [frame.id for frame in stream.frames()] == list(range(1 + 8))
    with pytest.raises(RuntimeError, match="the video has ended after 2 chunks"):
        stream()
    stream.reset()
    stream.update(**GUIDED)
    assert len(list(stream.chunks(1))) == 1
    stream.update(guidance_scale=1.0)
    assert len(list(stream.chunks())) == 1


def test_half_precision_equals_the_pipeline_too(pipes):
    pipe = pipes("helios", torch.bfloat16)
    call = {**SMALL, **GUIDED}
    own = pipe(**call, num_frames=2 * FRAMES, generator=seeded(), output_type="pt").frames[0]
    stream = stream_of(pipe, "pt", **GUIDED)
    assert torch.equal(torch.cat([chunk.images for chunk in stream.chunks(2)])[: len(own)], own)


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_images_are_of_the_output_type(output_type, pipes):
    pipe = pipes("helios")
    own = pipe(**SMALL, num_frames=FRAMES, generator=seeded(), output_type=output_type).frames[0]
    stream = stream_of(pipe, output_type)
    frame, chunk = next(stream.frames()), None
    assert frame.id == 0 and np.array_equal(frame.image, own[0])
    stream.reset()
    chunk = stream()
    assert len(chunk.images) == len(own) and all(map(np.array_equal, chunk.images, own))
    assert all(isinstance(image, PIL.Image.Image if output_type == "pil" else np.ndarray) for image in chunk.images)
    for one in (frame, *chunk.frames()):
        timed = one.timed()
        assert isinstance(timed, TimedImage) and timed.pts == one.time == one.id / 24 and timed.pixels.flags.owndata
    assert np.array_equal(frame.timed().pixels, np.asarray(own[0]) if output_type == "pil" else (own[0] * 255).round())


@pytest.mark.parametrize("image", [np.full((2, 2, 3), 254, np.uint8), torch.full((3, 2, 2), 254, dtype=torch.uint8)])
def test_sinks_get_the_bytes_of_a_postprocess_as_they_are(image):
    assert (VideoFrame(0, image, 0.0, 0).timed().pixels == 254).all()


def test_sinks_get_values_beyond_0_and_1_as_black_and_white():
    """As cubic interpolation gives them."""
    for value, expected in ((1.02, 255), (-0.02, 0)):
        for image in (np.full((2, 2, 3), value), torch.full((3, 2, 2), value, dtype=torch.bfloat16)):
            assert (VideoFrame(0, image, 0.0, 0).timed().pixels == expected).all()


def test_the_pipeline_is_left_as_it_was(pipes):
    pipe = pipes("helios")
    before, timesteps = dict(vars(pipe)), pipe.scheduler.timesteps
    own = pipe(**SMALL, num_frames=FRAMES, generator=seeded(), output_type="latent").frames
    stream = stream_of(pipe)
    first = latents(stream, 2)
    between = pipe(**SMALL, num_frames=FRAMES, generator=seeded(), output_type="latent").frames
    again = latents(stream, 1)
    assert torch.equal(own, between) and torch.equal(own, first[0])
    assert equal(first + again, latents(stream_of(pipe), 3))
    changed = {
        "_guidance_scale",
        "_attention_kwargs",
        "_current_timestep",
        "_interrupt",
        "_num_timesteps",
    }  # by its own calls
    assert {name for name, value in vars(pipe).items() if before.get(name) is not value} <= changed
    assert pipe.scheduler.timesteps is not timesteps or len(timesteps) == 2


def test_streams_of_one_pipe_in_turn_are_each_what_they_are_alone(pipes):
    pipe = pipes("helios")
    calls = [{}, {"prompt_embeds": embeds(4), "image": random(1, 3, 16, 16)}]
    alone = [list(stream_of(pipe, "pt", **call).chunks(3)) for call in calls]
    streams = [stream_of(pipe, "pt", **call) for call in calls]
    for k in range(3):
        for stream, own in zip(streams, alone, strict=True):
            chunk = stream()
            assert torch.equal(chunk.latents, own[k].latents) and torch.equal(chunk.images, own[k].images)


def test_parts_that_are_replaced_act_at_the_next_prepare(pipes):
    pipe, other = copy.copy(pipes("helios")), pipes("helios", ffn_dim=48)
    plain = latents(stream_of(pipe), 2)
    stream = stream_of(pipe)
    drawn = latents(stream, 1)
    vars(pipe).update(transformer=other.transformer, vae=other.vae)
    assert equal(drawn + latents(stream, 1), plain)
    stream.prepare(seed=SEED, **SMALL)
    assert equal(latents(stream, 1), latents(stream_of(other), 1))
    for name in ("transformer", "vae", "scheduler"):
        vars(pipe)[name] = None
        with pytest.raises(ValueError, match=f"this HeliosPipeline has no {name}: assign pipe.{name} first"):
            stream.prepare(**SMALL)
        vars(pipe)[name] = getattr(other, name)


def test_a_network_that_was_moved_is_told(pipes):
    pipe = copy.deepcopy(pipes("helios"))
    stream, plain = stream_of(pipe), latents(stream_of(pipe), 2)
    stream()
    pipe.transformer.to(torch.bfloat16)
    for call in (stream, lambda: stream.accelerate("compile", backend="eager")):
        with pytest.raises(RuntimeError, match="was on cpu in torch.float32 at prepare.*call prepare\\(\\) anew"):
            call()
    stream.prepare(seed=SEED, **SMALL)
    assert not equal(latents(stream, 2), plain)


def test_a_network_that_was_loaded_in_part_in_float32_and_cast_is_told(tmp_path):
    pipe = random_pipeline("anyflow-far")
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    stream = VideoStream(pipe, output_type="latent")
    stream.prepare(prompt_embeds=embeds(), height=32, width=32)
    assert {one.dtype for one in pipe.transformer.parameters()} == {torch.bfloat16, torch.float32}
    pipe.transformer.to(torch.float32)
    with pytest.raises(RuntimeError, match="was on cpu in torch.bfloat16 at prepare.*in torch.float32 now"):
        stream()


# -- without end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "output_type"), [(20, "latent"), (5, "pt"), slow(1000, "pt")])
def test_without_end_memory_is_constant_and_frames_are_numbered_without_gap(chunks, output_type, pipes):
    pipe, sizes, ids, times = pipes("helios"), [], [], []
    stream = stream_of(pipe, output_type, num_inference_steps=1)
    for chunk in stream.chunks(chunks):
        frames = list(chunk.frames())
        ids += [frame.id for frame in frames] or range(chunk.first_frame, chunk.first_frame + FRAMES)
        times += [frame.time for frame in frames]
        sizes.append({name: (tuple(one.shape), one.untyped_storage().nbytes()) for name, one in carried(stream).items()})
        assert chunk.id == len(sizes) - 1
    assert ids == list(range(chunks * FRAMES)) and times == [k / 24 for k in ids[: len(times)]]
    assert all(one == sizes[0] for one in sizes)
    assert sizes[0] == {"image_latents": ((1, 16, 1, 2, 2), 256), "video_latents": ((1, 16, 19, 2, 2), 19 * 256)}


def carried(stream: VideoStream) -> dict[str, torch.Tensor]:
    """The tensors that the stream carries to the next chunk."""
    return dict(stream._video.state.position.history.tensors)


@pytest.mark.parametrize("changed_at", [1, 3])
def test_a_prompt_that_changes_leaves_earlier_chunks_as_they_are(changed_at, pipes):
    """And later ones are those of the pipeline, whose callback changes the prompt at the same border."""
    pipe, count, steps = pipes("helios"), 4, SMALL["num_inference_steps"]
    ends = iter(range(10**6))

    def change(_, step, timestep, tensors):
        return {"prompt_embeds": embeds(7)} if next(ends) == changed_at * steps - 1 else {}

    own = pipe(
        **SMALL, num_frames=count * FRAMES, generator=seeded(), output_type="latent", callback_on_step_end=change
    ).frames.split(3, dim=2)
    stream, plain = stream_of(pipe), latents(stream_of(pipe), count)
    drawn = latents(stream, changed_at)
    assert stream.update(prompt_embeds=embeds(7)) == 1
    drawn += latents(stream, count - changed_at)
    assert equal(drawn[:changed_at], plain[:changed_at]) and not torch.equal(drawn[changed_at], plain[changed_at])
    assert equal(drawn, own)


def test_texts_are_encoded_by_the_pipeline(pipes, monkeypatch):
    monkeypatch.setattr(pipeline_helios, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    pipe = pipes("helios")
    call = {name: value for name, value in SMALL.items() if name != "prompt_embeds"}
    call |= {"guidance_scale": 3.0, "max_sequence_length": 24}
    texts = {"prompt": "a red apple", "negative_prompt": "blur"}
    own = pipe(**texts, **call, num_frames=2 * FRAMES, generator=seeded(), output_type="latent").frames
    encoded = []
    monkeypatch.setattr(pipe, "encode_prompt", lambda *a, **k: encoded.append(k) or type(pipe).encode_prompt(pipe, *a, **k))
    stream = VideoStream(pipe, output_type="latent")
    stream.prepare("a red apple", "blur", seed=SEED, **call)
    assert torch.equal(torch.cat(latents(stream, 2), dim=2), own)
    assert stream.update_prompt("a green apple", scope="frame") == 1
    assert stream.update(guidance_scale=2.0) == 2 and stream.update(sigmas=np.array([0.9, 0.5])) == 3
    assert stream.update_prompt("a pear", "noise", num_inference_steps=2) == 4
    asked = [one["negative_prompt"] for one in encoded if one["prompt"] is not None]
    assert asked == ["blur", "blur", "blur", "noise"], "a new schedule encodes no text"
    assert len(latents(stream, 1)) == 1
    stream.update(prompt_embeds=embeds())
    assert (
        stream._video.request.plan.given["negative_prompt"] == "noise" and "prompt" not in stream._video.request.plan.given
    )
    monkeypatch.delattr(pipeline_helios, "ftfy")
    for change in (lambda: stream.prepare("a pear", **call), lambda: stream.update_prompt("a pear")):
        with pytest.raises(ValueError, match="cannot encode a prompt without the package ftfy"):
            change()


@pytest.mark.parametrize("name", VIDEO_PIPELINES)
def test_the_package_that_prompts_need_is_known(name):
    """The pipelines' modules use ftfy whether or not it is installed."""
    source = inspect.getsource(inspect.getmodule(getattr(diffusers, name)))
    assert ("ftfy.fix_text(" in source) == (TEXT_PACKAGES.get(name) == "ftfy")


def test_more_changes_from_chunk_to_chunk(pipes):
    """Guidance comes and goes, the schedule's length changes, and a seed begins anew where it is set."""
    pipe = pipes("helios")
    stream = stream_of(pipe)
    drawn = latents(stream, 1)
    for change in (GUIDED, {"num_inference_steps": 3}, {"guidance_scale": 1.0}, {"attention_kwargs": {}}):
        stream.update(**change)
        drawn += latents(stream, 1)
    assert len({float(one.sum()) for one in drawn}) == len(drawn)
    assert stream.seed == SEED
    stream.update(seed=11)
    assert stream.seed == 11
    after = stream().latents
    noise = torch.randn(1, 16, 3, 2, 2, generator=seeded(11))
    assert torch.equal(seeded(11).get_state(), seeded(11).get_state()) and after.shape == noise.shape
    assert torch.equal(stream._video.generator.get_state(), drawn_once(11))


def drawn_once(seed: int) -> torch.Tensor:
    """The state of a generator that has drawn the noise of one chunk."""
    generator = seeded(seed)
    torch.randn(1, 16, 3, 2, 2, generator=generator)
    return generator.get_state()


# -- what disturbs it ------------------------------------------------------------------------------------------------------


FAILURES = {"nan": FloatingPointError, "error": ZeroDivisionError, "interrupt": KeyboardInterrupt, "decoder": MemoryError}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_chunk_that_fails_is_drawn_again_as_if_nothing_had_been(kind, pipes, monkeypatch):
    """With the image that the video begins with, and with a seed that waits while it fails."""
    pipe, call, drawn = pipes("helios"), {"image": random(1, 3, 16, 16)}, []
    plain, stream = stream_of(pipe, "pt", **call), stream_of(pipe, "pt", **call)

    def act(number):
        if number == 1 and kind == "nan":
            return float("nan")
        if number == 1 and kind in ("error", "interrupt"):
            raise FAILURES[kind]
        return None

    def no_memory(*_, **__):
        raise MemoryError

    for k in range(2):
        with hooked(pipe, act), monkeypatch.context() as patch:
            if kind == "decoder":
                patch.setattr(pipe.vae, "decode", no_memory)
            with pytest.raises(FAILURES[kind], match=f"latents of chunk {k} .* update" if kind == "nan" else None):
                next(stream.chunks())
        drawn.append(stream())
        own = plain()
        assert drawn[k].id == own.id == k
        assert torch.equal(drawn[k].latents, own.latents) and torch.equal(drawn[k].images, own.images)
        for one in (stream, plain):
            one.update(seed=5)


def test_images_that_are_not_finite_are_no_chunk(pipes, monkeypatch):
    pipe = pipes("helios")
    stream = stream_of(pipe, "pt")
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda z, return_dict: (torch.full((1, 3, FRAMES, 16, 16), torch.inf),))
        with pytest.raises(FloatingPointError, match="the images of chunk 0 hold NaN or infinite values"):
            stream()
    assert stream().id == 0


def test_an_update_during_a_chunk_acts_at_the_next_one(pipes):
    """From the thread that draws and from another one, while a chunk is in the network."""
    pipe = pipes("helios")
    plain = latents(stream_of(pipe), 1)
    expected = stream_of(pipe)
    expected_drawn = latents(expected, 1)
    expected.update(prompt_embeds=embeds(5), seed=9)
    expected_drawn += latents(expected, 2)
    for elsewhere in (False, True):
        stream, numbers = stream_of(pipe), []

        def act(number, stream=stream, numbers=numbers, elsewhere=elsewhere):
            if number:
                return

            def change():
                numbers.append(stream.update(prompt_embeds=embeds(4)))
                numbers.append(stream.update(prompt_embeds=embeds(5), seed=9))

            if elsewhere:
                thread = threading.Thread(target=change)
                thread.start()
                thread.join(60)
            else:
                change()

        with hooked(pipe, act):
            drawn = latents(stream, 1)
        drawn += latents(stream, 2)
        assert numbers == [1, 2] and torch.equal(drawn[0], plain[0])
        assert equal(drawn, expected_drawn)


def test_inside_of_a_chunk_its_thread_may_only_update(pipes):
    pipe = pipes("helios")
    stream, refused = stream_of(pipe, "pt"), []

    def act(number):
        for call in (stream, stream.reset, stream.flush, stream.close, lambda: stream.prepare(**SMALL)):
            with pytest.raises(RuntimeError, match="only update") as error:
                call()
            refused.append(error)

    with hooked(pipe, act):
        chunk = stream()
    assert len(refused) == 10 and chunk.id == 0


def test_prepare_from_another_thread_waits_for_the_chunk(pipes):
    pipe = pipes("helios")
    stream, entered, go_on = stream_of(pipe), threading.Event(), threading.Event()

    def act(number):
        entered.set()
        assert go_on.wait(60)

    with hooked(pipe, act):
        drawn = []
        drawing = threading.Thread(target=lambda: drawn.extend(stream.chunks(1)))
        drawing.start()
        assert entered.wait(60)
        preparing = threading.Thread(target=lambda: stream.prepare(seed=8, **SMALL))
        preparing.start()
        preparing.join(0.1)
        assert preparing.is_alive() and stream.seed == SEED
        go_on.set()
        for thread in (drawing, preparing):
            thread.join(60)
    assert equal([drawn[0].latents], latents(stream_of(pipe), 1))
    assert stream.seed == 8 and stream().id == 0


def test_a_consumer_that_raises_loses_nothing_and_doubles_nothing(pipes):
    pipe = pipes("helios")
    plain = torch.stack([frame.image for frame in stream_of(pipe, "pt").frames(25)])
    stream, taken = stream_of(pipe, "pt"), []
    for stop in (0, 5, 9, 10, 14):
        with pytest.raises(ConnectionError):
            for frame in stream.frames():
                taken.append(frame)
                if frame.id == stop:
                    raise ConnectionError
    with pytest.raises(RuntimeError, match="3 frames of chunk 1 wait"):
        stream()
    taken += stream.flush()
    assert stream.flush() == []
    taken += [frame for chunk in stream.chunks(1) for frame in chunk.frames()][:7]
    assert [frame.id for frame in taken] == list(range(25)) and [frame.chunk for frame in taken[8:10]] == [0, 1]
    assert torch.equal(torch.stack([frame.image for frame in taken]), plain)


def test_prepare_reset_and_close_end_a_loop(pipes, caplog):
    pipe = pipes("helios")
    stream = stream_of(pipe, "pt")
    for end in (stream.reset, lambda: stream.prepare(seed=SEED, **SMALL)):
        frames, chunks = stream.frames(), stream.chunks()
        assert next(frames).id in (0, FRAMES)
        end()
        assert "8 frames of the last chunk are dropped" in caplog.text
        for loop in (frames, chunks):
            with pytest.raises(RuntimeError, match="has ended this loop"):
                next(loop)
        assert stream.flush() == [] and stream().id == 0
    loop = stream.chunks()
    stream.close()
    stream.close()
    for call in (lambda: next(loop), stream, stream.frames, stream.flush, stream.reset, lambda: stream.seed):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    with pytest.raises(RuntimeError, match="closed"):
        stream.prepare(**SMALL)
    with VideoStream(pipe) as stream, pytest.raises(RuntimeError, match="prepare"):
        stream()


def test_a_generator_of_the_callers_stays_as_it_is(pipes):
    generator, pipe = seeded(), pipes("helios")
    stream = VideoStream(pipe, output_type="latent")
    stream.prepare(generator=generator, **SMALL)
    torch.randn(5, generator=generator)
    assert equal(latents(stream, 2), latents(stream_of(pipe), 2))
    stream.prepare(generator=generator, seed=5, **SMALL)
    expected = seeded()
    torch.randn(5, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_reset_draws_the_same_video_again(pipes):
    pipe = pipes("helios")
    for given in ({"seed": SEED}, {"generator": seeded()}, {"generator": seeded(), "seed": SEED}, {"seed": np.int64(SEED)}):
        stream = VideoStream(pipe, output_type="latent")
        stream.prepare(**given, **SMALL)
        assert stream.seed == given.get("seed")
        first = latents(stream, 2)
        stream.reset()
        assert equal(latents(stream, 2), first) and equal(first, latents(stream_of(pipe), 2))
    stream.update(seed=5)
    changed = stream().latents
    stream.reset()
    assert stream.seed == 5 and not torch.equal(stream().latents, changed), "another history"
    stream.prepare(seed=-1, **SMALL)
    assert stream.seed not in (-1, SEED)
    stream.prepare(**SMALL)
    assert stream.seed == 2


def test_what_is_given_is_copied_and_what_is_returned_is_the_callers(pipes):
    pipe = pipes("helios")
    plain = latents(stream_of(pipe, image=random(1, 3, 16, 16)), 3)
    image, prompt = random(1, 3, 16, 16), embeds()
    stream = stream_of(pipe, image=image, prompt_embeds=prompt)
    for tensor in (image, prompt):
        tensor.zero_()
    for k in range(3):
        chunk = stream()
        assert torch.equal(chunk.latents, plain[k])
        chunk.latents.fill_(torch.nan)


def test_a_stream_draws_in_inference_mode_and_without(pipes):
    pipe = pipes("helios")
    plain = latents(stream_of(pipe), 2)
    stream = stream_of(pipe)
    with torch.inference_mode():
        drawn = latents(stream, 1)
    assert equal(drawn + latents(stream, 1), plain)


# -- what cannot be --------------------------------------------------------------------------------------------------------

BAD = [
    ({"num_frames": 33}, ValueError, "num_frames .* has no end"),
    ({"output_type": "pil"}, ValueError, "output_type .*VideoStream"),
    ({"latents": torch.zeros(1)}, ValueError, "latents .*generator"),
    ({"callback_on_step_end": print}, ValueError, "callback_on_step_end"),
    ({"steps": 3}, TypeError, "HeliosPipeline takes no 'steps'; it takes .*num_inference_steps"),
    ({"height": 24}, ValueError, "divisible by 16"),
    ({"height": 0}, ValueError, "height must be an integer from 1 to 65,536, not 0"),
    ({"height": 10**9}, ValueError, "height must be an integer from 1 to 65,536, not 1000000000"),
    ({"width": 16.0}, TypeError, "width"),
    ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
    ({"num_inference_steps": 10**30}, ValueError, "num_inference_steps must be an integer from 1 to 65,536"),
    ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be finite"),
    ({"guidance_scale": 10**400}, ValueError, "guidance_scale must be finite, and is an integer that is larger"),
    ({"guidance_scale": "3"}, TypeError, "guidance_scale must be a number"),
    ({"guidance_scale": None}, TypeError, "guidance_scale must be a number, not None"),
    ({"prompt": "a cat"}, ValueError, "pass prompt or prompt_embeds, not both"),
    ({"prompt_embeds": None}, ValueError, "Provide either"),
    ({"prompt_embeds": None, "prompt": ["a cat", "a dog"]}, ValueError, "prompt is one text"),
    ({"prompt_embeds": embeds().numpy()}, TypeError, r"prompt_embeds is a tensor \[1, n, 32\]"),
    ({"prompt_embeds": embeds().repeat(2, 1, 1)}, ValueError, r"one video, not \[2, 16, 32\]"),
    ({"prompt_embeds": embeds()[:, :0]}, ValueError, r"\[1, n, 32\], since a stream draws one video, not \[1, 0, 32\]"),
    ({"prompt_embeds": embeds().long()}, TypeError, "prompt_embeds is a floating-point tensor, not torch.int64"),
    ({"prompt_embeds": embeds() * torch.nan}, ValueError, "prompt_embeds holds NaN"),
    ({"keep_first_frame": False}, ValueError, "keep_first_frame=False"),
    ({"is_skip_first_chunk": 1}, TypeError, "is_skip_first_chunk must be True or False"),
    ({"sigmas": [0.9, 0.5]}, ValueError, "sigmas is a numpy array"),
    ({"history_sizes": [16, 2]}, ValueError, "history_sizes is a list of 3 numbers"),
    ({"history_sizes": [16, 2, 0]}, ValueError, "history_sizes"),
    ({"history_sizes": [10**9, 2, 1]}, ValueError, "history_sizes must be integers from 1 to 65,536, not 1000000000"),
    ({"num_latent_frames_per_chunk": 0}, ValueError, "num_latent_frames_per_chunk"),
    ({"image": "apple.png"}, ValueError, "Input is in incorrect format"),
    ({"image": random(2, 3, 16, 16)}, ValueError, "one video, and these are 2"),
    ({"image": random(1, 3, 16, 16) * torch.nan}, ValueError, "image holds NaN"),
    ({"image": random(1, 3, 16, 16), "video": random(1, 40, 3, 16, 16)}, ValueError, "simultaneously"),
    ({"image_latents": random(1, 16, 1, 2, 2)}, ValueError, "fake_image_latents belong together"),
    ({"video_latents": random(1, 16, 9, 4, 2)}, ValueError, r"tensor \[1, 16, T, 2, 2\], not \[1, 16, 9, 4, 2\]"),
    ({"video_latents": [1]}, ValueError, r"video_latents is a tensor \[1, 16, T, 2, 2\], not list"),
    ({"video_latents": random(1, 16, 9, 2, 2) * torch.nan}, ValueError, "video_latents holds NaN"),
    ({"video": random(1, 8, 3, 16, 16)}, ValueError, "video has 8 frames, and a chunk is 9"),
    ({"video": random(1, 20, 4, 16, 16)}, ValueError, "video has 4 channels, and the VAE takes 3"),
    ({"video": random(1, 0, 3, 16, 16)}, ValueError, r"video is \[1, 0, 3, 16, 16\], and holds no image"),
    ({"video": []}, ValueError, r"video is \[\], and holds no image"),
    ({"image": PIL.Image.new("RGBA", (16, 16))}, ValueError, "image has 4 channels, and the VAE takes 3: pass RGB"),
    ({"image": PIL.Image.new("L", (16, 16))}, ValueError, "image has 1 channels"),
    ({"sigmas": np.array([])}, ValueError, "sigmas is a list of one number or more"),
    ({"sigmas": np.array([2.0, -1.0])}, ValueError, "sigmas are from 0 to 1, and these are from -1 to 2"),
    ({"sigmas": np.array([0.9, np.nan])}, ValueError, "sigmas holds NaN"),
    ({"attention_kwargs": 5}, TypeError, "attention_kwargs is a mapping or None, not int"),
    ({"max_sequence_length": 0}, ValueError, "max_sequence_length must be an integer from 1 to 65,536"),
    ({"add_noise_to_image_latents": "no"}, TypeError, "add_noise_to_image_latents must be True or False"),
    ({"image_noise_sigma_min": float("nan")}, ValueError, "image_noise_sigma_min must be finite"),
    ({"video_noise_sigma_max": -5}, ValueError, "video_noise_sigma_max is a number from 0 to 1, not -5"),
    ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ({"seed": -2}, ValueError, "seed must be an integer from 0"),
    ({"seed": 2**70}, ValueError, r"seed must be an integer from 0 to 2\^64 - 1"),
    ({"generator": [seeded()]}, TypeError, "generator is one torch.Generator"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=[f"{k}-{next(iter(bad[0]))}" for k, bad in enumerate(BAD)])
def test_bad_input_is_refused_with_a_line_and_changes_nothing(given, error, message, pipes):
    pipe = pipes("helios")
    stream = stream_of(pipe)
    drawn = latents(stream, 1)
    with pytest.raises(error, match=message) as raised:
        stream.prepare(**{**SMALL, **given})
    assert "\n" not in str(raised.value)
    changeable = {"num_inference_steps", "sigmas", "guidance_scale", "prompt", "prompt_embeds", "attention_kwargs"}
    changeable |= {"max_sequence_length"}
    if given.keys() <= changeable:
        with pytest.raises(error):
            stream.update(**{"prompt_embeds": embeds(), **given})
    elif "seed" not in given:
        with pytest.raises(ValueError, match="cannot change from chunk to chunk"):
            stream.update(**given)
    assert equal(drawn + latents(stream, 1), latents(stream_of(pipe), 2))


def test_bad_calls_of_a_stream(pipes):
    pipe = pipes("helios")
    with pytest.raises(ValueError, match="unknown output_type 'jpg': choose one of 'pil', 'np', 'pt', 'latent'"):
        VideoStream(pipe, output_type="jpg")
    for fps in (0, -1, float("inf"), 10**9, 10**400):
        with pytest.raises(ValueError, match="fps must be"):
            VideoStream(pipe, fps=fps)
    stream = VideoStream(pipe, output_type="latent", fps=12)
    for call in (stream, stream.chunks, stream.flush, stream.reset, stream.update, lambda: stream.seed):
        with pytest.raises(RuntimeError, match=r"call prepare\(prompt, ...\) first"):
            call()
    stream.prepare(**SMALL)
    with pytest.raises(ValueError, match='output_type="latent": use chunks'):
        stream.frames()
    with pytest.raises(ValueError, match="unknown scope 'later': choose one of 'now', 'frame'"):
        stream.update_prompt("a cat", scope="later")
    with pytest.raises(TypeError, match="most"):
        stream.chunks(1.5)
    with pytest.raises(ValueError, match="most must be an integer from 0 to 9,223"):
        stream.chunks(10**30)
    chunk = stream()
    assert chunk.images is None and chunk.fps == 12.0 and chunk.seconds > 0 and stream().first_frame == FRAMES


def test_a_pyramid_says_what_it_needs(pipes):
    pipe = pipes("helios-distilled")
    stream = VideoStream(pipe)
    for given, message in (
        ({"height": 80}, "height 80 is no multiple of 64, as a pyramid of 3 stages needs"),
        ({"pyramid_num_inference_steps_list": [2, 2]}, "pyramid_num_inference_steps_list is a list of 3 numbers"),
        ({"zero_steps": -1}, "zero_steps must be an integer from 0 to 65,536, not -1"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.prepare(**{**PYRAMID, **given})
    singular = copy.copy(pipe)
    vars(singular)["scheduler"] = diffusers.HeliosDMDScheduler(gamma=0.4)
    with pytest.raises(ValueError, match="gamma 0.4 gives a singular covariance on cpu"):
        VideoStream(singular).prepare(**PYRAMID)


def test_anyflow_says_what_it_needs(pipes):
    stream = VideoStream(pipes("anyflow-far"))
    call = {"prompt_embeds": embeds(), "height": 32, "width": 32, "num_inference_steps": 1}
    for given, message in (
        ({"use_kv_cache": False}, "use_kv_cache must be True"),
        ({"chunk_partition": [1, 3, 2]}, "one size after the first"),
        ({"chunk_partition": 3}, "chunk_partition is a list"),
        ({"chunk_partition": [1, 2], "video": random(1, 5, 3, 32, 32)}, "2 latent frames, and whole chunks are 1, 3, 5, 7"),
        ({"video": [1]}, "shape|video is a tensor of one video"),
        ({"video_latents": random(1, 1, 16, 4, 4) * torch.inf}, "video_latents holds NaN"),
        ({"video_latents": random(1, 1, 8, 4, 4)}, r"\[1, T, 16, 4, 4\], not \[1, 1, 8, 4, 4\]"),
        ({"video_latents": random(1, 1, 16, 2, 2)}, r"\[1, T, 16, 4, 4\], not \[1, 1, 16, 2, 2\]"),
        ({"video": random(1, 1, 4, 32, 32)}, r"\[1, T, 3\], not \[1, 1, 4, 32, 32\]"),
        ({"video_latents": random(1, 3001, 16, 4, 4)}, "no chunk of 1 fits after the 3001 of the video"),
        ({"chunk_partition": [1000, 1000]}, "no chunk of 1000 fits"),
        ({"sigmas": []}, "sigmas is a list of one number or more"),
        ({"timesteps": 5}, "timesteps is a list of one number or more"),
        ({"timesteps": [1e9]}, "timesteps are from 0 to 1000, and these are from 1e\\+09 to 1e\\+09"),
    ):
        with pytest.raises((ValueError, AttributeError), match=message):
            stream.prepare(**call, **given)
    pipe = copy.copy(pipes("anyflow-far"))
    vars(pipe)["vae"] = wan_vae()
    pipe.vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        VideoStream(pipe)


def test_an_image_of_anyflow_holds_the_patches_of_its_compressed_past(pipes):
    """Unless the video ends before any chunk is compressed."""
    call = {"prompt_embeds": embeds(), "num_inference_steps": 1}
    pipe, short = pipes("anyflow-far"), pipes("anyflow-far", rope_max_seq_len=3)
    for name in ("height", "width"):
        size = {"height": 32, "width": 32, name: 16}
        with pytest.raises(ValueError, match=rf"{name} 16 is 2 latents, and from chunk 3 on .* pass {name}=32 or more"):
            VideoStream(pipe).prepare(**call, **size)
        stream = VideoStream(short, output_type="latent")
        stream.prepare(**call, **size)
        assert len(latents(stream, None)) == 3


def test_a_network_with_a_cache_is_refused(pipes):
    pipe = pipes("helios")
    pipe.transformer.enable_cache(diffusers.TaylorSeerCacheConfig())
    try:
        with pytest.raises(ValueError, match="disable_cache"):
            VideoStream(pipe)
    finally:
        pipe.transformer.disable_cache()


# -- every video pipeline of diffusers -------------------------------------------------------------------------------------

KINDS = json.loads((ROOT / "tests/data/pipeline_kinds.json").read_text(encoding="utf-8"))
REFUSED = {name: reason for reason, names in REASONS.items() for name in names.split()}


def test_every_video_pipeline_of_diffusers_is_streamed_or_refused_with_its_reason():
    videos = {name for reason, names in KINDS.items() if reason.startswith("draws videos") for name in names.split()}
    streamed = {name.removesuffix("Pipeline") for name in VIDEO_PIPELINES}
    assert videos == streamed | REFUSED.keys() and not streamed & REFUSED.keys()
    for name, reason in REFUSED.items():
        with pytest.raises(ValueError) as error:
            VideoStream(object.__new__(getattr(diffusers, f"{name}Pipeline")))
        assert str(error.value) == f"{name}Pipeline {reason}"


def test_the_page_of_families_has_a_row_for_each():
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)Pipeline` \| (.*?) \|", page, re.MULTILINE))
    for name, reason in REFUSED.items():
        assert rows.pop(name) == reason, name
    assert {f"{name}Pipeline" for name in rows} == set(VIDEO_PIPELINES)
    assert all(one.startswith("streamed") for one in rows.values())


def test_image_pipelines_and_video_pipelines_name_each_others_stream(pipes):
    with pytest.raises(ValueError, match=r"HeliosPipeline draws videos, chunk after chunk: streamflow.VideoStream\(pipe\)"):
        StreamFlow(pipes("helios"))
    with pytest.raises(
        ValueError, match=r"StableDiffusion3Pipeline is no video pipeline .* StreamFlow\(pipe\) streams images"
    ):
        VideoStream(pipes("sd3"))
