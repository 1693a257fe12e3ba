"""Attention by another backend: it computes what was asked for, compiled or not, and leaves no trace when it is undone."""

import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from torch.utils._python_dispatch import TorchDispatchMode

from streamflow.acceleration import flash_attention
from streamflow.acceleration.attention import choose_attention
from streamflow.acceleration.compile import Compiled, fuse_projections
from streamflow.models.attention_backend import backends, processor_of

FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Seen(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def trace(module) -> list:
    """What a choice of attention may leave behind."""
    attentions = [m for m in module.modules() if processor_of(m) is not None]
    return [(m.processor, getattr(m.processor, "_attention_backend", None), "forward" in vars(m)) for m in attentions]


@pytest.mark.parametrize("family", ["sd3", "instaflow", "flux"])
def test_the_chosen_attention_runs_and_is_undone(stream_of, family):
    part = stream_of(family).parts().velocity
    before, plain = trace(part.module), part.call()
    for name, flash in (("_native_flash", True), ("_native_math", False)):
        undo = choose_attention(part.module, name)
        with Seen() as seen:
            drawn = part.call()
        undo()
        assert (FLASH in seen.names) == flash
        assert torch.allclose(drawn, plain, atol=1e-5)
        assert trace(part.module) == before
    assert torch.equal(part.call(), plain)


@pytest.mark.slow
def test_code_compiled_for_one_attention_is_not_used_for_another(stream_of):
    part, graphs = stream_of("sd3").parts().velocity, []

    def keep(graph, inputs):
        graphs.append([getattr(node.target, "__name__", "") for node in graph.graph.nodes])
        return graph

    compiled = Compiled(part.module, torch.compile(part.module, backend=keep, fullgraph=True, dynamic=False))
    plain = part.call(compiled)
    undo = choose_attention(part.module, "_native_math")
    chosen = part.call(compiled)
    undo()
    assert len(graphs) == 2
    assert [sum("sdpa" in name for name in graph) > 0 for graph in graphs] == [False, True]
    assert torch.allclose(chosen, plain, atol=1e-5)


def test_what_cannot_be_is_refused_and_leaves_no_trace(stream_of):
    direct, dispatched = (stream_of(family).parts().velocity.module for family in ("sd3", "flux"))
    before = trace(direct), trace(dispatched)
    with pytest.raises(ValueError, match=f"unknown attention 'fast': choose fa3, .*: {', '.join(backends())}"):
        choose_attention(direct, "fast")
    with pytest.raises(ValueError, match=r"\(JointAttnProcessor2_0\) calls torch directly: choose .*_native_cudnn"):
        choose_attention(direct, "flash")
    with pytest.raises(ValueError, match="finds no attention in Linear"):
        choose_attention(torch.nn.Linear(2, 2), "_native_math")
    for module in (direct, dispatched):
        with pytest.raises(RuntimeError, match=r"attention='fa3' needs a GPU of compute capability 9.x, not cpu"):
            choose_attention(module, "fa3")
    with pytest.raises(RuntimeError, match="_sage_qk_int8_pv_fp16_triton"):  # its library is not installed
        choose_attention(dispatched, "_sage_qk_int8_pv_fp16_triton")
    assert (trace(direct), trace(dispatched)) == before


def test_the_switch_does_not_become_the_default_of_the_process(stream_of):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry.get_active_backend()
    undo = choose_attention(stream_of("flux").parts().velocity.module, "_native_math")
    assert registry.get_active_backend() == before
    undo()


def test_joined_projections_that_compute_something_else_are_refused(stream_of):
    part = stream_of("sd3", changes={"qk_norm": "rms_norm"}).parts().velocity
    before, state = part.call(), list(part.module.state_dict())
    with pytest.raises(ValueError, match=r"fuse_qkv changes what this network computes"):
        fuse_projections(part)
    assert torch.equal(part.call(), before) and list(part.module.state_dict()) == state


# -- FlashAttention 3 and 4, whose kernels need a GPU: here torch's own attention is behind the same operator -------------


def on_cpu():
    """A kernel in the layout of FlashAttention's."""

    def attention(q, k, v, scale, causal):
        rows = (x.float().transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*rows, is_causal=causal, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2).contiguous().to(torch.bfloat16 if q.dtype == flash_attention.FP8 else q.dtype)

    return attention


@pytest.fixture
def kernels(monkeypatch):
    for name, fp8 in (("cpu", False), ("cpu-fp8", True)):
        kernel = flash_attention.Kernel(on_cpu, "torch", "dev", (9,), (torch.float32,), fp8)
        monkeypatch.setitem(flash_attention.KERNELS, name, kernel)


def processors(module) -> list:
    return [p for p in map(processor_of, module.modules()) if p is not None]


@pytest.mark.parametrize("family", ["sd3", *map(slow, ("flux", "instaflow", "flux2-klein", "qwenimage", "zimage"))])
def test_a_kernel_takes_the_place_of_torchs_attention_also_compiled(family, stream_of, kernels):
    part, graphs = stream_of(family).parts().velocity, []
    before, plain = trace(part.module), part.call()
    torch.compiler.reset()

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = Compiled(part.module, torch.compile(part.module, backend=keep, fullgraph=True, dynamic=False))
    undo = flash_attention.use_kernel(processors(part.module), "cpu")
    assert torch.allclose(part.call(), plain, atol=1e-5) and torch.allclose(part.call(compiled), plain, atol=1e-5)
    undo()
    undo = flash_attention.use_kernel(processors(part.module), "cpu-fp8")
    rounded = part.call()
    undo()
    assert 0 < (rounded - plain).norm() / plain.norm() < 0.1
    assert torch.equal(part.call(compiled), plain) and torch.equal(part.call(), plain)
    found = [("flash_attention" in graph, "scaled_dot_product" in graph) for graph in graphs]
    assert found == [(True, False), (False, True)]
    assert trace(part.module) == before and not any("streamflow" in type(p).__call__.__module__ for p, *_ in before)


def test_the_operator_is_one_that_torch_can_trace(kernels):
    q, k, v = (torch.randn(2, 5, heads, 16) for heads in (4, 2, 2))
    for causal in (False, True):
        torch.library.opcheck(flash_attention.flash_attention, (q, k, v, 0.25, causal, "cpu"), raise_exception=True)
    wide = 1e4 * q.transpose(1, 2).contiguous().transpose(1, 2)
    assert flash_attention.attend("cpu-fp8", wide, k, v, enable_gqa=True).isfinite().all(), "clamped to eight bits' range"


def test_what_a_kernel_does_not_support_is_refused(kernels, stream_of):
    q = torch.randn(1, 5, 4, 16)
    with pytest.raises(ValueError, match="attention='cpu' takes no mask"):
        flash_attention.attend("cpu", q, q, q, torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="no dropout"):
        flash_attention.attend_by_heads("cpu", q, q, q, dropout_p=0.1)
    with pytest.raises(TypeError, match=r"takes torch.float32, not torch.float16"):
        flash_attention.attend("cpu", q.half(), q.half(), q.half())
    module = stream_of("sana").parts().velocity.module
    before = trace(module)
    with pytest.raises(ValueError, match="does not know the attention of SanaLinearAttnProcessor"):
        flash_attention.use_kernel(processors(module), "cpu")
    assert trace(module) == before
