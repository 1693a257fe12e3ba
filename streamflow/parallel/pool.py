"""Threads, one a device, and the jobs they take. Knows devices and calls; not what a call computes.

A job goes to one device. If that fails it goes to the others, and a device that failed what another could do is dropped. A
job that fails on every device raises, and no device is dropped for it: the job itself may be at fault.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from streamflow._threads import Thread
from streamflow.parallel.lanes import Events, Lane, caller_events, received

logger = logging.getLogger(__name__)


class DecodeError(RuntimeError):
    """A job failed on every device; the message names each device and its cause."""


class Pending:
    """A result on its way. `latency_s`: host seconds from submission to the result, on CUDA to its last launch."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._since = time.perf_counter()
        self._value: Any = None
        self._events: Events = {}
        self._error: Exception | None = None
        self.latency_s: float | None = None

    def done(self) -> bool:
        """Whether the device has finished it, or it has failed. Never waits."""
        return self._over.is_set() and all(event.query() for event in self._events.values())

    def result(self) -> Any:
        """The result, for the caller's current streams. The host waits until it is launched, never for a GPU to finish.

        Raises:
            DecodeError: every device failed.
        """
        self._over.wait()
        if self._error is not None:
            raise self._error
        return received(self._value, self._events)

    def _finish(self, value: Any = None, events: Events | None = None, error: Exception | None = None) -> None:
        self._value, self._events, self._error = value, events or {}, error
        self.latency_s = time.perf_counter() - self._since
        self._over.set()


@dataclass(eq=False)
class _Job:
    calls: Sequence[Callable]  # one a worker
    args: tuple
    kwargs: Mapping[str, Any]
    rows: int
    target: torch.device | None
    ready: Events
    pending: Pending = field(default_factory=Pending)
    causes: dict[int, Exception] = field(default_factory=dict)


@dataclass(eq=False)
class _Worker:
    index: int
    lane: Lane
    wake: threading.Condition
    queue: deque[_Job] = field(default_factory=deque)
    running: bool = False
    alive: bool = True
    cause: str | None = None

    @property
    def name(self) -> str:
        return f"{self.lane.device} (replica {self.index})"


class _State:
    """What the threads share; all of it is touched under `lock` only. Each worker waits for its own condition and callers
    for `room`, so that a job wakes one thread."""

    def __init__(self, devices: Sequence[torch.device], depth: int):
        self.depth = depth
        self.lock = threading.Lock()
        self.room = threading.Condition(self.lock)
        self.closing = False
        self.turn = 0
        self.workers = [_Worker(i, Lane(device, depth), threading.Condition(self.lock)) for i, device in enumerate(devices)]

    def alive(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.alive]

    def wake_all(self) -> None:
        for condition in (self.room, *(worker.wake for worker in self.workers)):
            condition.notify_all()


