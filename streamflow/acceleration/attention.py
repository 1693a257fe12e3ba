"""Selects the implementation of attention by its name in diffusers. Some networks call attention through diffusers'
dispatcher, where a backend can be set. Others (UNets, Stable Diffusion 3) call torch's attention directly, where one of
torch's own backends can be set around each attention module. `flash_attention.KERNELS` are for both. All work under
torch.compile and CUDA graphs.

Which backend is fastest depends on GPU, shapes and versions: measure it (`examples/benchmark/further.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import MethodType
from typing import TYPE_CHECKING, cast

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamflow.acceleration import flash_attention

if TYPE_CHECKING:
    from streamflow.models.protocols import Function, Network

TORCH = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}


def choose_attention(module: nn.Module, name: str) -> Callable[[], None]:
    """Set the backend of all attention in a module. Returns a function that restores the earlier backends.

    Raises:
        ValueError: the name is unknown, the module has no attention, or attention for other backends only, or it calls torch
            directly and the name is for diffusers' dispatcher. RuntimeError: the library of the backend is missing, or the
            GPU does not support the kernel. ImportError: the library of the kernel is missing.
    A backend that does not support the shapes or dtypes on this device raises in the first call.
    """
    from streamflow.models.attention_backend import backends, has_backend, processor_of, set_backend

    kernels = flash_attention.KERNELS
    if name not in kernels and name not in backends():
        known = f"choose {', '.join(kernels)}, or one that this diffusers knows: {', '.join(backends())}"
        raise ValueError(f"unknown attention {name!r}: {known}")
    attentions = [m for m in module.modules() if processor_of(m) is not None]
    if not attentions:
        raise ValueError(f"attention={name!r} finds no attention in {type(module).__name__}: leave it out")
    for processor in map(processor_of, attentions):
        own: Sequence[str] = getattr(processor, "_SUPPORTED_BACKENDS", (name,))
        if name not in own:
            raise ValueError(
                f"{type(processor).__name__} of this network works with attention={' or '.join(map(repr, own))} only, not "
                f"{name!r}: leave it out"
            )
    if name in kernels:
        flash_attention.require(name, next(module.parameters()).device)
        return flash_attention.use_kernel(list({id(p): p for p in map(processor_of, attentions)}.values()), name)
    direct = sorted({type(m.processor).__name__ for m in attentions if not has_backend(m.processor)})
    if not direct:
        with ExitStack() as undo:
            for network in module.modules():
                if hasattr(network, "set_attention_backend"):
                    undo.callback(set_backend(cast("Network", network), name))
            return undo.pop_all().close
    if name in TORCH:
        return force_backend(attentions, TORCH[name])
    raise ValueError(
        f"attention={name!r} needs diffusers' dispatcher, but this network's attention ({', '.join(direct)}) calls torch "
        f"directly: choose one of torch's own, {', '.join(TORCH)}, or {', '.join(kernels)}"
    )


def force_backend(attentions: Sequence[nn.Module], backend: SDPBackend) -> Callable[[], None]:
    """Restrict `scaled_dot_product_attention` in these modules to one backend. Returns a function that undoes it.

    The backend is set inside `forward`, where torch.compile sees it: a context around the call would not be part of the
    compiled code's guards. ValueError: a module has a `forward` of its own, such as a hook.
    """
    if hooked := [m for m in attentions if "forward" in vars(m)]:
        raise ValueError(f"{type(hooked[0]).__name__} has a forward of its own: remove the hooks, or leave attention out")
    forwards = {kind: with_backend(kind.forward, backend) for kind in {type(m) for m in attentions}}
    for module in attentions:
        module.forward = MethodType(forwards[type(module)], module)

    def undo() -> None:
        for module in attentions:
            del module.forward

    return undo


def with_backend(plain: Function, backend: SDPBackend) -> Function:
    """A module's `forward` with one of torch's backends."""

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        with sdpa_kernel(backend):
            return plain(self, *args, **kwargs)

    return forward
