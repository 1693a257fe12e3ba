"""Which acceleration is requested for a set of parts, and which is in force. Knows parts and kinds; what the parts are of is
its caller's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from streamflow import acceleration
from streamflow.acceleration import Accelerated, Parts

logger = logging.getLogger(__name__)


class Accelerator:
    """Accelerates parts, and accelerates them anew when they have been replaced.

    device: of the parts. parts: gives the plain modules with their inputs, or None as long as shapes are not known.
    accelerate: `acceleration.accelerate`, or a function like it. check: raises what speaks against a kind and its options.
    use: takes what came of it, or None where the plain modules are to be used.
    """

    def __init__(
        self,
        device: torch.device,
        parts: Callable[[], Parts | None],
        accelerate: Callable[[str, Parts, Any], Accelerated],
        check: Callable[[str, Any], None],
        use: Callable[[Accelerated | None], None],
    ) -> None:
        self._device, self._parts, self._accelerate = device, parts, accelerate
        self._check, self._use = check, use
        self._accelerated: Accelerated | None = None
        self.requested: tuple[str, Any] = ("none", None)  # the kind, and its checked options

    @property
    def kind(self) -> str:
        """The kind in force: "none", "cuda-graph", "compile", "tensorrt" or "onnxruntime"."""
        return self.requested[0]

    def accelerate(self, kind: str = "auto", **options: Any) -> None:
        """Make the network and the VAE faster; the images stay the same within the kind's bound.

        kind: "none" undoes all; "cuda-graph" replays recorded launches; "compile" is torch.compile, with a CUDA graph on
            top on CUDA; "tensorrt" builds engines; "onnxruntime" is for a CPU; "auto" is "compile" on CUDA, else "none".
        options: those of the kind, the fields of `streamflow.acceleration.<kind>.Options`.

        Called before `prepare`, it takes effect there, since shapes are known only then. How long each part took to start
        is logged.

        Raises:
            ValueError, TypeError: an unknown kind or option. RuntimeError: this device cannot do it. Whatever compilation
            raises; then the stream is as it was without acceleration.
        """
        kind = acceleration.resolve(kind, self._device)
        checked = acceleration.check_options(kind, self._device, options)
        self._check(kind, checked)
        self.put_back()
        self.requested = kind, checked
        self.rebuild()

    def rebuild(self) -> None:
        """Accelerate what is there now, as requested, once shapes are known."""
        kind, options = self.requested
        parts = None if kind == "none" else self._parts()
        if parts is None:
            return
        try:
            self._accelerated = self._accelerate(kind, parts, options)
        except BaseException:
            self.requested = "none", None
            raise
        self._use(self._accelerated)
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._accelerated.seconds.items())
        logger.info("accelerated by %s: %s", kind, times)

    def put_back(self) -> None:
        """Undo what acceleration changed; what was requested stays requested."""
        if self._accelerated is not None:
            self._accelerated.undo()
            self._accelerated = None
            self._use(None)
