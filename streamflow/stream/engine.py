"""The table of engines, which keep frames in flight, by the names that adapters use."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from streamflow.flow.guidance import Weight
from streamflow.models.adapter import FlowAdapter
from streamflow.stream.interleaved import Interleaved
from streamflow.stream.pipeline_calls import Caller, PipelineCalls
from streamflow.stream.ring import Engine, Loop, Ring, Settings

Devices = tuple[torch.device, ...]


def _ring(adapter: FlowAdapter, settings: Settings, weight: Weight, batched: bool, devices: Devices) -> Engine:
    if devices:
        return Interleaved(settings, weight, batched, devices)
    return Ring(settings, weight) if batched else Loop(settings, weight)


def _pipeline_calls(adapter: FlowAdapter, settings: Settings, weight: Weight, batched: bool, devices: Devices) -> Engine:
    return PipelineCalls(cast(Caller, adapter), settings, to_the_end=not batched)


ENGINES: dict[str, Callable[[FlowAdapter, Settings, Weight, bool, Devices], Engine]] = {
    "ring": _ring,
    "pipeline_calls": _pipeline_calls,
}


def make_engine(adapter: FlowAdapter, settings: Settings, weight: Weight, batched: bool, devices: Devices = ()) -> Engine:
    """The engine that an adapter names. batched: frames at different steps share calls of the network; without it each
    group runs to its end by itself. devices: those of the copies of the network that take groups in turn.

    Raises:
        ValueError: an unknown name, with the known names.
    """
    if adapter.engine not in ENGINES:
        known = ", ".join(ENGINES)
        raise ValueError(f"unknown engine {adapter.engine!r} of {type(adapter).__name__}: choose one of {known}")
    return ENGINES[adapter.engine](adapter, settings, weight, batched, devices)
