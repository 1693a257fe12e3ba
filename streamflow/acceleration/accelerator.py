"""The acceleration that is requested for a set of parts, and the one in force. It handles parts and kinds, not families or
streams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch

from streamflow import acceleration
from streamflow._grad_mode import computing
from streamflow.acceleration import Accelerated, Parts, preset

logger = logging.getLogger(__name__)


class Model(Protocol):
    """A model that can be accelerated. acceleration: the kind that is requested, and its checked options. accelerated: the
    modules in force, None for the plain ones."""

    device: torch.device
    acceleration: tuple[str, object]
    accelerated: Accelerated | None

    def use(self, accelerated: Accelerated | None) -> None:
        """Draw with these modules, or with the plain ones."""
        ...


class Accelerator:
    """Accelerates the parts of a model, and accelerates them again after they have been replaced.

    parts: returns the model's plain modules with their inputs, or None before their shapes are known. accelerate:
    `acceleration.accelerate`, or a function like it. check: raises an error where a kind with its options is not possible.
    ticks: draws with the modules in force (`preset.Ticks`). measured: what the last `accelerate("max")` has measured.
    """

    measured: tuple[preset.Measured, ...] = ()

    def __init__(
        self,
        model: Model,
        parts: Callable[[], Parts | None],
        accelerate: Callable[[str, Parts, object], Accelerated],
        check: Callable[[str, object], None],
        ticks: preset.Ticks,
    ) -> None:
        self._model, self._parts, self._accelerate, self._check, self._ticks = model, parts, accelerate, check, ticks

    @property
    def kind(self) -> str:
        """The kind in force: "none", "cuda-graph", "compile", "tensorrt", "onnxruntime" or "openvino". "max" before
        `prepare`."""
        return self._model.acceleration[0]

    @computing
    def accelerate(self, kind: str = "auto", **options: object) -> None:
        """Make the network and the VAE faster; the images stay the same within the kind's bound.

        kind: "none" undoes all; "cuda-graph" replays recorded launches; "compile" is torch.compile, with a CUDA graph on
            top on CUDA; "tensorrt" builds engines; "onnxruntime" and "openvino" are for a CPU; "auto" is "compile" on
            CUDA, else "none"; "max" measures which of these (without TensorRT) is fastest for this model, and takes
            minutes to start.
        options: those of the kind, the fields of `streamflow.acceleration.<kind>.Options`.

        Called before `prepare`, it takes effect there, since shapes are known only then. How long each part took to start
        is logged. What "max" measured, chose and left out is logged and in `measured`. Its choice stays in force, also for
        later shapes and parts, until the next call.

        Raises:
            ValueError, TypeError: an unknown kind or option. RuntimeError: this device cannot do it. Whatever compilation
            raises; then the stream is not accelerated.
        """
        kind = acceleration.resolve(kind, self._model.device)
        checked = acceleration.check_options(kind, self._model.device, options)
        self._check(kind, checked)
        self._check_plain(checked)
        self.put_back()
        self._model.acceleration = kind, checked
        self.rebuild()

    @computing
    def rebuild(self) -> None:
        """Accelerate the present parts by the requested kind. Does nothing before their shapes are known."""
        model = self._model
        kind, options = model.acceleration
        parts = None if kind == "none" else self._parts()
        if parts is None:
            return
        try:
            if isinstance(options, preset.Options):
                kind, options = model.acceleration = self._choose(parts, options)
                if kind == "none":
                    return
            accelerated = self._accelerate(kind, parts, options)
        except BaseException:
            model.acceleration = "none", None
            raise
        model.use(accelerated)
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in accelerated.seconds.items())
        logger.info("accelerated by %s: %s", kind, times)

    def _choose(self, parts: Parts, options: preset.Options) -> tuple[str, object]:
        """The fastest kind, with its checked options, that `preset` finds."""
        device = self._model.device

        @contextmanager
        def trial(kind: str, given: Mapping[str, object]) -> Iterator[None]:
            checked = acceleration.check_options(kind, device, given)
            self._check(kind, checked)
            if kind != "none":
                self._model.use(self._accelerate(kind, parts, checked))
            try:
                yield
            finally:
                self.put_back()

        found = preset.measure(options, device, trial, self._ticks)
        self.measured, chosen = tuple(found), preset.fastest(found)
        assert chosen is not None, "the plain model is measured"
        logger.info("%s", preset.summary(found, chosen))
        return chosen.kind, acceleration.check_options(chosen.kind, device, chosen.options)

    def _check_plain(self, options: object) -> None:
        """RuntimeError where the plain weights are needed and were not kept."""
        before = self._model.acceleration[1] if self._model.accelerated is not None else None
        if getattr(before, "keep_plain", True) or (_quantization(options) == _quantization(before)):
            return
        kind = getattr(before, "quantize", None)
        raise RuntimeError(
            f"the weights were quantised to {kind} without keeping the plain ones (keep_plain=False), so they cannot be put "
            f"back: load the pipe again, or keep quantize={kind!r}, keep_plain=False among the options"
        )

    def put_back(self) -> None:
        """Undo the acceleration. The kind stays requested, for `rebuild`."""
        accelerated = self._model.accelerated
        if accelerated is not None:
            accelerated.undo()
            self._model.use(None)


def _quantization(options: object) -> tuple[object, object]:
    return getattr(options, "quantize", None), getattr(options, "keep_plain", None)
