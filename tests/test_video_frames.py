"""`frames(decode="frame")`: the images of each latent frame before the next one is decoded, and the same to the bit."""

from __future__ import annotations

import copy
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import slow
from diffusers import AutoencoderKLCogVideoX
from random_pipelines import random_pipeline
from random_pipelines.video import wan_vae
from test_video import FRAMES, PYRAMID, SEED, SMALL, embeds, random, stream_of
from test_video_engine import doubled, interrupted

from streamflow import VideoStream
from streamflow.models.tiny_video import TinyVideoDecoder
from streamflow.video import VideoViewers

ANYFLOW = {"prompt_embeds": embeds(), "height": 32, "width": 32, "num_inference_steps": 1, "chunk_partition": (1, 2)}
SKYREELS = {name: one for name, one in SMALL.items() if name != "num_latent_frames_per_chunk"}
SKYREELS |= {"base_num_frames": 21, "overlap_history": 5, "causal_block_size": 2, "ar_step": 1}
CASES = {
    "helios": SMALL,
    "helios-distilled": PYRAMID,
    "anyflow-far": {**ANYFLOW, "video": random(1, 9, 3, 32, 32)},
    "skyreels-video": {**SKYREELS, "video": random(1, 13, 3, 16, 16)},
}


def prepared(pipe, call=SMALL, *, output_type: str = "pt", **options) -> VideoStream:
    stream = VideoStream(pipe, output_type=output_type, **options)
    stream.prepare(seed=SEED, **call)
    return stream


def same(frames, others) -> bool:
    """Whether these are the same frames to the bit, with the same numbers, times and chunks."""
    return all(
        (one.id, one.time, one.chunk) == (other.id, other.time, other.chunk) and np.array_equal(one.image, other.image)
        for one, other in zip(frames, others, strict=True)
    )


@contextmanager
def decoder(pipe, act=lambda number: None):
    """Inside, the latent frames that the VAE decodes are counted, and `act` is called with the number of each."""
    calls = []

    def hook(module, arguments, output):
        added = act(len(calls))
        calls.append(threading.get_ident())
        return None if added is None else output + added

    handle = pipe.vae.decoder.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("output_type", ["pt", slow("pil"), slow("np")])
@pytest.mark.parametrize("family", ["helios", *(slow(one) for one in CASES if one != "helios")])
def test_frame_by_frame_the_images_are_the_same_to_the_bit(family, output_type, pipes):
    """Of a VAE that decodes each chunk afresh, and of one that goes on from the chunk before, with images given first."""
    pipe, call = pipes(family), CASES[family]
    plain = prepared(pipe, call, output_type=output_type)
    own = [frame for chunk in plain.chunks(3) for frame in chunk.frames()]
    stream = prepared(pipe, call, output_type=output_type)
    assert same(stream.frames(len(own), decode="frame"), own)
    assert stream.flush() == [] and torch.equal(stream().latents, plain().latents)


def test_images_leave_before_the_next_latent_frame_is_decoded(pipes):
    """The first latent frame of a chunk is one image, any other four."""
    pipe, decoded = pipes("helios"), []
    stream = prepared(pipe)
    with decoder(pipe) as calls:
        for _ in stream.frames(2 * FRAMES, decode="frame"):
            decoded.append(len(calls))
    assert decoded == [1, *[2] * 4, *[3] * 4, 4, *[5] * 4, *[6] * 4]
    assert same(stream.frames(FRAMES, decode="frame"), list(stream_of(pipe, "pt").frames(3 * FRAMES))[2 * FRAMES :])


@pytest.mark.parametrize("decode_on", [None, "cpu"])
@pytest.mark.parametrize("left", ["flush", "frames"])
def test_a_loop_that_is_left_in_a_chunk_loses_nothing(left, decode_on, pipes):
    pipe = pipes("helios")
    own = list(stream_of(pipe, "pt").frames(2 * FRAMES))
    stream = prepared(pipe, decode_on=decode_on)
    taken = list(stream.frames(3, decode="frame"))
    with pytest.raises(RuntimeError, match="chunk 0 was given in part: go on with frames"):
        stream()
    taken += stream.flush() if left == "flush" else stream.frames(FRAMES - 3)
    assert len(taken) == FRAMES
    taken += [frame for chunk in stream.chunks(1) for frame in chunk.frames()]
    assert same(taken, own)
    stream.close()


@pytest.mark.parametrize("decode_on", [None, "cpu"])
def test_with_decode_on_the_first_image_comes_early_too(decode_on, pipes):
    pipe = pipes("helios")
    own = list(stream_of(pipe, "pt").frames(30))
    stream, release = prepared(pipe, decode_on=decode_on), threading.Event()
    decoding = stream._decoding.prepare(stream._video.adapter) if decode_on else stream._video.adapter

    def act(number):
        if number == 1 and decode_on:
            assert release.wait(60), "the first image waits for the second latent frame"

    with decoder(decoding) as calls, decoder(decoding, act):
        frames = stream.frames(30, decode="frame")
        taken = [next(frames)]
        assert len(calls) <= 2
        release.set()
        taken += frames
    assert same(taken, own) and (threading.get_ident() in calls) == (decode_on is None)
    stream.close()


