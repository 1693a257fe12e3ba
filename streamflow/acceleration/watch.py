"""Has a module changed in a way that a capture of it cannot see? A CUDA graph reads weights where they lay and adapters as
strong as they were when it was captured; values changed in place it sees by itself."""

from __future__ import annotations

from torch import nn


class Watch:
    """Remembers where a module's weights lie, which adapters (LoRA) it has and how they are set. Cheap enough to be asked
    before every call: one list comparison, tens of microseconds for a network of a thousand tensors."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.renew()

    def renew(self) -> None:
        """Remember the module as it is now."""
        self._tensors = [*self.module.parameters(), *self.module.buffers()]
        modules = list(self.module.modules())
        self._networks = [m for m in modules if hasattr(m, "add_adapter")]
        self._adapters = [m for m in modules if hasattr(m, "active_adapters") and hasattr(m, "scaling")]
        self._seen = self._state()

    def changed(self) -> bool:
        """Whether weights have moved, adapters have come, gone or changed strength since `renew`."""
        return self._state() != self._seen

    def _state(self) -> tuple:
        return (
            [t.data_ptr() for t in self._tensors],
            [tuple(getattr(m, "peft_config", None) or ()) for m in self._networks],
            [(tuple(m.active_adapters), tuple(m.scaling.items()), m.disable_adapters) for m in self._adapters],
        )
