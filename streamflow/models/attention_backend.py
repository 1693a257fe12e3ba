"""diffusers' own switch between implementations of attention (`ModelMixin.set_attention_backend`): which there are, which
attention listens to it, and how to set it for one network and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn


def backends() -> tuple[str, ...]:
    """The names that this diffusers knows; whether the library that one stands for is installed is another matter."""
    return tuple(backend.value for backend in AttentionBackendName)


def listens(processor: Any) -> bool:
    """Whether the switch reaches this attention processor; others call torch's attention themselves."""
    return hasattr(processor, "_attention_backend")


def switch(network: nn.Module, name: str) -> Callable[[], None]:
    """Set a network's attention to this backend; returns how to set it back. diffusers would also make it the default of
    the whole process; here that stays as it was. RuntimeError where the backend's library is missing or too old."""
    before = [(m.processor, m.processor._attention_backend) for m in network.modules() if listens(processor_of(m))]
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
    """An attention module's processor; None of any other module."""
    return getattr(module, "processor", None) if hasattr(module, "set_processor") else None
