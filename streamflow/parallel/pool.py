"""One thread for each device, and their jobs. Knows devices and calls, and not what a call computes.

A job runs on one device. If it fails there, it runs on the others, and a device that failed at a job that another device
completed is dropped. A job that fails on every device raises, and no device is dropped, since the job itself may be wrong.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from streamflow._threads import Thread
from streamflow.parallel.lanes import Events, Lane, current_events, on_current_streams

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments

logger = logging.getLogger(__name__)


class DecodeError(RuntimeError):
    """A job failed on every device. The message names each device and its error."""


class Pending:
    """The result of a job. latency_s: host seconds from submission to the result, on CUDA to the last launch."""

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._started = time.perf_counter()
        self._value: object = None
        self._events: Events = {}
        self._error: Exception | None = None
        self.latency_s: float | None = None

    def done(self) -> bool:
        """Whether the device has finished the job, or the job has failed. Never waits."""
        return self._finished.is_set() and all(event.query() for event in self._events.values())

    def result(self) -> Any:
        """The result, ready for the caller's current CUDA streams. The host waits for the launch, and not for the GPU.
        DecodeError: every device failed."""
        self._finished.wait()
        if self._error is not None:
            raise self._error
        return on_current_streams(self._value, self._events)

    def _finish(self, value: object = None, events: Events | None = None, error: Exception | None = None) -> None:
        self._value, self._events, self._error = value, events or {}, error
        self.latency_s = time.perf_counter() - self._started
        self._finished.set()


@dataclass(eq=False)
class _Job:
    calls: Sequence[Callable]  # one for each worker
    args: tuple
    kwargs: Arguments
    rows: int
    target: torch.device | None
    ready: Events
    pending: Pending = field(default_factory=Pending)
    causes: dict[int, BaseException] = field(default_factory=dict)


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
    """What the threads share, used under `lock` only. Each worker waits for its own condition, and callers wait for `room`,
    so that a job wakes one thread."""

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
    """One thread for each device, with a queue of at most `depth` jobs. End it with `close()` or `with Pool(...)`; it also
    ends when it is deleted, and when the interpreter ends."""

    def __init__(self, devices: Sequence[torch.device], depth: int = 2):
        state = self._state = _State(devices, depth)
        threads = [Thread(_run, f"streamflow-{one.lane.device}-{one.index}", (state, one)) for one in state.workers]
        for thread in threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _stop, state, threads)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The device of every worker, dropped ones too."""
        return tuple(worker.lane.device for worker in self._state.workers)

    @property
    def alive(self) -> tuple[int, ...]:
        """The indices of the workers that are not dropped."""
        return tuple(worker.index for worker in self._state.alive())

    @property
    def dropped(self) -> dict[str, str]:
        """The devices that were dropped, with the error of each."""
        return {worker.name: worker.cause or "" for worker in self._state.workers if not worker.alive}

    @property
    def queued(self) -> int:
        """How many jobs wait in queues."""
        return sum(len(worker.queue) for worker in self._state.workers)

    @property
    def seconds_per_row(self) -> tuple[float | None, ...]:
        """The median seconds per row of each worker; None before its first job has ended."""
        return tuple(worker.lane.seconds_per_row for worker in self._state.workers)

    def submit(
        self,
        calls: Sequence[Callable],
        args: tuple,
        kwargs: Arguments | None = None,
        rows: int = 1,
        target: torch.device | None = None,
        worker: int | None = None,
    ) -> Pending:
        """Queue one job, `calls[worker](*args, **kwargs)`, and return at once; if every queue is full, wait for room. The
        arguments must not be written to until the result is there. RuntimeError: the pool is closed.

        Args:
            calls: one for each worker.
            rows: of the batch, for `seconds_per_row`.
            target: the device of the result; None: where it was computed.
            worker: the index of the worker; None: the next in turn that has room.
        """
        job = _Job(calls, args, kwargs or {}, rows, target, current_events((args, dict(kwargs or {}))))
        state = self._state
        with state.lock:
            while not state.closing and (chosen := _choose_worker(state, worker)) is None:
                state.room.wait()
            if state.closing:
                raise RuntimeError("these devices are closed: call shard_vae(vae, devices) again")
            chosen.queue.append(job)
            state.turn = chosen.index + 1 if worker is None else state.turn
            chosen.wake.notify()
        return job.pending

    def close(self) -> None:
        """Finish the queued jobs, then end the threads. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _choose_worker(state: _State, index: int | None) -> _Worker | None:
    """The worker for the next job: the one of this index if it is alive, else the next in turn; None: its queue is full."""
    if index is not None and state.workers[index].alive:
        candidates = [state.workers[index]]
    else:
        count = len(state.workers)
        candidates = sorted(state.alive(), key=lambda worker: (worker.index - state.turn) % count)
    return next((worker for worker in candidates if len(worker.queue) < state.depth), None)


def _run(state: _State, worker: _Worker) -> None:
    """The thread of a worker."""
    while _run_next(state, worker):
        pass


def _run_next(state: _State, worker: _Worker) -> bool:
    """Run one job; False when no more will come. This is a function, so that no tensor of a job outlives the job."""
    job = _next_job(state, worker)
    if job is None:
        return False
    try:
        value, events = worker.lane.run(job.calls[worker.index], job.args, job.kwargs, job.rows, job.ready, job.target)
    except BaseException as error:  # reported by a warning or by the job's result, also where a job calls sys.exit()
        _retry(state, worker, job, error)
    else:
        _finish(state, job, value, events)
    return True


def _next_job(state: _State, worker: _Worker) -> _Job | None:
    """The next job of this worker; None once the pool is closing and no job is left that another worker could hand over."""
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


def _finish(state: _State, job: _Job, value: object, events: Events) -> None:
    """Deliver the result, and drop the workers that failed at the job, but never the last one."""
    job.pending._finish(value, events)
    if not job.causes:
        return
    dropped = []
    with state.lock:
        for worker in (state.workers[index] for index in job.causes):
            if worker.alive and len(state.alive()) > 1:
                worker.alive, worker.cause = False, _describe(job.causes[worker.index])
                dropped.append(worker)
                while worker.queue:
                    _hand_over(worker.queue.popleft(), state.alive())
        state.wake_all()
    for worker in dropped:
        left = f"{len(state.alive())} of {len(state.workers)} devices are left"
        logger.warning("%s is dropped, and the other devices do its work: %s. %s", worker.name, worker.cause, left)


def _retry(state: _State, worker: _Worker, job: _Job, error: BaseException) -> None:
    """Give the job to a worker that has not failed at it. If all have, the job fails."""
    with state.lock:
        job.causes[worker.index] = error
        others = [other for other in state.alive() if other.index not in job.causes]
        if others:
            _hand_over(job, others)
            return
        causes = {w.name: w.cause for w in state.workers if w.cause}
    causes |= {state.workers[index].name: _describe(cause) for index, cause in job.causes.items()}
    failure = DecodeError("every device failed. " + "; ".join(f"{name}: {causes[name]}" for name in sorted(causes)))
    failure.__cause__ = error
    job.pending._finish(error=failure)


def _hand_over(job: _Job, workers: list[_Worker]) -> None:
    """Queue the job for the worker with the shortest queue, if possible one that has not failed at it."""
    fit = [worker for worker in workers if worker.index not in job.causes] or workers
    chosen = min(fit, key=lambda worker: len(worker.queue))
    chosen.queue.append(job)
    chosen.wake.notify()


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _stop(state: _State, threads: Sequence[threading.Thread]) -> None:
    with state.lock:
        state.closing = True
        state.wake_all()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
