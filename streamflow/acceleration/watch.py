"""Has a module changed in a way that a capture of it cannot see? A CUDA graph reads weights where they lay and adapters as
strong as they were when it was captured; values changed in place it sees by itself."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Watch:
    """Remembers where a module's weights lie, which adapters (LoRA) it has and how they are set. Cheap enough to be asked
    before every call: one list comparison, tens of microseconds for a network of a thousand tensors."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.renew()

    def renew(self) -> None:
        """Remember the module as it is now."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        self._plain = [t for t in tensors if not is_traceable_wrapper_subclass(t)]
        self._made_of_others = [t for t in tensors if is_traceable_wrapper_subclass(t)]
        modules = list(self.module.modules())
        self._networks = [m for m in modules if hasattr(m, "add_adapter")]
        self._adapters = [m for m in modules if hasattr(m, "active_adapters") and hasattr(m, "scaling")]
        self._seen = self._state()

    def changed(self) -> bool:
        """Whether weights have moved, adapters have come, gone or changed strength since `renew`."""
        return self._state() != self._seen

    def _state(self) -> tuple:
        return (
            [t.data_ptr() for t in self._plain],
            [inner.data_ptr() for t in self._made_of_others for inner in inner_tensors(t)],
            self.adapters(),
        )

    def adapters(self) -> tuple:
        """Which adapters there are and how they are set, to be compared with what it was."""
        there = [tuple(getattr(m, "peft_config", None) or ()) for m in self._networks]
        return there, [self._set(m) for m in self._adapters]

    def _set(self, layer: nn.Module) -> tuple:
        """How a layer's adapters are set: which are active, how strong, whether off, which are merged into the weights."""
        merged = tuple(getattr(layer, "merged_adapters", ()))
        return tuple(layer.active_adapters), tuple(layer.scaling.items()), layer.disable_adapters, merged


class Baked(Watch):
    """For whatever holds a copy of the weights: also sees values changed in place, which a CUDA graph would follow. It does
    not see writes through `.data`, which torch does not count."""

    def _state(self) -> tuple:
        tensors = (*self._plain, *self._made_of_others)
        return (*super()._state(), [version_of(t) for t in tensors])


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written in place; None for inference tensors, of which torch does not count it."""
    return None if tensor.is_inference() else tensor._version


def inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the memory of one that is made of others, as quantised weights are: its own address says
    nothing."""
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        yield from inner_tensors(inner) if is_traceable_wrapper_subclass(inner) else (inner,)
