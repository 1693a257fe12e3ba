"""The table of engines, which keep frames in flight, by the names that adapters use."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from streamflow.flow.guidance import Weight
from streamflow.models.adapter import FlowAdapter
from streamflow.stream.pipeline_calls import Caller, PipelineCalls
from streamflow.stream.ring import Engine, Loop, Ring, Settings


def _ring(adapter: FlowAdapter, settings: Settings, weight: Weight, batched: bool) -> Engine:
    return Ring(settings, weight) if batched else Loop(settings, weight)


def _pipeline_calls(adapter: FlowAdapter, settings: Settings, weight: Weight, batched: bool) -> Engine:
    return PipelineCalls(cast(Caller, adapter), settings, to_the_end=not batched)


ENGINES: dict[str, Callable[[FlowAdapter, Settings, Weight, bool], Engine]] = {
    "ring": _ring,
    "pipeline_calls": _pipeline_calls,
}


def make_engine(adapter: FlowAdapter, settings: Settings, weight: Weight, batched: bool) -> Engine:
    """The engine that an adapter names. batched: frames at different steps share calls of the network; without it each
    group runs to its end by itself. ValueError for an unknown name, with the known names."""
    if adapter.engine not in ENGINES:
        known = ", ".join(ENGINES)
        raise ValueError(f"unknown engine {adapter.engine!r} of {type(adapter).__name__}: choose one of {known}")
    return ENGINES[adapter.engine](adapter, settings, weight, batched)