@pytest.mark.parametrize(("decode_on", "step"), [(None, 7), slow(None, 1), slow("cpu", 1)])
def test_an_interrupt_at_any_line_loses_no_image_and_doubles_none(decode_on, step, pipes):
    """Of a first chunk, which is drawn again or goes on where it was."""
    pipe, number, done = pipes("helios"), 0, False
    own = list(stream_of(pipe, "pt", num_inference_steps=1).frames(FRAMES))
    stream = prepared(pipe, {**SMALL, "num_inference_steps": 1}, decode_on=decode_on)
    while not done:
        stream.reset()
        frames = []
        try:
            with interrupted(number):
                for frame in stream.frames(FRAMES, decode="frame"):
                    frames.append(frame)
            done = True
        except KeyboardInterrupt:
            frames += stream.frames(FRAMES - len(frames), decode="frame")
        assert same(frames, own), number
        number += step
    assert number > 60
    stream.close()


@pytest.mark.parametrize("kind", ["nan", "error"])
def test_a_chunk_that_fails_half_decoded_is_drawn_again_and_gives_what_is_left(kind, pipes):
    """An update in between changes only the images that were not given."""
    pipe = pipes("helios")
    own, other = (list(stream_of(pipe, "pt", prompt_embeds=embeds(k)).frames(FRAMES)) for k in (0, 5))

    def act(number):
        if number == 1 and kind == "error":
            raise MemoryError
        return float("nan") if number == 1 else None

    for change, expected in (({}, own), ({"prompt_embeds": embeds(5)}, [own[0], *other[1:]])):
        stream, taken = prepared(pipe), []
        with decoder(pipe, act), pytest.raises(FloatingPointError if kind == "nan" else MemoryError):
            for frame in stream.frames(decode="frame"):
                taken.append(frame)
        assert len(taken) == 1
        if change:
            stream.update(**change)
        with decoder(pipe) as calls:
            taken += stream.frames(FRAMES - 1, decode="frame")
        assert same(taken, expected) and len(calls) == 3 and stream().id == 1


def test_reset_drops_the_rest_of_a_half_decoded_chunk(pipes, caplog):
    pipe = pipes("helios")
    stream = prepared(pipe)
    frames = stream.frames(decode="frame")
    first = [next(frames), next(frames)]
    with caplog.at_level("INFO"):
        stream.reset()
    assert "3 frames of the last chunk are dropped" in caplog.text
    assert "chunk 0, of which 5 images are decoded, is dropped" in caplog.text
    with pytest.raises(RuntimeError, match="has ended this loop"):
        next(frames)
    assert same(stream.frames(2, decode="frame"), first)


@pytest.mark.parametrize("decode_on", [None, slow("cpu")])
def test_a_postprocess_gets_the_images_of_a_latent_frame(decode_on, pipes):
    pipe, sizes = pipes("helios"), []

    def process(images):
        sizes.append(len(images))
        return doubled(images)

    plain = torch.cat([chunk.images for chunk in stream_of(pipe, "pt").chunks(1)])
    stream = prepared(pipe, fps=48, postprocess=process, decode_on=decode_on)
    frames = list(stream.frames(2 * FRAMES, decode="frame"))
    assert sizes == [1, 4, 4] and [(frame.id, frame.time) for frame in frames] == [(k, k / 48) for k in range(2 * FRAMES)]
    assert torch.equal(torch.stack([frame.image for frame in frames[::2]]), plain)
    assert stream().first_frame == 2 * FRAMES
    stream.close()


@pytest.mark.slow
def test_a_tiny_vae_and_viewers_decode_frame_by_frame(pipes):
    torch.manual_seed(0)
    pipe, tiny = pipes("helios"), TinyVideoDecoder(widths=(12, 8, 6, 4)).eval()
    for family, call in CASES.items():
        found = []
        for decode in ("chunk", "frame"):
            stream = VideoStream(pipes(family), output_type="pt")
            stream.vae = tiny
            stream.prepare(seed=SEED, **call)
            found.append(list(stream.frames(30, decode=decode)))
        assert same(*found)
    with VideoViewers(pipe) as viewers:
        viewer = viewers.add(output_type="pt")
        viewer.prepare(seed=SEED, **SMALL)
        assert same(viewer.frames(20, decode="frame"), list(stream_of(pipe, "pt").frames(20)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.parametrize("family", CASES)
def test_frame_by_frame_on_a_gpu(family, full_float32):
    pipe, found = random_pipeline(family).to("cuda"), []
    for decode in ("chunk", "frame"):
        found.append(list(prepared(pipe, CASES[family], output_type="np").frames(30, decode=decode)))
    assert same(*found)


def test_what_cannot_be_decoded_frame_by_frame_is_refused(pipes):
    """At the call, before anything is drawn."""
    pipe = copy.copy(pipes("helios"))
    stream = prepared(pipe)
    with pytest.raises(ValueError, match="unknown decode 'latent': choose one of 'chunk', 'frame'"):
        stream.frames(decode="latent")
    with pytest.raises(RuntimeError, match="call prepare"):
        VideoStream(pipe).frames(decode="frame")
    vars(pipe)["vae"] = wan_vae()
    pipe.vae.enable_tiling()
    with pytest.raises(ValueError, match=r"a VAE with tiling .*disable_tiling"):
        prepared(pipe).frames(decode="frame")
    vars(pipe)["vae"] = AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=16
    )
    message = r"causal VAE \(AutoencoderKLWan or .*\), and this HeliosPipeline has an AutoencoderKLCogVideoX: .*chunk"
    with pytest.raises(NotImplementedError, match=message):
        prepared(pipe).frames(decode="frame")
