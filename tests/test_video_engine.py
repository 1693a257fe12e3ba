"""What makes a video stream fast leaves its chunks as they are: acceleration, decoding beside drawing, viewers."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import recording_backend, relative_error, slow
from diffusers import AutoencoderKLWan
from random_pipelines import random_pipeline
from test_video import FRAMES, GUIDED, PYRAMID, SEED, SMALL, embeds, equal, hooked, latents, random, seeded, stream_of

from streamflow import VideoStream
from streamflow.acceleration import Part, preset
from streamflow.acceleration.compile import Options, compile_part
from streamflow.acceleration.errors import NotExportable
from streamflow.models.tiny_video import TinyVideoDecoder
from streamflow.models.whole_decoder import WholeDecoder
from streamflow.parallel.pool import DecodeError
from streamflow.video import Chunk, VideoViewers, drawing
from streamflow.video.meeting import Meeting

REGIONAL = {"num_layers": 4, "ffn_dim": 8192}  # most of the weights lie in repeated blocks
LARGE = {"num_attention_heads": 4, "attention_head_dim": 128, "rope_dim": (44, 42, 42), "ffn_dim": 4096}  # to quantise
GPUS = torch.cuda.device_count()
NEEDS_CUDA = pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device, and torch sees none")
EAGER = {"backend": "eager"}  # torch.compile without inductor: it traces and guards, and compiles in no time


def state_of(pipe) -> dict[str, torch.Tensor]:
    """Copies of the weights of the network and the VAE, with the memory format of each."""
    parts = ("transformer", "vae")
    return {f"{p}.{n}": t.clone() for p in parts for n, t in getattr(pipe, p).state_dict().items()}


def scaled(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents of the network in the scale of the VAE."""
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1).to(latents) for name in ("mean", "std"))
    return (latents * std + mean).to(vae.dtype)


# -- acceleration ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("regional", [True, False])
def test_a_compiled_network_draws_the_same_chunks(regional, pipes):
    """Whatever comes: two prompts, another number of steps, a prompt of another length."""
    pipe = pipes("helios", **(REGIONAL if regional else {}))
    before = state_of(pipe)
    plain, stream = stream_of(pipe, **GUIDED), stream_of(pipe, **GUIDED)
    assert stream.acceleration == "none"
    expected = latents(plain, 1)
    stream.accelerate("compile", **EAGER)
    assert stream.acceleration == "compile"
    drawn = latents(stream, 1)
    for change in ({"num_inference_steps": 1}, {"prompt_embeds": embeds(4)[:, :9]}):
        plain.update(**change)
        stream.update(**change)
        expected += latents(plain, 1)
        drawn += latents(stream, 1)
    assert max(relative_error(one, own) for one, own in zip(drawn, expected, strict=True)) < 1e-5
    compiled = [block for block in pipe.transformer.blocks if block._compiled_call_impl is not None]
    assert len(compiled) == (4 if regional else 0)
    stream.close()
    assert all(block._compiled_call_impl is None for block in pipe.transformer.blocks)
    after = state_of(pipe)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_compiled_by_inductor_too(pipes):
    stream, plain = stream_of(pipes("helios")), stream_of(pipes("helios"))
    stream.accelerate("compile")
    for own, one in zip(latents(plain, 2), latents(stream, 2), strict=True):
        assert 0 < relative_error(one, own) < 1e-5, "equal to the bit: was it compiled?"


