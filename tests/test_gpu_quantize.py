"""Eight-bit matrices and other attention where they run: on a GPU, compiled, behind CUDA graphs."""

from itertools import product

import pytest
import torch
from conftest import FAMILIES, noises, relative_error, streamed
from random_pipelines import random_pipeline, random_tiny_vae

from streamflow import StreamFlow
from streamflow.acceleration import flash_attention
from streamflow.acceleration.quantize import KINDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
WIDE = {
    "sd3": {"num_layers": 4, "attention_head_dim": 64, "num_attention_heads": 8, "caption_projection_dim": 512},
    "flux": {
        **{"num_layers": 4, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 8},
        "axes_dims_rope": (16, 24, 24),
    },
}
OFF = 0.1  # eight-bit floats carry 3 bits of mantissa; a wrong scale would be off by far more


@pytest.fixture
def wide_stream():
    """`wide_stream(family)`: a prepared bfloat16 stream whose layers are large enough to be quantised."""

    def make(family: str) -> StreamFlow:
        pipe = random_pipeline(family, **WIDE[family])
        pipe.vae = random_tiny_vae(16)
        stream = StreamFlow(pipe.to("cuda", torch.bfloat16), range(4), cfg_type="none", width=128, height=128)
        stream.prepare("a red apple", num_inference_steps=4)
        return stream

    return make


def latents(stream, n: int = 6) -> torch.Tensor:
    return streamed(stream, noises(stream, n)).float()


def require_torchao_and(kind: str) -> None:
    pytest.importorskip("torchao", reason='needs torchao: pip install "streamflow-rf[quantize]"')
    found, least = torch.cuda.get_device_capability(), KINDS[kind].capability
    if found < least:
        pytest.skip(f"{kind} needs compute capability {least}, and this GPU has {found}")


@pytest.mark.parametrize("family,kind", [("sd3", "fp8"), ("flux", "fp8-tensor"), ("flux", "int8")])
def test_eight_bits_draw_nearly_the_same_and_are_undone(wide_stream, family, kind):
    require_torchao_and(kind)
    stream = wide_stream(family)
    before, weights = latents(stream), {name: p.clone() for name, p in stream.unet.named_parameters()}
    stream.accelerate("compile", quantize=kind)
    quantised = [p for p in stream.unet.parameters() if hasattr(p, "qdata")]
    assert len(quantised) >= 20
    assert 0 < relative_error(latents(stream), before) < OFF
    stream.accelerate("none")
    after = dict(stream.unet.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in weights.items()) and len(after) == len(weights)
    assert torch.equal(latents(stream), before)


BACKENDS = ("_native_cudnn", "_native_flash", "_native_efficient")
NARROW = [("instaflow", "_native_cudnn"), ("instaflow", "_native_efficient")]  # the tiny UNet's heads are 4 wide


@pytest.mark.parametrize("family,backend", NARROW)
def test_an_attention_that_cannot_be_leaves_the_stream_as_it_was(cuda_stream, family, backend):
    stream = cuda_stream(family, dtype=torch.float16)
    before = latents(stream)
    with pytest.raises(RuntimeError, match="No available kernel"):
        stream.accelerate("cuda-graph", attention=backend)
    assert stream.acceleration == "none" and torch.equal(latents(stream), before)


@pytest.mark.parametrize("family,backend", [pair for pair in product(FAMILIES, BACKENDS) if pair not in NARROW])
def test_another_attention_draws_the_same(cuda_stream, family, backend):
    stream = cuda_stream(family, dtype=torch.float16)
    before = latents(stream)
    stream.accelerate("cuda-graph", attention=backend)
    assert relative_error(latents(stream), before) < 0.01
    stream.accelerate("none")
    assert torch.equal(latents(stream), before)


def test_another_attention_compiled(wide_stream):
    stream = wide_stream("sd3")
    before = latents(stream)
    stream.accelerate("compile", attention="_native_cudnn", fuse_qkv=True)
    assert relative_error(latents(stream), before) < 0.03
    stream.accelerate("none")
    assert torch.equal(latents(stream), before)


# -- FlashAttention 3 and 4 -----------------------------------------------------------------------------------------------


def require_kernel(name: str) -> None:
    try:
        flash_attention.require(name, torch.device("cuda"))
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("shape", [(2, 300, 4, 64), (1, 1024, 6, 128), (1, 77, 2, 64)], ids=str)
@pytest.mark.parametrize("name", flash_attention.KERNELS)
def test_a_kernel_computes_attention(name, shape):
    require_kernel(name)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
    got = flash_attention.attend(name, q, k, v)
    assert got.dtype == q.dtype and got.shape == q.shape
    assert relative_error(got.double(), expected.transpose(1, 2)) < (0.1 if name == "fa3-fp8" else 0.01)


@pytest.mark.parametrize("kind", ["cuda-graph", "compile"])
@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("name", flash_attention.KERNELS)
def test_a_kernel_draws_the_same_in_graphs_and_compiled(wide_stream, name, family, kind):
    require_kernel(name)
    stream = wide_stream(family)
    before = latents(stream)
    stream.accelerate(kind, attention=name)
    assert 0 < relative_error(latents(stream), before) < (OFF if name == "fa3-fp8" else 0.03)
    stream.accelerate("none")
    assert torch.equal(latents(stream), before)


def test_a_kernel_and_eight_bit_matrices(wide_stream):
    require_kernel("fa3")
    require_torchao_and("fp8")
    stream = wide_stream("flux")
    before = latents(stream)
    stream.accelerate("compile", attention="fa3", quantize="fp8")
    assert 0 < relative_error(latents(stream), before) < OFF
    stream.accelerate("none")
    assert torch.equal(latents(stream), before)
