"""Which acceleration is requested for a set of parts, and which is in force. Knows parts and kinds; what the parts are of is
its caller's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from streamflow import acceleration
from streamflow._grad_mode import computing
from streamflow.acceleration import Accelerated, Parts

logger = logging.getLogger(__name__)


class Model(Protocol):
    """What can be accelerated. acceleration: the kind that is requested, and its checked options. accelerated: the modules
    in force, None where these are the plain ones."""

    device: torch.device
    acceleration: tuple[str, Any]
    accelerated: Accelerated | None

    def use(self, accelerated: Accelerated | None) -> None:
        """Draw with these modules, or with the plain ones."""


class Accelerator:
    """Accelerates the parts of a model, and accelerates them anew when they have been replaced.

    model: what is accelerated. parts: gives its plain modules with their inputs, or None as long as shapes are not known.
    accelerate: `acceleration.accelerate`, or a function like it. check: raises what speaks against a kind and its options.
    """

    def __init__(
        self,
        model: Model,
        parts: Callable[[], Parts | None],
        accelerate: Callable[[str, Parts, Any], Accelerated],
        check: Callable[[str, Any], None],
    ) -> None:
        self._model, self._parts, self._accelerate, self._check = model, parts, accelerate, check

    @property
    def kind(self) -> str:
        """The kind in force: "none", "cuda-graph", "compile", "tensorrt" or "onnxruntime"."""
        return self._model.acceleration[0]

    @computing
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
        kind = acceleration.resolve(kind, self._model.device)
        checked = acceleration.check_options(kind, self._model.device, options)
        self._check(kind, checked)
        self.put_back()
        self._model.acceleration = kind, checked
        self.rebuild()

    @computing
    def rebuild(self) -> None:
        """Accelerate what is there now, as requested, once shapes are known."""
        model = self._model
        kind, options = model.acceleration
        parts = None if kind == "none" else self._parts()
        if parts is None:
            return
        try:
            accelerated = self._accelerate(kind, parts, options)
        except BaseException:
            model.acceleration = "none", None
            raise
        model.use(accelerated)
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in accelerated.seconds.items())
        logger.info("accelerated by %s: %s", kind, times)

    def put_back(self) -> None:
        """Undo what acceleration changed; what was requested stays requested."""
        accelerated = self._model.accelerated
        if accelerated is not None:
            accelerated.undo()
            self._model.use(None)
