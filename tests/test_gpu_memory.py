"""Little memory where it counts: the peak of a GPU's memory while a pipeline is placed on it and draws."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import noises, relative_error, streamed
from random_pipelines import random_pipeline, random_tiny_vae
from test_gpu_quantize import OFF, WIDE, require_torchao_and

from streamflow import StreamFlow
from streamflow.acceleration.memory import place
from streamflow.models.pipe_parts import quantized_kinds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def wide_pipe(family: str):
    """A bfloat16 pipe on the CPU whose layers are large enough to be quantised."""
    pipe = random_pipeline(family, **WIDE[family])
    pipe.vae = random_tiny_vae(16)
    return pipe.to(dtype=torch.bfloat16)


def stream_of(pipe, **options) -> StreamFlow:
    stream = StreamFlow(pipe, range(4), cfg_type="none", width=128, height=128)
    stream.prepare("a red apple", num_inference_steps=4)
    if options:
        stream.accelerate("compile", **options)
    return stream


def drawn(stream) -> torch.Tensor:
    return streamed(stream, noises(stream, 4)).float()


class Peak:
    """The most memory that was allocated in a block, in bytes, above what was allocated before."""

    def __enter__(self):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error):
        torch.cuda.synchronize()
        self.bytes = torch.cuda.max_memory_allocated() - self.before


def size_of(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("family,kind", [("sd3", "fp8"), ("flux", "int8")])
def test_the_plain_network_is_never_on_the_gpu(family, kind):
    require_torchao_and(kind)
    pipe = wide_pipe(family)
    plain, rest = size_of(pipe.transformer), sum(size_of(getattr(pipe, n)) for n in PARTS if getattr(pipe, n, None))
    largest = max(p.nbytes for p in pipe.transformer.parameters())
    quantised = {id(p) for m in pipe.transformer.modules() if type(m) is torch.nn.Linear for p in m.parameters()}
    assert quantised
    with Peak() as placed:
        place(pipe, "cuda", quantize=kind)
    assert quantized_kinds(pipe.transformer) == {kind}
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cuda"}
    small_tensors = 2**20  # the allocator rounds every tensor up to 512 bytes
    assert placed.bytes < 0.8 * plain + rest + size_of(pipe.vae) + 3 * largest + small_tensors


@pytest.mark.parametrize("family,kind", [("sd3", "fp8"), ("flux", "int8")])
def test_a_placed_network_draws_what_a_quantised_one_draws(family, kind):
    require_torchao_and(kind)
    placed = stream_of(place(wide_pipe(family), "cuda", quantize=kind))
    plain = stream_of(wide_pipe(family).to("cuda"))
    expected = drawn(plain)
    assert 0 < relative_error(drawn(placed), expected) < OFF
    for options in ({}, {"quantize": kind, "keep_plain": False}):
        placed.accelerate("compile", **options)
        assert 0 < relative_error(drawn(placed), expected) < OFF


def test_dropped_weights_free_their_memory():
    require_torchao_and("int8")
    held, eight = [], 0
    for keep in (True, True, False):  # the first one allocates the workspaces of libraries
        gc.collect()
        before = torch.cuda.memory_allocated()
        stream = stream_of(wide_pipe("flux").to("cuda"), quantize="int8", keep_plain=keep, cuda_graph=False)
        gc.collect()
        held.append(torch.cuda.memory_allocated() - before)
        weights = [m.weight for m in stream.unet.modules() if hasattr(getattr(m, "weight", None), "qdata")]
        eight = sum(weight.qdata.nbytes for weight in weights)
        assert len(weights) >= 20
        if not keep:
            with pytest.raises(RuntimeError, match="without keeping the plain ones"):
                stream.accelerate("none")
        stream.close()
        del stream, weights
    assert held[1] - held[2] > 1.8 * eight  # the plain weights have twice the bytes


def test_text_encoders_stay_on_the_cpu_and_encode_the_same():
    expected = stream_of(wide_pipe("sd3").to("cuda"))
    pipe = place(wide_pipe("sd3"), "cuda", offload_text_encoders=True)
    stream = stream_of(pipe)
    assert stream.device.type == "cuda"
    for one in (expected, stream):
        one.update_prompt("a blue fox")
        one.txt2img()
    assert torch.equal(stream.prompt_embeds, expected.prompt_embeds) and stream.prompt_embeds.is_cuda
    encoders = [getattr(pipe, n) for n in PARTS if getattr(pipe, n, None)]
    assert encoders and {p.device.type for one in encoders for p in one.parameters()} == {"cpu"}
    assert torch.equal(drawn(stream), drawn(expected))


def test_encoding_holds_a_few_layers_of_a_large_text_encoder():
    from transformers import T5Config, T5EncoderModel

    from streamflow.models.pipe_parts import offload_layers

    config = T5Config(d_model=512, d_ff=2048, d_kv=64, num_layers=12, num_heads=8, vocab_size=256)
    encoder = T5EncoderModel(config).eval().requires_grad_(False).to(torch.bfloat16)
    ids, size = torch.randint(256, (1, 16), device="cuda"), size_of(encoder)
    with torch.no_grad():
        expected = encoder.to("cuda")(ids)[0]
        offload_layers(encoder.to("cpu"), torch.device("cuda"))
        encoder(ids)  # finds the order of the layers
        with Peak() as peak:
            encoded = encoder(ids)[0]
    assert torch.equal(encoded, expected)
    assert peak.bytes < size / 2, (peak.bytes, size)