class Pool:
    """One thread a device, each with a queue of at most `depth` jobs. `close()`, or `with Pool(...)`; a pool that is dropped
    or outlives the interpreter closes itself."""

    def __init__(self, devices: Sequence[torch.device], depth: int = 2):
        self._state = _State(devices, depth)
        names = [f"streamflow-{worker.lane.device}-{worker.index}" for worker in self._state.workers]
        self._threads = [
            Thread(_serve, name, (self._state, worker)) for worker, name in zip(self._state.workers, names, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._state, self._threads)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every worker's device, dropped ones too."""
        return tuple(worker.lane.device for worker in self._state.workers)

    @property
    def alive(self) -> tuple[int, ...]:
        """The numbers of the workers that take jobs."""
        return tuple(worker.index for worker in self._state.alive())

    @property
    def dropped(self) -> dict[str, str]:
        """The devices that were dropped, and why."""
        return {worker.name: worker.cause or "" for worker in self._state.workers if not worker.alive}

    @property
    def queued(self) -> int:
        """How many jobs wait for a device."""
        return sum(len(worker.queue) for worker in self._state.workers)

    @property
    def seconds_per_row(self) -> tuple[float | None, ...]:
        """Each worker's median seconds a row; None before its first job is over."""
        return tuple(worker.lane.seconds_per_row for worker in self._state.workers)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._state.closing

    def submit(
        self,
        calls: Sequence[Callable],
        args: tuple,
        kwargs: Mapping[str, Any] | None = None,
        rows: int = 1,
        target: torch.device | None = None,
        worker: int | None = None,
    ) -> Pending:
        """Queue one job, `calls[worker](*args, **kwargs)`, and return at once; if every queue is full, wait for room.

        worker: which one is to do it; None: the next in turn that has room. target: where the result is to lie; None: where
        it was computed. The arguments must not be written into until the result is there.

        Raises:
            RuntimeError: the pool is closed.
        """
        job = _Job(calls, args, kwargs or {}, rows, target, caller_events((args, dict(kwargs or {}))))
        state = self._state
        with state.lock:
            while not state.closing and (taker := _taker(state, worker)) is None:
                state.room.wait()
            if state.closing:
                raise RuntimeError("these replicas were closed: shard the VAE anew")
            taker.queue.append(job)
            state.turn = taker.index + 1 if worker is None else state.turn
            taker.wake.notify()
        return job.pending

    def close(self) -> None:
        """Finish what is queued, then end the threads. Again is nothing."""
        self._finalizer()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _taker(state: _State, wanted: int | None) -> _Worker | None:
    """Who takes the next job: the one asked for while it is alive, else the next in turn; None where there is no room."""
    if wanted is not None and state.workers[wanted].alive:
        chosen = [state.workers[wanted]]
    else:
        count = len(state.workers)
        chosen = sorted(state.alive(), key=lambda worker: (worker.index - state.turn) % count)
    return next((worker for worker in chosen if len(worker.queue) < state.depth), None)


def _serve(state: _State, worker: _Worker) -> None:
    """A worker's thread."""
    while _do_next(state, worker):
        pass


def _do_next(state: _State, worker: _Worker) -> bool:
    """Do one job; False when there will be no more. A function of its own, so that nothing of a job outlives it."""
    job = _next_job(state, worker)
    if job is None:
        return False
    try:
        value, events = worker.lane.run(job.calls[worker.index], job.args, job.kwargs, job.rows, job.ready, job.target)
    except Exception as error:  # whatever a device raises is reported, here or by the job's result
        _failed(state, worker, job, error)
    else:
        _succeeded(state, job, value, events)
    return True


def _next_job(state: _State, worker: _Worker) -> _Job | None:
    """The next in this worker's queue; None once the pool is closing and no worker has anything left to hand over."""
    with state.lock:
        worker.running = False
        while not worker.queue:
            if state.closing and not any(other.queue or other.running for other in state.workers):
                state.wake_all()
                return None
            worker.wake.wait()
        worker.running = True
        state.room.notify_all()
        return worker.queue.popleft()


def _succeeded(state: _State, job: _Job, value: Any, events: Events) -> None:
    """Hand the result out, and drop the workers that failed the job; never the last one."""
    job.pending._finish(value, events)
    if not job.causes:
        return
    dropped = []
    with state.lock:
        for worker in (state.workers[index] for index in job.causes):
            if worker.alive and len(state.alive()) > 1:
                worker.alive, worker.cause = False, _said(job.causes[worker.index])
                dropped.append(worker)
                while worker.queue:
                    _hand_over(worker.queue.popleft(), state.alive())
        state.wake_all()
    for worker in dropped:
        logger.warning(
            "%s is dropped, and the other devices do its work: %s. %d of %d devices are left",
            *(worker.name, worker.cause, len(state.alive()), len(state.workers)),
        )


def _failed(state: _State, worker: _Worker, job: _Job, error: Exception) -> None:
    """Give the job to a worker that has not tried it; if all have, it fails."""
    with state.lock:
        job.causes[worker.index] = error
        others = [other for other in state.alive() if other.index not in job.causes]
        if others:
            _hand_over(job, others)
            return
        causes = {w.name: w.cause for w in state.workers if w.cause}
    causes |= {state.workers[index].name: _said(cause) for index, cause in job.causes.items()}
    failure = DecodeError("no device could do it. " + "; ".join(f"{name}: {causes[name]}" for name in sorted(causes)))
    failure.__cause__ = error
    job.pending._finish(error=failure)


def _hand_over(job: _Job, workers: list[_Worker]) -> None:
    """To the one with the shortest queue, of those that have not failed it where there are such."""
    fit = [worker for worker in workers if worker.index not in job.causes] or workers
    taker = min(fit, key=lambda worker: len(worker.queue))
    taker.queue.append(job)
    taker.wake.notify()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _stop(state: _State, threads: list[threading.Thread]) -> None:
    with state.lock:
        state.closing = True
        state.wake_all()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
