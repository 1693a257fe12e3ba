"""Makes the modules of a model faster without changing their code: modules in, modules out. No file here knows a family.

`accelerate` takes the three modules of a model (`Part`: velocity, decoder, encoder) and returns three that compute the same,
with a function that undoes all changes. `KINDS` is the table of ways. Each is one file, which is imported on first use.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from streamflow.models.adapter import FlowAdapter
    from streamflow.models.codec import Codec
    from streamflow.models.protocols import Arguments


@dataclass(frozen=True, eq=False)
class Part:
    """A module and its example inputs.

    name: "velocity", "decoder" or "encoder".
    inputs: arguments by name, in the shapes, dtypes and on the device of the stream; the batch is the first dimension.
    positional: how many of them, from the first, are passed by position.
    shared: the names of inputs without a batch dimension.
    free_size: the last two dimensions of the first input are a height and a width that may change.
    exportable: the module takes and returns tensors only.
    capturable: the module does not synchronise with its device, so that a CUDA graph can capture it.
    compilable: torch.compile takes seconds for it, and not minutes.
    compiled: makes, of a module like this one, the same with a part compiled by the function that it is given; None: the
        module is compiled whole or by its repeated blocks.
    blocks: the repeated blocks of a module that takes more than tensors and is called in several shapes. They alone are
        compiled.
    breaks: graph breaks are allowed in these blocks, whatever `fullgraph` says.
    warm_up: calls the function that it is given, in the place of the module, in all its shapes, and returns a tensor. None:
        the module is called once, with `inputs`.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    positional: int = 1
    shared: frozenset[str] = frozenset()
    free_size: bool = False
    exportable: bool = True
    capturable: bool = True
    compilable: bool = True
    compiled: Callable[[Any, Callable[[nn.Module], nn.Module]], nn.Module] | None = None
    blocks: Sequence[nn.Module] = ()
    breaks: bool = False
    warm_up: Callable[[Callable[..., Any]], Tensor] | None = None

    @torch.no_grad()
    def call(self, module: nn.Module | None = None) -> Tensor:
        """The output of the module, or of another one in its place, for `inputs`; or what `warm_up` returns for it."""
        if self.warm_up is not None:
            return self.warm_up(self.module if module is None else module)
        values = list(self.inputs.values())[: self.positional]
        return (self.module if module is None else module)(*values, **dict(list(self.inputs.items())[self.positional :]))


@dataclass(frozen=True, eq=False)
class Parts:
    """The three modules of a model. names: of those that are accelerated, which are what iteration gives."""

    velocity: Part
    decoder: Part
    encoder: Part
    names: tuple[str, ...] = ("velocity", "decoder", "encoder")

    @classmethod
    def of(cls, adapter: FlowAdapter, codec: Codec, inputs: Mapping[str, Tensor], latents: Tensor, images: Tensor) -> Parts:
        """The parts of an adapter and a codec (`streamflow.models`).

        inputs: of the velocity, x and t first. latents: `[F, ...]`, of the decoder. images: `[F, 3, height, width]`, of the
            encoder.
        """
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
        unpacked = latents.dim() == 4  # packed latents have no height and width
        decoder = Part("decoder", codec.decoder, {"latents": latents}, free_size=unpacked)
        return cls(velocity, decoder, Part("encoder", codec.encoder, {"images": images}, free_size=unpacked))

    def __iter__(self) -> Iterator[Part]:
        return (getattr(self, name) for name in self.names)


def bind_arguments(
    names: Iterable[str], positional: tuple[Tensor, ...], keyword: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """The arguments of a call by name. Those that are None count as not passed."""
    arguments = {**dict(zip(names, positional, strict=False)), **keyword}
    return {name: value for name, value in arguments.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Accelerated:
    """The result of `accelerate`.

    modules: by the name of the part, to call in place of its own module.
    undo: restores the parts' own modules to their earlier state.
    seconds: how long each part took to start.
    """

    modules: Mapping[str, nn.Module]
    undo: Callable[[], None] = lambda: None
    seconds: Mapping[str, float] = field(default_factory=dict)


KINDS = {
    "cuda-graph": "streamflow.acceleration.cuda_graph",
    "compile": "streamflow.acceleration.compile",
    "tensorrt": "streamflow.acceleration.tensorrt",
    "onnxruntime": "streamflow.acceleration.onnxruntime",
    "openvino": "streamflow.acceleration.openvino",
    "max": "streamflow.acceleration.preset",
}


def resolve(kind: str, device: torch.device) -> str:
    """The kind that "auto" means on this device, or the given kind. ValueError, with all kinds, if it is unknown."""
    if kind == "auto":
        return "compile" if device.type == "cuda" else "none"
    if kind != "none" and kind not in tuple(KINDS):  # a list, which has no hash, is unknown too
        raise ValueError(f"unknown acceleration {kind!r}: choose one of none, auto, {', '.join(KINDS)}")
    return kind


def check_options(kind: str, device: torch.device, options: Arguments) -> object:
    """The frozen `Options` of a kind. TypeError, with the known names, for an option that the kind does not have."""
    if kind == "none":
        if options:
            raise TypeError(f"accelerate('none') takes no options, and got {', '.join(options)}")
        return None
    module = import_module(KINDS[kind])
    known = [f.name for f in dataclasses.fields(module.Options)]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"accelerate({kind!r}) has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return module.Options(**options).for_device(device)


def accelerate(kind: str, parts: Parts, options: object) -> Accelerated:
    """Accelerate the parts by a resolved kind, other than "max", with its checked options. Velocity and decoder are called
    once for warm-up. The encoder is not, since a stream without input images never calls it."""
    if kind == "none":
        return Accelerated({part.name: part.module for part in parts})
    made = beside(parts, import_module(KINDS[kind]).accelerate(parts, options))
    seconds = dict(made.seconds)
    try:
        for part in parts:
            if part.name == "encoder":
                continue
            took = first_call(part, partial(part.call, made.modules[part.name]))
            seconds[part.name] = seconds.get(part.name, 0.0) + took
    except BaseException:
        made.undo()
        raise
    return dataclasses.replace(made, seconds=seconds)


def beside(parts: Parts, made: Accelerated) -> Accelerated:
    """On a GPU with the accelerated encoder on a side stream (`side_streams.Beside`), where it is on one device."""
    from streamflow.acceleration.side_streams import Beside

    device = next(iter(parts.encoder.inputs.values())).device
    if device.type != "cuda" or "encoder" not in made.modules:
        return made
    return dataclasses.replace(made, modules={**made.modules, "encoder": Beside(made.modules["encoder"], device)})


def first_call(part: Part, call: Callable[[], object]) -> float:
    """Run `call`, the first call of a part. Returns the seconds until its device has finished."""
    began = time.perf_counter()
    call()
    if (device := next(iter(part.inputs.values())).device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
