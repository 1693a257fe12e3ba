"""Detects changes of a module that a captured CUDA graph does not follow. A graph reads weights at the addresses and with
the adapter strengths of its capture. It follows values that are changed in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from operator import attrgetter
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class AdapterLayer(Protocol):
    """What this file reads of a peft layer with adapters."""

    active_adapters: Collection[str]
    scaling: Mapping[str, float]
    disable_adapters: bool


class Watch:
    """Remembers the addresses of a module's weights, and its adapters (LoRA) with their settings. `changed` may be called
    before every call of the module: it takes tens of microseconds for a thousand tensors."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.renew()

    def renew(self) -> None:
        """Remember the present state of the module."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        wraps = [is_traceable_wrapper_subclass(t) for t in tensors]
        self._plain = [t for t, wrapper in zip(tensors, wraps, strict=True) if not wrapper]
        self._wrappers = [t for t, wrapper in zip(tensors, wraps, strict=True) if wrapper]
        self._inner = [(t, inner) for t in self._wrappers for inner in map(attrgetter, inner_paths(t))]
        modules = list(self.module.modules())
        self._networks = [m for m in modules if hasattr(m, "add_adapter")]
        self._adapters = [cast(AdapterLayer, m) for m in modules if hasattr(m, "active_adapters") and hasattr(m, "scaling")]
        self._seen = self._state()

    def changed(self) -> bool:
        """Whether weights have moved, or adapters were added, removed or set otherwise, since `renew`."""
        return self._state() != self._seen

    def _state(self) -> tuple:
        return (
            [t.data_ptr() for t in self._plain],
            [_address(t, inner) for t, inner in self._inner],
            self.adapters(),
        )

    def adapters(self) -> tuple:
        """The adapters and their settings, for comparison."""
        names = [tuple(getattr(m, "peft_config", None) or ()) for m in self._networks]
        return names, [self._settings(m) for m in self._adapters]

    def _settings(self, layer: AdapterLayer) -> tuple:
        """The settings of a layer's adapters: which are active, their strengths, whether they are disabled, which are
        merged into the weights."""
        merged = tuple(getattr(layer, "merged_adapters", ()))
        return tuple(layer.active_adapters), tuple(layer.scaling.items()), layer.disable_adapters, merged


class WeightWatch(Watch):
    """For code that holds a copy of the weights: also detects values that are changed in place. It does not detect writes
    through `.data`, which torch does not count."""

    def _state(self) -> tuple:
        tensors = (*self._plain, *self._wrappers)
        return (*super()._state(), [version_of(t) for t in tensors])


def version_of(tensor: Tensor) -> int | None:
    """The number of in-place writes to a tensor. None for inference tensors, where torch does not count them."""
    return None if tensor.is_inference() else tensor._version


def _address(wrapper: Tensor, inner: Callable[[Tensor], Tensor]) -> int | None:
    """Of one of its inner tensors. None if the wrapper has become one of another kind."""
    try:
        return inner(wrapper).data_ptr()
    except AttributeError:
        return None


def inner_paths(wrapper: Any) -> Iterator[str]:
    """The attributes of a wrapper subclass (a quantised weight) with the tensors that hold its memory: it has no address
    itself. "a.b" where a wrapper holds another one."""
    for name in wrapper.__tensor_flatten__()[0]:
        inner = getattr(wrapper, name)
        if is_traceable_wrapper_subclass(inner):
            yield from (f"{name}.{path}" for path in inner_paths(inner))
        else:
            yield name
