"""Frames with an identity: which output belongs to which input, in which order, and how long it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from streamflow.conditioning.inpaint import Region
from streamflow.conditioning.prompt import Prompt


@dataclass(frozen=True, eq=False)
class Frame:
    """One finished picture. `id` counts the inputs from 0; `image` `[3, H, W]` in [-1, 1]; `latency_s` is host time from
    input to enqueued output; `skipped` says that the similarity filter skipped this input, and the picture is that of
    the frame it resembles."""

    id: int
    image: Tensor
    latency_s: float
    skipped: bool = False
    _event: torch.cuda.Event | None = field(default=None, repr=False)

    def ready(self) -> bool:
        """Whether the device has finished the picture."""
        return self._event is None or self._event.query()

    def wait(self) -> Frame:
        """Wait for the device to finish the picture."""
        if self._event is not None:
            self._event.synchronize()
        return self


@dataclass(frozen=True, eq=False)
class Input:
    """An input of `StreamFlow.frames` that is more than a picture: what `stream(image, ...)` takes, by the same names."""

    image: Any = None
    mask: Any = None
    control: Any = None


@dataclass(frozen=True, eq=False)
class Waiting:
    """A frame that has come in and waits for its group to be full, with what it will enter with."""

    id: int
    picture: Tensor | None
    prompt: Prompt
    region: Region | None


@dataclass(frozen=True)
class _Input:
    id: int
    source: int
    since: float


class Order:
    """Matches pictures with the inputs that wait for them. `expect` in input order, `decoding` in any, `ready` in order."""

    def __init__(self) -> None:
        self._inputs: deque[_Input] = deque()
        self._decoding: deque[tuple[Any, Any]] = deque()
        self._arrived: deque[Any] = deque()  # decoded, and none of their frames given
        self._pictures: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}

    def expect(self, frame_id: int, source: int) -> None:
        """An input came in; its picture will be that of frame `source`, which is itself unless it was skipped."""
        self._inputs.append(_Input(frame_id, source, time.perf_counter()))

    @property
    def undecoded(self) -> list[Any]:
        """The groups whose pictures have not arrived, oldest first."""
        return [group for group, _ in self._decoding]

    @property
    def undelivered(self) -> list[Any]:
        """The groups of which no frame has been given, oldest first."""
        return [*self._arrived, *self.undecoded]

    def decoding(self, group: Any, decoding: Any) -> None:
        """Pictures of a group, of which `ids` are the frames, are under way: `decoding.done()` says when,
        `decoding.result()` waits and gives them, `[>= len(ids), 3, H, W]`; rows beyond the ids are padding."""
        self._decoding.append((group, decoding))

    def ready(self, most: int = 0, copies: bool = False) -> Iterator[Frame]:
        """The frames whose turn it is, waiting only for those beyond `most` that are still under way. A picture is let go
        when no later input can refer to it. `copies`: later inputs may, so that each frame gets a picture of its own."""
        failed = None
        while self._decoding and (len(self._decoding) > most or self._decoding[0][1].done()):
            group, decoding = self._decoding[0]
            try:
                self._arrive(group.ids, decoding.result())
            except BaseException as error:  # after the frames that came before; the group stays undecoded
                failed = error
                break
            self._arrived.append(self._decoding.popleft()[0])
        while self._inputs and self._inputs[0].source in self._pictures:
            waiting = self._inputs.popleft()
            while self._arrived and self._arrived[0].ids[0] <= waiting.id:
                self._arrived.popleft()
            for old in [i for i in self._pictures if i < waiting.source]:
                del self._pictures[old]
            picture, event = self._pictures[waiting.source]
            if copies or waiting.id != waiting.source:
                picture = picture.clone()
                event = _event(picture)
            latency = time.perf_counter() - waiting.since
            yield Frame(waiting.id, picture, latency, waiting.id != waiting.source, event)
        if failed is not None:
            raise failed

    def _arrive(self, ids: tuple[int, ...], pictures: Tensor) -> None:
        event = _event(pictures)
        for frame_id, picture in zip(ids, pictures, strict=False):
            self._pictures[frame_id] = (picture, event)


def _event(pictures: Tensor) -> torch.cuda.Event | None:
    if pictures.device.type != "cuda":
        return None
    return torch.cuda.current_stream(pictures.device).record_event()


class CallTimer:
    """A moving average of a call's seconds, without ever waiting: on CUDA it reads the events of calls that are over."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=8)
        self.average = 0.0

    def __enter__(self) -> CallTimer:
        self._start = self._mark()
        return self

    def __exit__(self, *error: object) -> None:
        end = self._mark()
        if not self._cuda:
            self._add(end - self._start)
            return
        self._open.append((self._start, end))
        while self._open and self._open[0][1].query():
            start, end = self._open.popleft()
            self._add(start.elapsed_time(end) / 1000)

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, seconds: float) -> None:
        self.average = 0.9 * self.average + 0.1 * seconds
