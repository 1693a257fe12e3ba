"""One device's side of a job: copies and work on streams of its own, so that the caller's streams never wait for them.

torch copies between two GPUs on the *source's* current stream and makes both devices' current streams wait for each other.
So a lane holds a side stream on every GPU that a job touches, and makes them current before anything is copied.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import Tensor

from streamflow.acceleration.side_streams import side_stream
from streamflow.parallel.trees import mapped, tensors

Events = Mapping[torch.device, torch.cuda.Event]


def caller_events(value: Any) -> dict[torch.device, torch.cuda.Event]:
    """For each GPU that holds one of these tensors, an event behind what its current stream has queued. Empty on a CPU."""
    devices = {t.device for t in tensors(value) if t.is_cuda}
    return {device: torch.cuda.current_stream(device).record_event() for device in devices}


def received(value: Any, events: Events) -> Any:
    """A lane's result, safe to use on the caller's current streams. The host does not wait."""
    for device, event in events.items():
        torch.cuda.current_stream(device).wait_event(event)
    for tensor in tensors(value) if events else ():
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return value


class Lane:
    """Runs calls on one device, at most `depth` of them unfinished there, and notes how long they take."""

    def __init__(self, device: torch.device, depth: int):
        self.device, self.depth = device, depth
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()
        self._seconds: deque[float] = deque(maxlen=9)

    @property
    def seconds_per_row(self) -> float | None:
        """The median of the last jobs' seconds a row; None before any is over."""
        return median(self._seconds) if self._seconds else None

    @torch.no_grad()
    def run(
        self, call: Callable, args: tuple, kwargs: Mapping, rows: int, ready: Events, target: torch.device | None
    ) -> tuple[Any, Events]:
        """(what the call gives for these arguments, copied here and back to `target` if there is one; the events behind
        which it is complete). `ready`: what the arguments wait for."""
        self._make_room()
        touched = {*ready, self.device, target or self.device}
        with ExitStack() as stack:
            for device in sorted((d for d in touched if d.type == "cuda"), key=lambda d: d == self.device):
                stack.enter_context(torch.cuda.stream(self._stream(device)))
            for device, event in ready.items():
                self._stream(device).wait_event(event)
            args, kwargs = mapped(self._fetch, args), mapped(self._fetch, dict(kwargs))
            started = self._mark()
            value = call(*args, **kwargs)
            self._note(started, rows)
            if target is not None:
                # A copy to the host is only over when it says so; the thread that waits for it is the lane's own.
                value = mapped(lambda t: t.to(target, non_blocking=target.type == "cuda"), value)
            home = target or self.device
            return value, {home: self._stream(home).record_event()} if home.type == "cuda" else {}

    def _fetch(self, tensor: Tensor) -> Tensor:
        if tensor.is_cuda:
            tensor.record_stream(self._stream(tensor.device))
            if self.device.type != "cuda":
                return tensor.to(self.device)
        return tensor.to(self.device, non_blocking=True)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = side_stream(self, device)
        return self._streams[device]

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self._stream(self.device))
        return event

    def _note(self, started, rows: int) -> None:
        ended = self._mark()
        if self.device.type == "cuda":
            self._open.append((started, ended, rows))
        else:
            self._seconds.append((ended - started) / rows)

    def _make_room(self) -> None:
        """Wait until fewer than `depth` jobs are unfinished on the GPU."""
        while self._open and (len(self._open) >= self.depth or self._open[0][1].query()):
            started, ended, rows = self._open.popleft()
            ended.synchronize()
            self._seconds.append(started.elapsed_time(ended) / 1000 / rows)