def test_of_a_vae_the_decoder_of_one_latent_frame_is_compiled(pipes):
    """Three times: the first frame has no memory, the second that of one frame. The pipeline's own VAE stays plain."""
    vae, graphs = pipes("helios").vae, []
    backend = recording_backend(graphs)
    latents = torch.randn(1, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    part = Part("decoder", WholeDecoder(vae), {"latents": latents}, compiled=WholeDecoder.compiled)
    before, own = part.call(), vae.decoder
    compiled, _ = compile_part(part, Options(backend=backend))
    assert all(torch.equal(part.call(compiled), before) for _ in range(2)) and len(graphs) == 3
    assert vae.decoder is own and torch.equal(part.call(), before) and len(graphs) == 3
    for frames in (1, 3):
        part = replace(part, inputs={"latents": latents[:, :, :frames].clone()})
        assert torch.equal(part.call(compiled), part.call()) and len(graphs) == 3, "a chunk of any length"

    other = copy.deepcopy(vae)  # of which the user has compiled the decoder
    other.decoder.conv_in.weight.data.mul_(2)
    other.decoder = torch.compile(other.decoder, backend="eager")
    part = replace(part, module=WholeDecoder(other), inputs={"latents": latents[:, :, :1]})
    compiled, _ = compile_part(part, Options(backend=backend))
    assert torch.equal(part.call(compiled), part.call()) and len(graphs) == 3, "the same code with other weights"


@pytest.mark.slow
def test_another_decoder_in_the_vae_and_tiling_are_accelerated_at_the_next_prepare(pipes):
    pipe = pipes("helios")
    stream = stream_of(pipe, "pt")
    stream.accelerate("compile", **EAGER)

    def kept() -> bool:
        before = stream._modules.accelerated
        stream.prepare(seed=SEED, **SMALL)
        return stream._modules.accelerated is before

    assert kept()
    pipe.vae.decoder = copy.deepcopy(pipe.vae.decoder)
    assert not kept() and kept()
    pipe.vae.enable_tiling()
    assert not kept() and kept()
    stream.close()
    pipe.vae.disable_tiling()


@pytest.mark.slow
def test_acceleration_is_counted_in_calls_of_the_compiled_network(pipes):
    """A pyramid has three sizes: one graph each, and a chunk compiles nothing that a chunk before has compiled."""
    pipe, graphs = pipes("helios-distilled"), []
    backend = recording_backend(graphs)
    stream, plain = VideoStream(pipe, output_type="pt"), VideoStream(pipe, output_type="pt")
    for one in (stream, plain):
        one.prepare(seed=SEED, **PYRAMID)
    stream.accelerate("compile", backend=backend)
    for size in (1, 3, 3, 3):
        if size > 1:
            chunk, own = stream(), plain()
            assert relative_error(chunk.latents, own.latents) < 1e-5 and relative_error(chunk.images, own.images) < 1e-4
        assert len(graphs) == size


@pytest.mark.slow
def test_acceleration_before_prepare_takes_effect_there_and_lasts():
    pipe, calls = random_pipeline("helios"), []

    def backend(graph, inputs):
        def call(*arguments):
            calls.append(len(calls))
            return graph.forward(*arguments)

        return call

    stream = VideoStream(pipe, output_type="latent")
    stream.accelerate("compile", backend=backend)
    assert stream.acceleration == "compile" and not calls
    stream.prepare(seed=SEED, **SMALL)
    assert len(calls) == 1, "the warm-up"
    plain = latents(stream_of(pipe), 2)
    assert relative_error(torch.cat(latents(stream, 2)), torch.cat(plain)) < 1e-5 and len(calls) == 1 + 2 * 2
    module, example = stream._modules.accelerated, stream._modules._example
    stream.prepare(seed=SEED, **{**SMALL, "prompt_embeds": embeds(5)})
    assert stream._modules.accelerated is module, "the same shapes are not compiled again"
    assert stream._modules._example is example, "nor is a chunk drawn for them"
    stream.prepare(seed=SEED, **{**SMALL, "num_inference_steps": 3})
    assert stream._modules.accelerated is module and stream._modules._example is not example
    pipe.vae.to(torch.bfloat16)
    stream.prepare(seed=SEED, **SMALL)
    assert stream._modules._example[0][1].scaled.dtype == torch.bfloat16, "drawn for the modules as they are"
    stream.prepare(seed=SEED, **{**SMALL, "height": 32})
    assert stream._modules.accelerated is not module
    assert stream().latents.shape == (1, 16, 3, 4, 2)
    done = len(calls)
    stream.accelerate("none")
    stream()
    assert stream.acceleration == "none" and len(calls) == done


def test_bad_acceleration_is_refused_and_changes_nothing(pipes):
    pipe = pipes("helios")
    stream, plain = stream_of(pipe), latents(stream_of(pipe), 2)
    for call, error, message in (
        ((["compile"], {}), ValueError, "unknown acceleration \\['compile'\\]"),
        (("fast", {}), ValueError, "unknown acceleration 'fast': choose one of none, auto, cuda-graph, compile"),
        (("compile", {"speed": 2}), TypeError, "accelerate\\('compile'\\) has no option speed; it has cuda_graph"),
        (("none", {"limit": 2}), TypeError, "takes no options"),
        (("cuda-graph", {}), RuntimeError, "CUDA graphs need a CUDA device and this pipe is on cpu"),
        (("compile", {"quantize": "fp4"}), ValueError, "unknown quantize 'fp4': choose one of fp8, fp8-tensor, int8"),
        (("compile", {"quantize": "fp8"}), RuntimeError, "quantize='fp8' needs a CUDA device"),
        (("compile", {"mode": "default", "options": {}}), ValueError, "a mode or options"),
        (("onnxruntime", {}), (NotExportable, ImportError), "not exported|onnxruntime"),
        (("tensorrt", {}), (NotExportable, ImportError, RuntimeError), "exported|CUDA|TensorRT"),
        (("compile", {"regional": True}), ValueError, "no repeated blocks"),
    ):
        with pytest.raises(error, match=message):
            stream.accelerate(call[0], **call[1])
        assert stream.acceleration == "none"
    assert equal(latents(stream, 2), plain)
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream.accelerate("none")


@pytest.mark.slow
def test_what_is_bound_into_the_network_cannot_change(pipes):
    pipe = pipes("helios", **REGIONAL)
    stream, plain = stream_of(pipe), stream_of(pipe)
    stream.accelerate("compile", **EAGER)
    drawn = latents(stream, 1)
    stream.update(attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="with attention_kwargs=None, and this chunk has .*scale.* pass it to prepare"):
        stream()
    stream.update(attention_kwargs=None)
    drawn += latents(stream, 1)
    assert relative_error(torch.cat(drawn), torch.cat(latents(plain, 2))) < 1e-5
    stream.close()


def test_max_measures_and_names_what_cannot_run(pipes, monkeypatch):
    """Without compilation, which takes a minute here."""
    monkeypatch.setattr(preset, "KINDS", {"cpu": (("cuda-graph", {}), ("onnxruntime", {}), ("openvino", {}))})
    pipe = pipes("helios")
    stream = stream_of(pipe, "pt")
    stream.accelerate("max")
    plain, *others = stream.acceleration_measured
    assert plain.tick_ms > 0 and stream.acceleration == "none"
    assert (
        all(one.left_out.startswith(("NotExportable", "RuntimeError", "ImportError")) for one in others) and len(others) == 3
    )
    assert equal(latents(stream, 2), latents(stream_of(pipe, "pt"), 2))


@pytest.mark.slow
def test_int8_is_the_networks_own_quantised(pipes):
    """Its matrices are quantised while the stream is accelerated, and are the same parameters again after it."""
    pytest.importorskip("torchao")
    pipe = pipes("helios", num_layers=4, **LARGE)
    call = {"height": 64, "width": 64}
    weights = dict(pipe.transformer.named_parameters())
    own, stream = latents(stream_of(pipe, **call), 1), stream_of(pipe, **call)
    stream.accelerate("compile", quantize="int8", **EAGER)
    quantised = [name for name, one in pipe.transformer.named_parameters() if one is not weights[name]]
    assert any("ffn" in name for name in quantised)
    assert 1e-5 < relative_error(stream().latents, own[0]) < 0.1
    stream.close()
    assert all(one is weights[name] for name, one in pipe.transformer.named_parameters())
    assert equal(latents(stream_of(pipe, **call), 1), own)


@pytest.fixture
def cuda_pipe(full_float32):
    """A small pipeline on the GPU."""
    return lambda family="helios", dtype=torch.bfloat16, **changes: random_pipeline(family, **changes).to("cuda", dtype)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("family", ["helios", "helios-distilled"])
def test_a_cuda_graph_draws_the_same_bits(family, cuda_pipe):
    """Network and VAE, over changes of the prompt and the steps; each shape is captured once."""
    pipe, call = cuda_pipe(family), SMALL if family == "helios" else PYRAMID
    chunks = []
    for kind in ("none", "cuda-graph"):
        stream = VideoStream(pipe, output_type="pt")
        stream.accelerate(kind)
        stream.prepare(seed=SEED, **call)
        chunks.append(list(stream.chunks(3)))
        stream.update(prompt_embeds=embeds(5))
        chunks[-1] += stream.chunks(1)
        if kind == "cuda-graph":
            modules = stream._modules.accelerated.modules
            assert modules["velocity"].captured == (1 if family == "helios" else 3) and modules["decoder"].captured == 1
        stream.close()
    assert same(*chunks)


@pytest.mark.gpu
@NEEDS_CUDA
def test_fp8_and_compile_on_a_gpu(cuda_pipe):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    pytest.importorskip("torchao")
    pipe, call = cuda_pipe(num_layers=4, **LARGE), {"height": 128, "width": 128}
    plain = latents(stream_of(pipe, **call), 2)
    stream = stream_of(pipe, "pt", **call)
    for options in ({}, {"quantize": "fp8"}):
        stream.accelerate("compile", **options)
        stream.reset()
        chunks = list(stream.chunks(2))
        drawn = torch.cat([chunk.latents for chunk in chunks])
        assert 0 < relative_error(drawn, torch.cat(plain)) < (0.1 if options else 0.03)
        own = (pipe.vae.decode(scaled(pipe.vae, chunks[1].latents)).sample[0].transpose(0, 1) + 1) / 2
        assert 0 < relative_error(chunks[1].images, own) < 0.02, "equal to the bit: was the VAE compiled?"
        stream.reset()
        images = torch.cat([chunk.images for chunk in chunks])
        assert equal([frame.image for frame in stream.frames(len(images), decode="frame")], list(images))
    stream.close()
    assert equal(latents(stream_of(pipe, **call), 2), plain)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize(
    "device",
    ["cuda:0", pytest.param("cuda:1", marks=[pytest.mark.multi_gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")])],
)
@pytest.mark.parametrize("kind", ["none", "cuda-graph"])
def test_a_gpu_decodes_while_the_next_chunk_is_drawn(kind, device, cuda_pipe):
    pipe = cuda_pipe()
    plain = list(stream_of(pipe, "pt").chunks(4))
    stream = ahead_of(pipe, decode_on=device)
    stream.accelerate(kind)
    chunks = list(stream.chunks(4))
    assert all(chunk.images.device == torch.device(device) for chunk in chunks)
    for chunk, own in zip(chunks, plain, strict=True):
        assert torch.equal(chunk.latents, own.latents) and torch.equal(chunk.images.cpu(), own.images.cpu())
    stream.close()


# -- decoding while the next chunk is drawn --------------------------------------------------------------------------------


def ahead_of(pipe, output_type: str = "pt", decode_on="cpu", **call) -> VideoStream:
    """A prepared stream that decodes in a thread of its own."""
    stream = VideoStream(pipe, output_type=output_type, decode_on=decode_on)
    stream.prepare(seed=SEED, **{**SMALL, **call})
    return stream


def same(chunks, others) -> bool:
    """Whether these are the same chunks to the bit, with the same numbers."""
    pairs = list(zip(chunks, others, strict=True))
    return all(
        one.id == other.id
        and one.first_frame == other.first_frame
        and torch.equal(one.latents, other.latents)
        and torch.equal(torch.as_tensor(one.images), torch.as_tensor(other.images))
        for one, other in pairs
    )


@contextmanager
def decoding(act):
    """Inside, `act` is called with the number of each decode by any VAE, from 0, before it begins."""
    numbers, plain = itertools.count(), AutoencoderKLWan.decode

    def decode(self, z, return_dict=True):
        act(next(numbers))
        return plain(self, z, return_dict)

    AutoencoderKLWan.decode = decode
    try:
        yield
    finally:
        AutoencoderKLWan.decode = plain


def test_a_chunk_is_decoded_while_the_next_one_is_drawn(pipes):
    """The decode of chunk k waits here until the network has been called for chunk k + 1, from the second chunk on."""
    pipe, drawing = pipes("helios"), [threading.Event() for _ in range(5)]
    expected = list(stream_of(pipe, "pt").chunks(3))
    calls = itertools.count()

    def network(number):
        drawing[next(calls) // SMALL["num_inference_steps"]].set()

    def decode(number):
        assert threading.current_thread() is not threading.main_thread()
        if number < 3:
            assert drawing[number + (number > 0)].wait(60), "the next chunk is not drawn meanwhile"

    stream = ahead_of(pipe)
    with hooked(pipe, network), decoding(decode):
        chunks = list(stream.chunks(3))
    assert same(chunks, expected)
    assert stream._video.chunks == 4 and not drawing[4].is_set(), "it is one chunk ahead"
    stream.close()


@pytest.mark.parametrize("output_type", [slow("pil"), "np"])
def test_frames_of_a_stream_ahead_are_those_of_another(output_type, pipes):
    pipe = pipes("helios")
    expected = [frame for frame, _ in zip(stream_of(pipe, output_type).frames(), range(25), strict=False)]
    stream, taken = ahead_of(pipe, output_type), []
    for stop in (0, 9, 13):
        for frame in stream.frames():
            taken.append(frame)
            if frame.id == stop:
                break
    with pytest.raises(RuntimeError, match="4 frames of chunk 1 wait"):
        stream()
    taken += stream.flush()
    assert stream.flush() == [] and len(taken) == 3 * FRAMES, "the chunk ahead is flushed too"
    assert [(one.id, one.time, one.chunk) for one in taken[:25]] == [(one.id, one.time, one.chunk) for one in expected]
    assert all(np.array_equal(one.image, other.image) for one, other in zip(taken, expected, strict=False))
    assert stream().id == 3


ERRORS = {"network": ZeroDivisionError, "nan": FloatingPointError, "decoder": MemoryError, "interrupt": KeyboardInterrupt}


@pytest.mark.parametrize("kind", [slow("network"), slow("nan"), "decoder", slow("interrupt")])
def test_an_error_comes_with_its_own_chunk_and_nothing_is_lost(kind, pipes):
    """Chunk 2 fails once, while it is drawn or while it is decoded. An interrupt is raised at once."""
    pipe, failing = pipes("helios"), [True]
    expected = list(stream_of(pipe, "pt").chunks(5))
    stream, chunks, errors = ahead_of(pipe), [], []

    def fail():
        if failing:
            failing.clear()
            raise ERRORS[kind]

    def network(number):
        if number == 2 * SMALL["num_inference_steps"] + 1:
            if kind == "nan":
                return float("nan")
            if kind != "decoder":
                fail()
        return None

    def decode(number):
        if number == 2 and kind == "decoder":
            fail()

    with hooked(pipe, network), decoding(decode):
        while len(chunks) < 5:
            try:
                chunks.append(stream())
            except ERRORS[kind]:
                errors.append(len(chunks))
    assert errors == [1 if kind == "interrupt" else 2]
    assert same(chunks, expected)
    stream.close()


def test_an_update_of_a_stream_ahead_acts_at_the_next_chunk_that_is_not_begun(pipes):
    pipe = pipes("helios")
    plain = stream_of(pipe, "pt")
    expected = list(plain.chunks(3))
    plain.update(prompt_embeds=embeds(5), seed=9)
    expected += plain.chunks(2)
    stream = ahead_of(pipe)
    chunks = [stream(), stream()]  # chunk 2 is drawn
    assert stream.update(prompt_embeds=embeds(5), seed=9) == 1 and stream.seed == 9
    chunks += stream.chunks(3)
    assert same(chunks, expected)
    for begin_anew in (stream.reset, lambda: stream.prepare(seed=9, **{**SMALL, "prompt_embeds": embeds(5)})):
        begin_anew()
        again = list(stream.chunks(2))
        other = stream_of(pipe, "pt", prompt_embeds=embeds(5))
        other.update(seed=9)
        assert same(again, other.chunks(2))
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream()


def test_a_copy_of_the_vae_decodes(pipes):
    """As it was at `prepare`; the pipeline's own stays where it is, and encodes."""
    pipe = copy.copy(pipes("helios"))
    vars(pipe)["vae"] = copy.deepcopy(pipe.vae)
    call = {"image": random(1, 3, 16, 16)}
    expected = list(stream_of(pipe, "pt", **call).chunks(3))
    stream = ahead_of(pipe, **call)
    chunks = [stream()]
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(1)
    chunks += stream.chunks(2)
    assert same(chunks, expected)
    stream.prepare(seed=SEED, **{**SMALL, **call})
    assert not torch.equal(stream().images, expected[0].images)
    stream.close()


@pytest.mark.slow
def test_a_video_with_an_end_has_no_chunk_ahead_of_it(pipes):
    """And a VAE with a memory decodes each chunk after the one before."""
    pipe = pipes("anyflow-far", rope_max_seq_len=5)
    call = {"prompt_embeds": embeds(), "height": 32, "width": 32, "num_inference_steps": 1, "chunk_partition": (1, 2)}
    videos = []
    for options in ({}, {"decode_on": "cpu"}):
        stream = VideoStream(pipe, output_type="pt", **options)
        stream.prepare(seed=SEED, **call)
        videos.append(list(stream.chunks()))
        stream.close()
    assert len(videos[0]) == 3 and same(*videos)


def test_bad_places_to_decode(pipes):
    pipe = pipes("helios")
    for given, error, message in (
        ("mps", ValueError, "not supported: choose 'cpu' or 'cuda:0'"),
        ("gpu one", ValueError, "unknown device"),
        ("cuda:99", ValueError, "does not exist: torch sees"),
        (["cpu", "cpu"], ValueError, "decode_on is one device"),
        ([], ValueError, "devices is empty"),
        (1.5, TypeError, "a device is a name, an index or a torch.device, not 1.5"),
    ):
        with pytest.raises(error, match=message):
            VideoStream(pipe, decode_on=given)
    with pytest.raises(ValueError, match='decode_on is for images, and this stream has output_type="latent"'):
        VideoStream(pipe, output_type="latent", decode_on="cpu")


@pytest.mark.slow
def test_a_stream_ahead_is_accelerated_between_two_chunks(pipes):
    pipe = pipes("helios", **REGIONAL)
    expected = list(stream_of(pipe, "pt").chunks(6))
    stream, chunks = ahead_of(pipe), []
    for kind, options in (("none", {}), ("compile", EAGER), ("none", {})):
        stream.accelerate(kind, **options)
        chunks += stream.chunks(2)
    for chunk, own in zip(chunks, expected, strict=True):
        assert chunk.id == own.id and relative_error(chunk.latents, own.latents) < 1e-5
        assert relative_error(chunk.images, own.images) < 1e-4
    stream.close()


@pytest.mark.slow
def test_memory_of_a_stream_ahead_is_constant(pipes):
    stream = ahead_of(pipes("helios"), num_inference_steps=1)
    sizes = set()
    for chunk in stream.chunks(100):
        state = stream._video.state
        kept = [
            *state.position.history.tensors.values(),
            *(state.ahead.left.history.tensors.values() if state.ahead else ()),
        ]
        sizes.add((chunk.id > 0, len(kept), sum(one.untyped_storage().nbytes() for one in kept)))
    assert len(sizes) == 2
    stream.close()


def test_a_tiny_vae_decodes_on_another_device_too(pipes):
    torch.manual_seed(0)
    pipe, tiny, chunks = pipes("helios"), TinyVideoDecoder(widths=(12, 8, 6, 4)).eval(), []
    for decode_on in (None, "cpu"):
        stream = VideoStream(pipe, output_type="pt", decode_on=decode_on)
        stream.vae = tiny
        stream.prepare(seed=SEED, **SMALL)
        chunks.append(list(stream.chunks(3)))
        stream.close()
    assert same(*chunks)


# -- several viewers of one model ------------------------------------------------------------------------------------------

VIEWERS = [
    {"seed": 1, "prompt_embeds": embeds(1)},
    {"seed": 2, "prompt_embeds": embeds(2), "num_inference_steps": 3},
    {"seed": 3, "prompt_embeds": embeds(3), "image": random(1, 3, 16, 16), **GUIDED},
]


def viewers_of(pipe, calls=VIEWERS, batch: bool = True) -> tuple[VideoViewers, list[VideoStream]]:
    viewers = VideoViewers(pipe, batch=batch)
    streams = [viewers.add(output_type="pt") for _ in calls]
    for stream, call in zip(streams, calls, strict=True):
        stream.prepare(**{**SMALL, **call})
    return viewers, streams


def alone(pipe, calls=VIEWERS, chunks: int = 3) -> list[list[Chunk]]:
    """The chunks of each call, of a stream by itself."""
    drawn = []
    for call in calls:
        stream = VideoStream(pipe, output_type="pt")
        stream.prepare(**{**SMALL, **call})
        drawn.append(list(stream.chunks(chunks)))
    return drawn


def at_once(*acts) -> list:
    """What these functions return or raise, each called in a thread of its own. None may wait for ever."""
    found: list = [None] * len(acts)

    def run(k):
        try:
            found[k] = acts[k]()
        except BaseException as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a viewer waits for ever"
    return found


def draw(stream, chunks: int = 3):
    return lambda: list(stream.chunks(chunks))


@contextmanager
def called(pipe, act=lambda rows: None):
    """Inside, the rows of each call of the network are listed, and `act` is called with them."""
    rows = []

    def hook(module, arguments, given):
        rows.append(len(given["hidden_states"]))
        act(rows[-1])

    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def test_viewers_row_by_row_are_each_what_they_are_alone(pipes):
    pipe = pipes("helios")
    viewers, streams = viewers_of(pipe, batch=False)
    with called(pipe) as rows:
        drawn = at_once(*map(draw, streams))
    assert set(rows) == {1}
    for chunks, own in zip(drawn, alone(pipe), strict=True):
        assert same(chunks, own)
    viewers.close()


def test_viewers_in_a_batch_differ_by_its_rounding(pipes):
    """Within 4 times the network's own difference between a row in a batch and alone, in each step that is taken."""
    pipe, calls = pipes("helios"), [{**one, "num_inference_steps": 2, "guidance_scale": 1.0} for one in VIEWERS]
    inputs = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, given: inputs.append(given), with_kwargs=True)
    own = alone(pipe, calls)
    handle.remove()
    first = inputs[:: 3 * 2]
    assert len(first) == 3
    with torch.no_grad():
        rows = torch.cat([pipe.transformer(**one)[0] for one in first])
        names = [name for name, one in first[0].items() if isinstance(one, torch.Tensor)]
        together = {**first[0], **{name: torch.cat([one[name] for one in first]) for name in names}}
        noise = relative_error(pipe.transformer(**together)[0], rows)
    viewers, streams = viewers_of(pipe, calls)
    with called(pipe) as rows:
        drawn = at_once(*map(draw, streams))
    assert max(rows) > 1 and sum(rows) == 3 * 3 * 2
    steps = 0
    for k in range(3):
        steps += 2
        error = max(relative_error(chunks[k].latents, one[k].latents) for chunks, one in zip(drawn, own, strict=True))
        assert error <= 4 * noise * steps
    viewers.close()


@pytest.mark.slow
def test_viewers_of_different_sizes_share_no_batch(pipes):
    pipe, calls = (
        pipes("helios"),
        [VIEWERS[0], {**VIEWERS[0], "height": 32}, {**VIEWERS[0], "prompt_embeds": embeds(1)[:, :9]}],
    )
    viewers, streams = viewers_of(pipe, calls)
    with called(pipe) as rows:
        drawn = at_once(*map(draw, streams))
    assert set(rows) == {1}
    assert all(map(same, drawn, alone(pipe, calls)))
    viewers.close()


def test_a_viewer_that_joins_raises_or_leaves_disturbs_no_other(pipes):
    pipe, calls = pipes("helios"), [VIEWERS[0], VIEWERS[1], VIEWERS[0]]
    own = alone(pipe, calls)
    viewers, (first, second, third) = viewers_of(pipe, calls, batch=True)
    joined = threading.Event()
    scheduler = second._video.adapter._view.scheduler
    plain, failing = scheduler.step, iter([False] * 4 + [True])

    def step(*arguments, **named):
        if next(failing, False):
            raise ConnectionError("the second viewer is gone")
        return plain(*arguments, **named)

    scheduler.step = step

    def leaving():
        with pytest.raises(ConnectionError):
            for chunk in second.chunks():
                assert chunk.id == 0
                joined.set()
        again = list(second.chunks(1))
        second.close()
        return again

    def joining():
        assert joined.wait(60)
        return draw(third)()

    drawn = at_once(draw(first), leaving, joining)
    assert [len(one) for one in drawn] == [3, 1, 3] and drawn[1][0].id == 1
    for chunks, one in zip(drawn, (own[0], own[1][1:2], own[2]), strict=True):
        assert max(relative_error(a.latents, b.latents) for a, b in zip(chunks, one, strict=True)) < 1e-5
    assert viewers.viewers == (first, third)
    viewers.close()
    viewers.close()
    with pytest.raises(RuntimeError, match="closed"):
        viewers.add()
    with pytest.raises(RuntimeError, match="closed"):
        first()


@pytest.mark.parametrize("error", [slow(MemoryError), KeyboardInterrupt])
def test_a_batch_that_fails_is_computed_by_its_rows(error, pipes, caplog):
    """An error of a batch is no viewer's own. An interrupt is that of the thread that computes."""
    pipe, calls = pipes("helios"), [VIEWERS[0]] * 3
    own = alone(pipe, calls[:1])[0]
    viewers, streams = viewers_of(pipe, calls)
    failing = [True]

    def act(rows):
        if rows > 1 and (error is MemoryError or failing):
            failing.clear()
            raise error

    with called(pipe, act) as rows:
        drawn = at_once(*map(draw, streams))
    assert max(rows) > 1, "no batch has failed"
    interrupted = [one for one in drawn if isinstance(one, KeyboardInterrupt)]
    assert len(interrupted) == (error is KeyboardInterrupt)
    assert ("computed by itself" in caplog.text) == (error is MemoryError)
    for chunks in drawn:
        if chunks not in interrupted:
            assert max(relative_error(a.latents, b.latents) for a, b in zip(chunks, own, strict=True)) < 1e-5
    for stream in streams:  # what was interrupted is drawn again
        given = stream._video.chunks
        for chunk, one in zip(draw(stream, 3 - given)(), own[given:], strict=True):
            assert chunk.id == one.id and relative_error(chunk.latents, one.latents) < 1e-5
    viewers.close()


def test_an_error_of_one_viewers_rows_is_its_own(pipes):
    """Rows that do not fit the network raise for their viewer alone."""
    meeting = Meeting(lambda hidden_states, scale: (hidden_states / scale.double().log().isfinite(),), batch=True)

    def call(value, scale):
        def act():
            with meeting.inside():
                return [meeting(hidden_states=torch.full((1, 2), value), scale=scale)[0] for _ in range(3)]

        return act

    drawn = at_once(call(1.0, torch.ones(1)), call(2.0, torch.ones(2)), call(3.0, "none"), call(4.0, torch.ones(1)))
    assert isinstance(drawn[2], AttributeError)
    for k, value in ((0, 1.0), (1, 2.0), (3, 4.0)):
        assert all(float(one.max()) == value for one in drawn[k])


@pytest.mark.slow
def test_viewers_under_many_threads_never_wait_for_ever(pipes):
    """Some join, some leave, some fail, some are interrupted, at random, a thousand times."""
    random_numbers = np.random.default_rng(0)
    plan = random_numbers.integers(0, 100, size=(8, 60))
    meeting = Meeting(lambda hidden_states: (hidden_states * 2,), batch=True)

    def viewer(k):
        def act():
            done = 0
            for chance in plan[k]:
                try:
                    with meeting.inside():
                        for step in range(3):
                            value = torch.tensor([float(k), step])[None]
                            assert torch.equal(meeting(hidden_states=value)[0], value * 2)
                            if chance < 10:
                                raise (KeyboardInterrupt if chance < 5 else ZeroDivisionError)
                except (ZeroDivisionError, KeyboardInterrupt):
                    pass
                done += 1
            return done

        return act

    assert at_once(*map(viewer, range(8))) == [60] * 8


@pytest.mark.slow
def test_viewers_are_accelerated_together(pipes):
    pipe = pipes("helios", **REGIONAL)
    own = alone(pipe, VIEWERS[:2])
    viewers, streams = viewers_of(pipe, VIEWERS[:2])
    with pytest.raises(RuntimeError, match="call accelerate\\('compile'\\) of their VideoViewers"):
        streams[0].accelerate("compile")
    viewers.accelerate("compile", **EAGER)
    assert viewers.acceleration == streams[1].acceleration == "compile"
    assert any(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    for chunks, one in zip(at_once(*map(draw, streams)), own, strict=True):
        assert max(relative_error(a.latents, b.latents) for a, b in zip(chunks, one, strict=True)) < 1e-5
    streams[0].close()
    assert viewers.acceleration == "compile" and streams[1]().id == 3
    viewers.close()
    assert all(block._compiled_call_impl is None for block in pipe.transformer.blocks)


@pytest.mark.parametrize("decode_on", [None, "cpu"])
@pytest.mark.parametrize("act", ["close", slow("prepare"), slow("__call__")])
def test_a_postprocess_waits_for_an_older_viewer_while_all_are_accelerated(act, decode_on, pipes):
    """Both wait for viewers in the same order, so that neither waits for ever."""
    viewers, began, accelerating = VideoViewers(pipes("helios")), threading.Event(), threading.Event()

    def process(images):
        began.set()
        assert accelerating.wait(60)
        time.sleep(0.1)  # accelerate() waits for this chunk now
        getattr(older, act)(**(SMALL if act == "prepare" else {}))
        return images

    def accelerate():
        assert began.wait(60)
        accelerating.set()
        viewers.accelerate("none")

    older, stream = viewers.add(output_type="pt"), viewers.add(output_type="pt", decode_on=decode_on, postprocess=process)
    for one in (older, stream):
        one.prepare(**SMALL)
    viewers._viewers.reverse()  # as two threads may leave it that call add() at the same time
    chunk, accelerated = at_once(stream, accelerate)
    assert chunk.id == 0 and accelerated is None
    assert viewers.viewers == ((stream,) if act == "close" else (stream, older))
    viewers.close()


@pytest.mark.parametrize("decode_on", [None, "cpu"])
def test_viewers_that_would_wait_for_each_other_are_told(decode_on, pipes):
    """The older one is refused, at every call that waits, and nothing is changed by it."""
    viewers, both, refused = VideoViewers(pipes("helios")), threading.Barrier(2, timeout=60), []

    def of_older(images):
        both.wait()
        for call in (newer, newer.reset, newer.flush, newer.close, lambda: newer.prepare(**SMALL), viewers.close):
            with pytest.raises(RuntimeError, match="only update"):
                call()
        for call in (lambda: viewers.accelerate("none"), lambda: viewers.add().prepare(**SMALL)):
            with pytest.raises(RuntimeError, match="viewer"):
                call()
        refused.append(newer.update(seed=5))
        return images

    def of_newer(images):
        both.wait()
        older.close()
        return images

    older, newer = (viewers.add(output_type="pt", decode_on=decode_on, postprocess=one) for one in (of_older, of_newer))
    for one in (older, newer):
        one.prepare(**SMALL)
    assert [chunk.id for chunk in at_once(older, newer)] == [0, 0] and refused == [1]
    assert viewers.viewers[0] is newer and viewers.add() is viewers.viewers[-1]
    viewers.close()


def test_a_network_that_is_called_for_viewers_waits_for_none(pipes):
    """A hook of it runs in a thread that computes the rows of other viewers too."""
    pipe, refused = pipes("helios"), []
    viewers, (older, newer) = viewers_of(pipe, VIEWERS[:2])

    def act(rows):
        for stream in (older, newer):
            with pytest.raises(RuntimeError, match="only update"):
                stream.flush()
            refused.append(stream)

    with called(pipe, act):
        chunk = newer()
    assert chunk.id == 0 and len(refused) == 2 * VIEWERS[1]["num_inference_steps"]
    viewers.close()


def test_max_is_measured_for_viewers(pipes, monkeypatch):
    """Its trials call the network while no viewer does."""
    monkeypatch.setattr(preset, "KINDS", {"cpu": (("cuda-graph", {}),)})
    viewers, _ = viewers_of(pipes("helios"), VIEWERS[:1])
    assert at_once(lambda: viewers.accelerate("max")) == [None] and viewers.acceleration == "none"
    viewers.close()
    with pytest.raises(RuntimeError, match="these viewers are closed"):
        viewers.accelerate("none")


def test_one_generator_for_viewers_in_threads(pipes):
    pipe, generator = pipes("helios"), seeded()
    viewers = VideoViewers(pipe, batch=False)
    streams = [viewers.add(output_type="latent") for _ in range(3)]
    for stream in streams:
        stream.prepare(generator=generator, **SMALL)
    plain = latents(stream_of(pipe), 3)
    assert all(equal([chunk.latents for chunk in chunks], plain) for chunks in at_once(*map(draw, streams)))
    viewers.close()


def test_a_viewer_with_another_network_is_refused(pipes):
    viewers, (stream,) = viewers_of(pipes("helios"), VIEWERS[:1])
    stream.pipe.transformer = copy.deepcopy(stream.pipe.transformer)
    with pytest.raises(RuntimeError, match="one network, and this viewer's pipe has another"):
        stream.prepare(seed=8, **SMALL)
    assert stream.seed != 8
    viewers.close()


def test_viewers_of_what_cannot_be_shared(pipes):
    with pytest.raises(
        NotImplementedError, match="does not offer viewers: the attention of its network is set from outside"
    ):
        VideoViewers(pipes("skyreels"))
    with pytest.raises(TypeError, match="batch must be True or False"):
        VideoViewers(pipes("helios"), batch=1)
    with pytest.raises(ValueError, match="no video pipeline"):
        VideoViewers(pipes("sd3"))


@pytest.mark.slow
def test_viewers_of_a_network_with_keys_and_values_share_no_batch(pipes):
    pipe = pipes("anyflow-far")
    call = {"prompt_embeds": embeds(), "height": 32, "width": 32, "num_inference_steps": 1}
    own = []
    for seed in (1, 2):
        stream = VideoStream(pipe, output_type="pt")
        stream.prepare(seed=seed, **call)
        own.append(list(stream.chunks(3)))
    viewers = VideoViewers(pipe)
    streams = [viewers.add(output_type="pt") for _ in own]
    for seed, stream in enumerate(streams, 1):
        stream.prepare(seed=seed, **call)
    assert all(map(same, at_once(*map(draw, streams)), own))


# -- images that a user's function makes, and interrupts ------------------------------------------------------------------


def doubled(images):
    """Each image, and the mean of it and the next one, as an interpolation would give."""
    between = [(images[k] + images[min(k + 1, len(images) - 1)]) / 2 for k in range(len(images))]
    return torch.stack([one for pair in zip(images, between, strict=True) for one in pair])


@pytest.mark.parametrize("decode_on", [None, slow("cpu")])
def test_postprocess_makes_other_images_of_a_chunk(decode_on, pipes):
    """Numbers and times have no gap, and the rate is that of what is given."""
    pipe, took = pipes("helios"), []

    def process(images):
        took.append(threading.get_ident())
        return doubled(images)

    plain = torch.cat([chunk.images for chunk in stream_of(pipe, "pt").chunks(2)])
    stream = VideoStream(pipe, output_type="pt", fps=48, postprocess=process, decode_on=decode_on)
    stream.prepare(seed=SEED, **SMALL)
    frames = list(stream.frames(2 * 2 * FRAMES))
    assert [frame.id for frame in frames] == list(range(4 * FRAMES))
    assert [frame.time for frame in frames] == [k / 48 for k in range(4 * FRAMES)]
    assert torch.equal(torch.stack([frame.image for frame in frames[::2]]), plain)
    assert [frame.chunk for frame in frames] == [0] * 2 * FRAMES + [1] * 2 * FRAMES
    assert (threading.get_ident() in took) == (decode_on is None)
    stream.flush()
    assert stream().first_frame == 2 * FRAMES * (2 if decode_on is None else 3)
    stream.close()


def test_bad_postprocess_is_an_error_of_its_chunk(pipes):
    pipe = pipes("helios")
    for result, fps, error, message in (
        (doubled, None, ValueError, "postprocess makes 18 images of 9: pass VideoStream\\(fps=...\\)"),
        (lambda images: [], 24, ValueError, "postprocess has returned no image for the 9 that it was given"),
        (lambda images: None, 24, TypeError, "returns images, .* not None"),
        (lambda images: 1 / 0, 24, ZeroDivisionError, "division"),
    ):
        stream = VideoStream(pipe, output_type="pt", postprocess=result, fps=fps)
        stream.prepare(seed=SEED, **SMALL)
        for _ in range(2):
            with pytest.raises(error, match=message):
                stream()
        assert stream._video.chunks == 0
    with pytest.raises(TypeError, match="postprocess is a function"):
        VideoStream(pipe, postprocess=2)
    with pytest.raises(ValueError, match="postprocess is for images"):
        VideoStream(pipe, output_type="latent", postprocess=doubled)


@pytest.mark.parametrize("decode_on", [None, "cpu"])
def test_a_postprocess_may_only_update(decode_on, pipes):
    refused = []

    def process(images):
        for call in (stream, stream.reset, stream.flush, stream.close, lambda: stream.prepare(**SMALL)):
            with pytest.raises(RuntimeError, match="only update"):
                call()
        refused.append(stream.update(seed=5))
        return images

    stream = VideoStream(pipes("helios"), output_type="pt", decode_on=decode_on, postprocess=process)
    stream.prepare(**SMALL)
    assert [chunk.id for chunk in at_once(lambda: stream())] == [0] and refused == [1]
    stream.close()


def test_a_postprocess_updates_while_prepare_and_close_wait(pipes):
    """They wait for the chunk ahead."""
    decodes, numbers = itertools.count(), []

    def process(images):
        if next(decodes) % 3 == 2:
            time.sleep(0.1)
        numbers.append(stream.update(seed=5))
        return images

    stream = VideoStream(pipes("helios"), output_type="pt", decode_on="cpu", postprocess=process)
    stream.prepare(**SMALL)
    for end in (lambda: stream.prepare(**SMALL), stream.close):
        assert at_once(lambda end=end: (stream(), stream(), end())[2]) == [None]
    assert numbers == [1, 2, 3, 1, 2], "the last one is refused, since the stream is closed"


@pytest.mark.parametrize("decode_on", [None, "cpu"])
def test_a_postprocess_that_exits_ends_its_chunk(decode_on, pipes):
    pipe, calls = pipes("helios"), iter(range(10**9))

    def process(images):
        if next(calls) == 1:
            sys.exit(3)
        return images

    stream = VideoStream(pipe, output_type="pt", decode_on=decode_on, postprocess=process)
    stream.prepare(seed=SEED, **SMALL)
    drawn = [stream()]
    (error,) = at_once(stream)
    assert isinstance(error, SystemExit if decode_on is None else DecodeError) and "3" in str(error)
    assert same([*drawn, *stream.chunks(1)], list(stream_of(pipe, "pt").chunks(2)))
    stream.close()


@contextmanager
def interrupted(number: int):
    """Inside, KeyboardInterrupt is raised before the line of this number that the module of drawing executes, from 0."""
    lines = itertools.count()

    def trace(frame, event, argument):
        if frame.f_code.co_filename != drawing.__file__:
            return None
        if event == "line" and next(lines) == number:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("decode_on", [None, slow("cpu")])
def test_an_interrupt_at_any_line_loses_no_frame_and_doubles_none(decode_on, pipes):
    pipe = pipes("helios")
    stream = VideoStream(pipe, output_type="pt", decode_on=decode_on)
    stream.prepare(seed=SEED, **{**SMALL, "num_inference_steps": 1})
    frames, interrupts, done = [], 0, False
    while not done:
        try:
            with interrupted(interrupts):
                frames += stream.frames(1)
            done = True
        except KeyboardInterrupt:
            interrupts += 1
        frames += stream.frames(len(stream._video.state.frames))
    assert interrupts > 20
    plain = [frame for frame, _ in zip(stream_of(pipe, "pt", num_inference_steps=1).frames(), frames, strict=False)]
    assert [frame.id for frame in frames] == list(range(len(frames)))
    assert all(torch.equal(one.image, own.image) for one, own in zip(frames, plain, strict=True))
    stream.close()


# -- guidance on two devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["helios", slow("helios-pyramid")])
def test_guidance_on_two_devices_draws_the_same_bits(family, pipes):
    """Each call of the network is of one row, half of them by the copy. Prompts of two lengths, and no guidance, do not
    need it."""
    pipe, call = pipes(family), {**(SMALL if family == "helios" else PYRAMID), **GUIDED}
    plain, stream = VideoStream(pipe, output_type="pt"), VideoStream(pipe, output_type="pt", guidance_on="cpu")
    changes = ({}, {"guidance_scale": 1.0}, {"guidance_scale": 2.0, "prompt_embeds": embeds(4)[:, :9]})
    for one in (plain, stream):
        one.prepare(seed=SEED, **call)
    for change in changes:
        plain.update(**change)
        stream.update(**change)
        own = plain()
        with (
            called(pipe) as rows,
            called(SimpleNamespace(transformer=stream._modules._sharded.replicas[1].network)) as theirs,
        ):
            chunk = stream()
        assert same([chunk], [own]) and set(rows + theirs) == {1}
        assert len(theirs) == (0 if change else len(rows))
    stream.close()


@pytest.mark.slow
def test_guidance_on_two_devices_is_accelerated_on_both(pipes):
    pipe = pipes("helios", **REGIONAL)
    plain = latents(stream_of(pipe, **GUIDED), 2)
    stream = VideoStream(pipe, output_type="latent", guidance_on="cpu")
    stream.prepare(seed=SEED, **{**SMALL, **GUIDED})
    stream.accelerate("compile", **EAGER)
    copied = stream._modules._sharded.replicas[1].network
    assert all(block._compiled_call_impl is not None for block in (*pipe.transformer.blocks, *copied.blocks))
    assert relative_error(torch.cat(latents(stream, 2)), torch.cat(plain)) < 1e-5
    with torch.no_grad():
        pipe.transformer.proj_out.bias.add_(1)
    changed = latents(stream, 1)
    assert torch.equal(copied.proj_out.bias, pipe.transformer.proj_out.bias) and not torch.equal(changed[0], plain[0])
    with torch.no_grad():
        pipe.transformer.proj_out.bias.sub_(1)
    stream.close()


def test_guidance_on_copies_a_changed_network_at_prepare():
    """Its weights are moved, and its adapters change."""
    from peft import LoraConfig

    pipe, call = random_pipeline("helios"), {**SMALL, **GUIDED}
    stream = VideoStream(pipe, output_type="latent", guidance_on="cpu")

    def prepared_again() -> bool:
        stream.prepare(seed=SEED, **call)
        return equal(latents(stream, 1), latents(stream_of(pipe, **GUIDED), 1))

    assert prepared_again()
    copied = stream._modules._sharded
    assert prepared_again() and stream._modules._sharded is copied
    pipe.to(torch.bfloat16)
    assert prepared_again()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(RuntimeError, match=r"adapters \(LoRA\) .* call prepare\(\) again"):
        stream()
    assert prepared_again()
    stream.close()


def test_guidance_on_is_refused_where_it_cannot_be(pipes):
    with pytest.raises(NotImplementedError, match="AnyFlowFARPipeline does not offer guidance_on: .* once for both"):
        VideoStream(pipes("anyflow-far"), guidance_on="cpu")
    with pytest.raises(ValueError, match="guidance_on is one device"):
        VideoStream(pipes("helios"), guidance_on=["cpu", "cpu"])
    with pytest.raises(TypeError, match="guidance_on is for a stream alone"):
        VideoViewers(pipes("helios")).add(guidance_on="cpu")


@pytest.mark.slow
def test_a_video_that_goes_on_from_images_is_decoded_elsewhere(pipes):
    """Its first chunk has the given images before its own, and its VAE a memory."""
    call = {**SMALL, "base_num_frames": 21, "overlap_history": 5, "causal_block_size": 2, "ar_step": 1}
    call = {**{name: one for name, one in call.items() if name != "num_latent_frames_per_chunk"}}
    call |= {"video": random(1, 13, 3, 16, 16)}
    chunks = []
    for decode_on in (None, "cpu"):
        stream = VideoStream(pipes("skyreels-video"), output_type="pt", decode_on=decode_on)
        stream.prepare(seed=SEED, **call)
        chunks.append(list(stream.chunks(4)))
        stream.close()
    assert same(*chunks)
