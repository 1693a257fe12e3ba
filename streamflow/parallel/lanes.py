"""Running the jobs of one device on CUDA streams of their own, so that the caller's streams never wait for them.

torch copies between two GPUs on the current stream of the source, and makes the current streams of both GPUs wait for each
other. So a lane has a side stream on every GPU that a job uses, and makes them current before it copies.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from streamflow.acceleration.side_streams import side_stream
from streamflow.parallel.trees import list_tensors, map_tensors

T = TypeVar("T")

Events = Mapping[torch.device, torch.Event]


def current_events(value: object) -> dict[torch.device, torch.Event]:
    """For each GPU with one of these tensors, an event recorded on its current stream. Empty on a CPU."""
    devices = {t.device for t in list_tensors(value) if t.is_cuda}
    return {device: torch.cuda.current_stream(device).record_event() for device in devices}


def on_current_streams(value: T, events: Events) -> T:
    """The result of a lane, safe to use on the caller's current streams. The host does not wait."""
    for device, event in events.items():
        torch.cuda.current_stream(device).wait_event(event)
    for tensor in list_tensors(value) if events else ():
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return value


class Lane:
    """Runs calls on one device, of which at most `depth` are unfinished there, and measures their time."""

    def __init__(self, device: torch.device, depth: int):
        self.device, self.depth = device, depth
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._unfinished: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()
        self._seconds: deque[float] = deque(maxlen=9)

    @property
    def seconds_per_row(self) -> float | None:
        """The median seconds per row of the last jobs; None before the first one has ended."""
        return median(self._seconds) if self._seconds else None

    @torch.no_grad()
    def run(
        self, call: Callable[..., T], args: tuple, kwargs: Mapping, rows: int, ready: Events, target: torch.device | None
    ) -> tuple[T, Events]:
        """(the result of the call on this device, copied to `target` if there is one; the events after which it is
        complete). ready: the events after which the arguments are complete."""
        self._make_room()
        touched = {*ready, self.device, target or self.device}
        with ExitStack() as stack:
            for device in sorted((d for d in touched if d.type == "cuda"), key=lambda d: d == self.device):
                stack.enter_context(torch.cuda.stream(self._stream(device)))
            for device, event in ready.items():
                self._stream(device).wait_event(event)
            args, kwargs = map_tensors(self._fetch, args), map_tensors(self._fetch, dict(kwargs))
            with self._timed(rows):
                value = call(*args, **kwargs)
            if target is not None:
                # A copy to the host blocks until it is complete. It is this lane's thread that waits.
                value = map_tensors(lambda t: t.to(target, non_blocking=target.type == "cuda"), value)
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

    @contextmanager
    def _timed(self, rows: int) -> Iterator[None]:
        """Measure the time of the block, of so many rows: on the GPU by events, else on the host."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            yield
            self._seconds.append((time.perf_counter() - began) / rows)
            return
        stream = self._stream(self.device)
        started, ended = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        started.record(stream)
        yield
        ended.record(stream)
        self._unfinished.append((started, ended, rows))

    def _make_room(self) -> None:
        """Wait until fewer than `depth` jobs are unfinished on the GPU."""
        while self._unfinished and (len(self._unfinished) >= self.depth or self._unfinished[0][1].query()):
            started, ended, rows = self._unfinished.popleft()
            ended.synchronize()
            self._seconds.append(started.elapsed_time(ended) / 1000 / rows)
