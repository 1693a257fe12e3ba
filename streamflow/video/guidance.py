"""Guidance on two devices: a network that is called twice in a step, under the prompt and under the negative one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from streamflow.models.video import VideoAdapter, VideoPlan


class PairedCalls:
    """In the place of a network: two calls that follow each other are made as one with the rows of both.

    The first call returns a tensor that is filled in the second one. The pipelines read it after that. network: takes
    arguments by name, `hidden_states` of one row first, and returns a tuple of the output.
    """

    def __init__(self, network: Callable[..., Any], adapter: VideoAdapter) -> None:
        self._network, self._adapter = network, adapter
        self._paired = False
        self._first: tuple[dict[str, Any], Tensor] | None = None

    @contextmanager
    def inside(self, plan: VideoPlan) -> Iterator[None]:
        """Around a chunk of this plan: pair its calls where it is guided."""
        scale = plan.call.get("guidance_scale", self._adapter.parameters["guidance_scale"].default)
        self._paired, self._first = scale > 1, None
        try:
            yield
        finally:
            self._paired, self._first = False, None

    def __call__(self, **given: Any) -> Any:
        """The output for these rows, which for the first of two calls is filled later."""
        if not self._paired:
            return self._network(**given)
        if self._first is None:
            self._first = given, torch.empty_like(given["hidden_states"])
            return (self._first[1],)
        (first, output), self._first = self._first, None
        if any(isinstance(one, Tensor) and one.shape != first[name].shape for name, one in given.items()):
            output.copy_(self._network(**first)[0])  # prompts of two lengths are no batch
            return self._network(**given)
        both = {name: torch.cat([first[name], one]) if isinstance(one, Tensor) else one for name, one in given.items()}
        filled, own = self._network(**both)[0].split(len(output))
        output.copy_(filled)
        return (own,)
