"""Ways to make a model faster from outside: module in, module out. No file here knows a family or a stream.

`accelerate` takes the three modules of a model (`Part`: velocity, decoder, encoder) and gives back three that compute the
same, and how to undo what was done. The kinds are a table; each is one file, imported when it is asked for.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Part:
    """A module and what it is called with.

    name: "velocity", "decoder" or "encoder".
    inputs: arguments by name, in the shapes, dtypes and on the device of the stream; the batch is the first dimension.
    positional: how many of them, from the first, are passed by position.
    shared: the names of inputs without a batch dimension.
    free_size: the last two dimensions of the first input are a height and a width that may change.
    exportable: the module takes and gives tensors only.
    capturable: the module never waits for its device, so that a CUDA graph can hold it.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    positional: int = 1
    shared: frozenset[str] = frozenset()
    free_size: bool = False
    exportable: bool = True
    capturable: bool = True

    @torch.no_grad()
    def call(self, module: nn.Module | None = None) -> Tensor:
        """What the module, or another one in its place, gives for `inputs`."""
        values = list(self.inputs.values())[: self.positional]
        return (self.module if module is None else module)(*values, **dict(list(self.inputs.items())[self.positional :]))


@dataclass(frozen=True, eq=False)
class Parts:
    """A model: all that is accelerated."""

    velocity: Part
    decoder: Part
    encoder: Part

    @classmethod
    def of(cls, adapter: Any, codec: Any, inputs: Mapping[str, Tensor], latents: Tensor, pictures: Tensor) -> Parts:
        """Those of a family's adapter and of a codec (`streamflow.models`). inputs: the velocity's, x and t first. latents
        `[F, ...]` go into the decoder, pictures `[F, 3, height, width]` into the encoder."""
        velocity = Part(
            "velocity",
            adapter.velocity,
            inputs,
            positional=2,
            shared=frozenset(adapter.shared_inputs),
            free_size=adapter.free_size,
            exportable=adapter.exportable,
            capturable=adapter.capturable,
        )
        maps = latents.dim() == 4  # packed latents have lost their height and width
        decoder = Part("decoder", codec.decoder, {"latents": latents}, free_size=maps)
        return cls(velocity, decoder, Part("encoder", codec.encoder, {"images": pictures}, free_size=maps))

    def __iter__(self) -> Iterator[Part]:
        return iter((self.velocity, self.decoder, self.encoder))


def _nothing() -> None:
    """There is nothing to undo."""


def run_backwards(undo: list[Callable[[], None]]) -> None:
    """Undo the last first; each once."""
    while undo:
        undo.pop()()


@dataclass(frozen=True, eq=False)
class Accelerated:
    """The modules to call in place of the parts', ready to run, and `undo`, which leaves the parts' own as they were."""

    modules: Mapping[str, nn.Module]
    undo: Callable[[], None] = _nothing
    seconds: Mapping[str, float] = field(default_factory=dict)


KINDS = {
    "cuda-graph": "streamflow.acceleration.cuda_graph",
    "compile": "streamflow.acceleration.compile",
    "tensorrt": "streamflow.acceleration.tensorrt",
    "onnxruntime": "streamflow.acceleration.onnxruntime",
}


def resolve(kind: str, device: torch.device) -> str:
    """The kind that "auto" stands for on this device; any other known kind as it is. ValueError lists the known."""
    if kind == "auto":
        return "compile" if device.type == "cuda" else "none"
    if kind != "none" and kind not in KINDS:
        raise ValueError(f"unknown acceleration {kind!r}: choose one of none, auto, {', '.join(KINDS)}")
    return kind


def check_options(kind: str, device: torch.device, options: Mapping[str, Any]) -> Any:
    """The kind's frozen `Options`, made of these; TypeError names those it does not have, and lists its own."""
    if kind == "none":
        if options:
            raise TypeError(f"accelerate('none') takes no options, and got {', '.join(options)}")
        return None
    module = import_module(KINDS[kind])
    known = [f.name for f in dataclasses.fields(module.Options)]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"accelerate({kind!r}) has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return module.Options(**options).for_device(device)


def accelerate(kind: str, parts: Parts, options: Any) -> Accelerated:
    """The parts by this kind (resolved) with its checked options. Velocity and decoder are run once, so that the next call
    is quick; the encoder starts with the first picture that goes in, since a stream of text alone never needs it."""
    if kind == "none":
        return Accelerated({part.name: part.module for part in parts})
    made = import_module(KINDS[kind]).accelerate(parts, options)
    seconds = dict(made.seconds)
    try:
        for part in (parts.velocity, parts.decoder):
            took = first_call(part, partial(part.call, made.modules[part.name]))
            seconds[part.name] = seconds.get(part.name, 0.0) + took
    except BaseException:
        made.undo()
        raise
    return dataclasses.replace(made, seconds=seconds)


def first_call(part: Part, call: Callable[[], Any]) -> float:
    """Run a part for the first time, by `call`; seconds until its device is done."""
    began = time.perf_counter()
    call()
    if (device := next(iter(part.inputs.values())).device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
