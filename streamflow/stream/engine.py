"""What keeps frames in flight: the protocol of engines, and the table of them by the names that adapters use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from streamflow.conditioning.prompt import Prompt, Velocity
from streamflow.flow.guidance import Weight
from streamflow.flow.schedule import Stages
from streamflow.stream.pipeline_calls import PipelineCalls
from streamflow.stream.ring import Done, Group, Loop, Observer, Ring, Settings


class Engine(Protocol):
    """Takes groups of F frames in and gives them back drawn, oldest first.

    settings: what shapes the frames in flight. weight: the guidance weight of all rows. first_sigma: the noise level at
    which frames enter, `[1, 1, ...]`. observer: sees every step, and answers with the latents to go on with.
    """

    settings: Settings
    weight: Weight
    first_sigma: Tensor
    observer: Observer | None

    @property
    def in_flight(self) -> int:
        """How many frames are under way, copies not counted."""

    @property
    def groups_in_flight(self) -> int:
        """How many groups are under way, copies too."""

    @property
    def empty(self) -> bool:
        """Whether no frame is in flight."""

    @property
    def leaving(self) -> tuple[Done, ...]:
        """The group that the last push has let out, if it did."""

    def holds(self, group: Group) -> bool:
        """Whether this very group is under way."""

    def push(self, group: Group, network: Velocity) -> Done | None:
        """Take a group in, advance all frames, and return the oldest group if it is done."""

    def drain(self, network: Velocity) -> Iterator[Done]:
        """Run what is in flight to its end, one group after another, oldest first."""

    def reset(self) -> None:
        """Drop what is in flight."""

    def set_levels(self, stages: Stages) -> None:
        """Change the noise levels, as many as before, of all rows."""

    def set_prompt(self, prompt: Prompt, names: frozenset[str]) -> None:
        """Give all rows under way the tensors of these names from this prompt."""


def _ring(adapter: Any, settings: Settings, weight: Weight, batched: bool) -> Engine:
    return (Ring if batched else Loop)(settings, weight)


def _pipeline_calls(adapter: Any, settings: Settings, weight: Weight, batched: bool) -> Engine:
    return PipelineCalls(adapter, settings, to_the_end=not batched)


ENGINES: dict[str, Callable[[Any, Settings, Weight, bool], Engine]] = {"ring": _ring, "pipeline_calls": _pipeline_calls}


def make_engine(adapter: Any, settings: Settings, weight: Weight, batched: bool) -> Engine:
    """The engine that an adapter names. batched: frames at different steps share calls of the network; without it each
    group runs to its end by itself. ValueError for an unknown name, with those known."""
    if adapter.engine not in ENGINES:
        known = ", ".join(ENGINES)
        raise ValueError(f"unknown engine {adapter.engine!r} of {type(adapter).__name__}: choose one of {known}")
    return ENGINES[adapter.engine](adapter, settings, weight, batched)
