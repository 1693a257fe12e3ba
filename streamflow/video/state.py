"""Where a video stands. A stream goes on by one assignment of an immutable state, so that it is never between two chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from streamflow.models.video import Drawn, History, VideoAdapter, VideoPlan
from streamflow.video.chunks import VideoFrame

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Request:
    """What the next chunk is drawn with. seed: None where a generator was given without one. seeded: the number of the
    update that has set the seed, 0 for `prepare`. updates: how many there were."""

    plan: VideoPlan
    seed: int | None
    seeded: int = 0
    updates: int = 0


@dataclass(frozen=True, eq=False)
class Position:
    """What the next chunk is drawn from. rng: the state of the generator. seeded: as in the last chunk's request."""

    history: History
    rng: Tensor
    seeded: int = 0


@dataclass(frozen=True, eq=False)
class Decoded:
    """The images of a chunk, or of one latent frame of it, as they are given; None for latents. memory: what the VAE keeps
    for what follows. seconds: of host time that it took."""

    images: Any
    memory: Any
    seconds: float


@dataclass(frozen=True, eq=False)
class Begun:
    """A chunk that is drawn. left: from where the next one is drawn. seconds: of host time that drawing took. frame: the
    latent frame that is decoded next, where they are decoded one by one. images: how many images those before it have.
    fetch: waits until the chunk or this frame is decoded, once that has been begun."""

    drawn: Drawn
    left: Position
    seconds: float
    frame: int | None = None
    images: int = 0
    fetch: Callable[[], Decoded] | None = None


@dataclass(frozen=True, eq=False)
class State:
    """position: after the last chunk that was finished. images: how many images all of them have. ahead: the chunk after
    it, where it is drawn already. failed: why the chunk after it could not be drawn. frames: those that are decoded and were
    not given. early: how many images of the chunk after it were put among `frames`, where it is decoded frame by frame.
    start: another object after each `prepare` and `reset`."""

    position: Position
    images: int = 0
    ahead: Begun | None = None
    failed: Exception | None = None
    frames: tuple[VideoFrame, ...] = ()
    early: int = 0
    start: object = field(default_factory=object)


@dataclass(eq=False)
class Video:
    """What is drawn since a call of `prepare`. begin: the generator's state before the first chunk. request: replaced by
    updates. state: replaced by the thread that draws."""

    adapter: VideoAdapter
    generator: torch.Generator
    begin: Tensor
    request: Request
    state: State

    @property
    def chunks(self) -> int:
        """How many chunks are drawn."""
        ahead = self.state.ahead
        return (self.state.position if ahead is None else ahead.left).history.chunks

    @property
    def most(self) -> int | None:
        """How many chunks can be drawn; None: without end."""
        return self.adapter.length(self.request.plan)

    @property
    def has_more(self) -> bool:
        """Whether another chunk can be drawn."""
        return self.most is None or self.chunks < self.most

    def log_dropped(self) -> None:
        """Log what is drawn and will not be given."""
        state, following = self.state, self.state.position.history.chunks
        if state.frames:
            logger.info("%d frames of the last chunk are dropped", len(state.frames))
        if state.early:
            logger.info("chunk %d, of which %d images are decoded, is dropped", following, state.early)
        elif state.ahead is not None:
            logger.info("chunk %d, which was drawn ahead, is dropped", following)

    def first_state(self) -> State:
        """Before the first chunk, with what is set now."""
        seed, generator = self.request.seed, self.generator
        rng = self.begin if seed is None else generator.manual_seed(seed).get_state()
        return State(Position(History(), rng, self.request.seeded))
