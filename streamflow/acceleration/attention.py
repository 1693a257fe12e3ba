"""Another implementation of attention, by its name in diffusers. Where the network's attention goes through diffusers'
switch, that is set; where it calls torch's attention itself (UNets, Stable Diffusion 3), torch's own implementations can
still be chosen, around each attention. Both are seen by torch.compile and by CUDA graphs; neither touches weights.

Which is fastest depends on GPU, shapes and versions: measure (`examples/benchmark/further.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamflow.acceleration import run_backwards

TORCH = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}


def choose_attention(module: nn.Module, name: str) -> Callable[[], None]:
    """Let all attention inside a module be computed by this backend; returns how to put back what there was.

    Raises:
        ValueError: diffusers does not know the name, there is no attention, or its attention does not listen to diffusers'
            switch and the name is none of torch's own. RuntimeError: the backend's library is missing.
    A backend that cannot compute these shapes or dtypes on this device raises at the first call.
    """
    from streamflow.models.attention_backend import backends, has_backend, processor_of

    if name not in backends():
        raise ValueError(f"unknown attention {name!r}: this diffusers knows {', '.join(backends())}")
    attentions = [m for m in module.modules() if processor_of(m) is not None]
    if not attentions:
        raise ValueError(f"attention={name!r} finds no attention in {type(module).__name__}: leave it out")
    deaf = sorted({type(m.processor).__name__ for m in attentions if not has_backend(m.processor)})
    if not deaf:
        return _switch_all(module, name)
    if name in TORCH:
        return force(attentions, TORCH[name])
    raise ValueError(
        f"attention={name!r} goes through diffusers' switch, and this network's attention ({', '.join(deaf)}) calls torch "
        f"itself: choose one of torch's own, {', '.join(TORCH)}"
    )


def _switch_all(module: nn.Module, name: str) -> Callable[[], None]:
    from streamflow.models.attention_backend import set_backend

    undo = [set_backend(network, name) for network in module.modules() if hasattr(network, "set_attention_backend")]
    return partial(run_backwards, undo)


def force(attentions: Sequence[nn.Module], backend: SDPBackend) -> Callable[[], None]:
    """Let these modules find one implementation only when they call `scaled_dot_product_attention`. The choice is made
    inside their `forward`, where torch.compile sees it: outside, code compiled for another one would be used again."""
    if hooked := [m for m in attentions if "forward" in vars(m)]:
        raise ValueError(f"{type(hooked[0]).__name__} has a forward of its own: remove the hooks, or leave attention out")
    forwards = {kind: within(kind.forward, backend) for kind in {type(m) for m in attentions}}
    for module in attentions:
        module.forward = MethodType(forwards[type(module)], module)

    def undo() -> None:
        for module in attentions:
            del module.forward

    return undo


def within(plain: Callable[..., Any], backend: SDPBackend) -> Callable[..., Any]:
    """A module's forward under one of torch's implementations."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(backend):
            return plain(self, *args, **kwargs)

    return forward
