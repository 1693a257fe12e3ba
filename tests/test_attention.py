"""Attention by another backend: it computes what was asked for, compiled or not, and leaves no trace when it is undone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    with pytest.raises(ValueError, match=f"unknown attention 'fast': this diffusers knows {', '.join(backends())}"):
        choose_attention(direct, "fast")
    with pytest.raises(ValueError, match=r"\(JointAttnProcessor2_0\) calls torch directly: choose .*_native_cudnn"):
        choose_attention(direct, "flash")
    with pytest.raises(ValueError, match="finds no attention in Linear"):
        choose_attention(torch.nn.Linear(2, 2), "_native_math")
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
