"""What keeps frames in flight: the protocol of engines, and the table of engines by the names that adapters use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from streamflow.conditioning.prompt import Prompt
from streamflow.flow.guidance import Weight
from streamflow.flow.schedule import Stages
from streamflow.models.adapter import FlowAdapter
from streamflow.stream.pipeline_calls import PipelineCalls
from streamflow.stream.ring import Done, Group, Loop, Observer, Ring, Settings

Network = Callable[..., Any]  # `Model.velocity`, which an engine calls as its adapter defines


class Engine(Protocol):
    """Takes groups of F frames and returns them drawn, oldest first.

    settings: what shapes the frames in flight. weight: the guidance weight of all rows. first_sigma: the noise level at
    which frames enter, `[1, 1, ...]`. observer: sees every step, and returns the latents to go on with.
    """

    settings: Settings
    weight: Weight
    first_sigma: Tensor
    observer: Observer | None

    @property
    def row_counts(self) -> tuple[int, int]:
        """(rows that a call of the network advances, rows of the negative prompt in that call)."""
        ...

    @property
    def in_flight(self) -> int:
        """The number of frames in flight, without copies."""
        ...

    @property
    def groups_in_flight(self) -> int:
        """The number of groups in flight, with copies."""
        ...

    @property
    def empty(self) -> bool:
        """Whether no frame is in flight."""
        ...

    @property
    def leaving(self) -> tuple[Done, ...]:
        """The group that the last push returned, or none. Read where an observer raised after the step."""
        ...

    def holds(self, group: Group) -> bool:
        """Whether this group is in flight."""
        ...

    def push(self, group: Group, network: Network) -> Done | None:
        """Take a group, advance all frames, and return the oldest group if it is done."""
        ...

    def drain(self, network: Network) -> Iterator[Done]:
        """Run the frames in flight to their end, one group after another, oldest first."""
        ...

    def reset(self) -> None:
        """Drop the frames in flight."""
        ...

    def set_levels(self, stages: Stages) -> None:
        """Change the noise levels of all rows. The number of stages stays."""
        ...

    def set_prompt(self, prompt: Prompt, names: frozenset[str]) -> None:
        """Give all rows in flight the tensors of these names from this prompt."""
        ...


def _ring(adapter: FlowAdapter, settings: Settings, weight: Weight, batched: bool) -> Engine:
    return Ring(settings, weight) if batched else Loop(settings, weight)


def _pipeline_calls(adapter: Any, settings: Settings, weight: Weight, batched: bool) -> Engine:
    return PipelineCalls(adapter, settings, to_the_end=not batched)


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
