"""What `prepare` and `update` are given, checked and with its texts encoded. Knows no chunks, and no threads that draw."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from streamflow._validation import is_whole_number
from streamflow.flow.noise import resolve_seeds
from streamflow.models import video_adapter_for
from streamflow.models.tiny_video import TinyVideoDecoder
from streamflow.models.video import History, VideoAdapter, VideoPlan
from streamflow.video.state import Position, Request, State, Video

SCOPES = ("now", "frame")
DEFAULT_SEED = 2


class Requests:
    """Makes what is drawn of what a user gives. tiny: decodes in the place of the pipe's VAE, or None.

    encoding: held while the pipeline encodes texts, shared by streams of one pipe. network: the only one that the pipe may
    have; None: any.
    """

    def __init__(self, encoding: threading.Lock | None = None, network: nn.Module | None = None) -> None:
        self.tiny: TinyVideoDecoder | None = None
        self._encoding = encoding or threading.Lock()
        self._network = network

    def first(self, pipe: Any, given: Mapping[str, Any], seed: int | None, generator: torch.Generator | None) -> Video:
        """A video that begins. Raises as `VideoStream.prepare`."""
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is one torch.Generator, not {type(generator).__name__}")
        seed = _resolved(DEFAULT_SEED if seed is None and generator is None else seed)
        adapter = video_adapter_for(pipe)
        if self.tiny is not None:
            adapter.use_tiny_vae(self.tiny)
        plan = self._plan(adapter, given)
        own = torch.Generator(adapter.device if generator is None else generator.device)
        if generator is not None:
            own.set_state(generator.get_state())
        if seed is not None:
            own.manual_seed(seed)
        rng = own.get_state()
        return Video(adapter, own, rng, Request(plan, seed), State(Position(History(), rng)))

    def changed(self, video: Video, scope: str, seed: int | None, arguments: Mapping[str, Any]) -> Request:
        """The request of a video after an update. Raises as `VideoStream.update`."""
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}: choose one of {', '.join(map(repr, SCOPES))}")
        seed, last = _resolved(seed), video.request
        changeable = video.adapter.changeable & video.adapter.parameters.keys()
        for name in arguments:
            if name not in changeable:
                others = ", ".join(sorted(changeable))
                raise ValueError(f"{name} cannot change from chunk to chunk: call prepare() anew. These can: {others}")
        given = {name: value for name, value in last.plan.given.items() if name not in _replaced(arguments)}
        plan = self._plan(video.adapter, {**given, **arguments}, last.plan)
        number = last.updates + 1
        if seed is None:
            return Request(plan, last.seed, last.seeded, number)
        return Request(plan, seed, number, number)

    def _plan(self, adapter: VideoAdapter, given: Mapping[str, Any], last: VideoPlan | None = None) -> VideoPlan:
        if self._network is not None and adapter.network.plain is not self._network:
            raise RuntimeError("all viewers have one network, and this viewer's pipe has another: make viewers of that pipe")
        with self._encoding:
            return adapter.plan(given, last)


def _resolved(seed: object) -> int | None:
    """A seed as an integer, -1 as a random one. TypeError for anything else."""
    if seed is not None and not is_whole_number(seed):
        raise TypeError(f"seed must be an integer, not {seed!r}")
    return resolve_seeds(seed)


def _replaced(arguments: Mapping[str, Any]) -> set[str]:
    """The arguments that are left out once these are given: a text replaces its embeddings, and the other way round."""
    pairs = {"prompt": "prompt_embeds", "negative_prompt": "negative_prompt_embeds"}
    pairs |= {embeds: text for text, embeds in pairs.items()}
    return {pairs[name] for name in arguments if name in pairs}
