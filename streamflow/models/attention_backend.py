"""diffusers' attention backends (`ModelMixin.set_attention_backend`): their names, the attention processors that support
them, and how to set one for a single network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from streamflow.models.protocols import Network


def backends() -> tuple[str, ...]:
    """The names that this diffusers has, whether or not the backend's library is installed."""
    return tuple(backend.value for backend in AttentionBackendName)


def has_backend(processor: object) -> bool:
    """Whether this attention processor has a backend that can be set; others call torch's attention themselves."""
    return hasattr(processor, "_attention_backend")


def set_backend(network: Network, name: str) -> Callable[[], None]:
    """Set a network's attention to this backend; returns a function that restores the earlier one. The default backend of
    the process, which diffusers would change too, stays. RuntimeError where the backend's library is missing or too old."""
    processors = [processor_of(module) for module in network.modules()]
    before = [(p, p._attention_backend) for p in processors if has_backend(p)]
    default, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        network.set_attention_backend(name)
    finally:
        _AttentionBackendRegistry.set_active_backend(default)

    def undo() -> None:
        for processor, backend in before:
            processor._attention_backend = backend

    return undo


def processor_of(module: nn.Module) -> Any:
    """An attention module's processor; None for any other module."""
    return getattr(module, "processor", None) if hasattr(module, "set_processor") else None
