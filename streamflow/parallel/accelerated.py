"""Acceleration of parts that are on several devices: each copy is accelerated on its device. The threads, and the copies
between devices, are never compiled or captured.

A part is on several devices if its module has `replicas`, `devices`, `inputs_of(index, inputs)` and
`with_replicas(modules)`, as `Sharded` has. Knows parts and kinds of acceleration; no family, no stream.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from streamflow import acceleration
from streamflow.acceleration import KINDS, Accelerated, Part, Parts, first_call

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _SomeParts(Parts):
    """Parts, of which those with these names are accelerated."""

    names: tuple[str, ...] = ()

    def __iter__(self):
        return (part for part in super().__iter__() if part.name in self.names)


class _ShardedModule(Protocol):
    """A module on several devices."""

    replicas: Sequence[nn.Module]
    devices: Sequence[torch.device]

    def inputs_of(self, index: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def with_replicas(self, modules: Sequence[nn.Module]) -> nn.Module: ...


def _is_sharded(module: object) -> TypeGuard[_ShardedModule]:
    return all(hasattr(module, name) for name in ("replicas", "devices", "inputs_of", "with_replicas"))


class _WithThreads(_ShardedModule, Protocol):
    def start(self, index: int, args: Sequence[Tensor]) -> None: ...


def _has_threads(module: object) -> TypeGuard[_WithThreads]:
    return hasattr(module, "start")


def accelerate(kind: str, parts: Parts, options: object) -> Accelerated:
    """As `acceleration.accelerate`, for parts of which some are on several devices."""
    sharded = {part.name: module for part in parts if _is_sharded(module := part.module)}
    if kind == "none" or not sharded:
        return acceleration.accelerate(kind, parts, options)
    modules: dict[str, nn.Module] = {}
    seconds: dict[str, float] = {}
    with ExitStack() as undo:
        single = tuple(part.name for part in parts if part.name not in sharded)
        made = _by_kind(kind, parts, single, options)
        undo.callback(made.undo)
        modules.update(made.modules)
        for part in (one for one in parts if one.name in single and one.name != "encoder"):
            seconds[part.name] = first_call(part, partial(part.call, modules[part.name]))
        for part in (one for one in parts if one.name in sharded):
            module = sharded[part.name]
            modules[part.name] = module.with_replicas(_accelerate_copies(kind, parts, part, module, options, undo))
            if part.name != "encoder":
                seconds[part.name] = first_call(part, partial(_start, modules[part.name], part))
        return Accelerated(modules, undo.pop_all().close, seconds)


def _accelerate_copies(
    kind: str, parts: Parts, part: Part, sharded: _ShardedModule, options: object, undo: ExitStack
) -> list[nn.Module]:
    """The copies of a part, each accelerated on its device. A copy on a device that the kind does not support stays plain,
    which is logged."""
    made: list[nn.Module] = []
    for index, (module, device) in enumerate(zip(sharded.replicas, sharded.devices, strict=True)):
        here = replace(part, module=module, inputs=sharded.inputs_of(index, part.inputs))
        fitting = _for_device(options, device)
        if fitting is None:
            logger.info("%s on %s is not accelerated: %s needs a CUDA device", part.name, device, kind)
            made.append(module)
            continue
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            one = _by_kind(kind, replace(parts, **{part.name: here}), (part.name,), fitting)
        undo.callback(one.undo)
        made.append(one.modules[part.name])
    return made


def _by_kind(kind: str, parts: Parts, names: tuple[str, ...], options: object) -> Accelerated:
    some = _SomeParts(parts.velocity, parts.decoder, parts.encoder, names)
    return import_module(KINDS[kind]).accelerate(some, options)


def _for_device(options: Any, device: torch.device) -> Any:
    """The options for this device, without a CUDA graph on a CPU; None where it does not support the kind."""
    if device.type != "cuda" and getattr(options, "cuda_graph", None):
        options = dataclasses.replace(options, cuda_graph=False)
    try:
        return options.for_device(device)
    except RuntimeError:
        return None


def _start(module: nn.Module, part: Part) -> None:
    """Run every copy once, in the thread of its device where it has one."""
    if not _has_threads(module):
        part.call(module)
        return
    for index in range(len(module.replicas)):
        module.start(index, list(module.inputs_of(index, part.inputs).values()))
