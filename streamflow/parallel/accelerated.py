"""Acceleration of parts that are on several devices: each copy is accelerated on its device. The threads, and the copies
between devices, are never compiled or captured. Knows parts and kinds of acceleration; no family, no stream."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from streamflow import acceleration
from streamflow.acceleration import KINDS, Accelerated, Part, Parts, first_call
from streamflow.parallel.in_turn import InterleavedVelocity
from streamflow.parallel.replicas import current
from streamflow.parallel.rows import NetworkCopies
from streamflow.parallel.vae import Sharded

logger = logging.getLogger(__name__)

SHARDED = (Sharded, NetworkCopies)


def accelerate(kind: str, parts: Parts, options: object) -> Accelerated:
    """As `acceleration.accelerate`, for parts of which some are on several devices."""
    sharded = {p.name: p.module for p in parts if isinstance(p.module, SHARDED)}
    if kind == "none" or not sharded:
        return acceleration.accelerate(kind, parts, options)
    seconds: dict[str, float] = {}
    with ExitStack() as undo:
        whole = tuple(part.name for part in parts if part.name not in sharded)
        made = acceleration.beside(parts, _by_kind(kind, parts, whole, options))
        undo.callback(made.undo)
        modules = dict(made.modules)
        for part in parts:
            if module := sharded.get(part.name):
                modules[part.name] = module.with_replicas(_accelerate_copies(kind, parts, part, module, options, undo))
            if part.name != "encoder":
                seconds[part.name] = first_call(part, partial(_start, modules[part.name], part))
        return Accelerated(modules, undo.pop_all().close, seconds)


def _accelerate_copies(
    kind: str, parts: Parts, part: Part, sharded: Sharded | NetworkCopies, options: object, undo: ExitStack
) -> list[nn.Module]:
    """The copies of a part, each accelerated on its device. A copy on a device that the kind does not support stays plain,
    which is logged."""
    made: list[nn.Module] = []
    for index, (module, device) in enumerate(zip(sharded.replicas, sharded.devices, strict=True)):
        here = replace(part, module=module, inputs=sharded.inputs_of(index, part.inputs))
        fitting = _for_device(options, device)
        if fitting is None:
            logger.info("%s on %s is not accelerated: %s needs a CUDA device", part.name, device, kind)
            made.append(here.module)
            continue
        with current(device):
            one = _by_kind(kind, replace(parts, **{part.name: here}), (part.name,), fitting)
        undo.callback(one.undo)
        made.append(one.modules[part.name])
    return made


def _by_kind(kind: str, parts: Parts, names: tuple[str, ...], options: object) -> Accelerated:
    return import_module(KINDS[kind]).accelerate(replace(parts, names=names), options)


def _for_device(options: Any, device: torch.device) -> object:
    """The options for this device, without a CUDA graph on a CPU; None where it does not support the kind."""
    if device.type != "cuda" and getattr(options, "cuda_graph", None):
        options = dataclasses.replace(options, cuda_graph=False)
    try:
        return options.for_device(device)
    except RuntimeError:
        return None


def _start(module: nn.Module, part: Part) -> None:
    """Run every copy once, in the thread of its device where it has one."""
    if isinstance(module, (Sharded, InterleavedVelocity)):
        module.start(part.inputs)
    else:
        part.call(module)
