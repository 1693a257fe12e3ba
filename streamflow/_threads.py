"""Threads that can be waited for under Ctrl-C, that act for others, or that leave nothing behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Flag:
    """An event that is set once, by one thread, and whose `wait` may be interrupted at any instruction.

    A KeyboardInterrupt in `threading.Event.wait` can leave the event's lock held (CPython, Lib/threading.py: the methods of
    `Condition` are Python code, and the signal handler runs between the lock's acquisition and the `with` block). The thread
    that sets the event then waits for ever. Here no lock is shared: each waiter has its own.
    """

    def __init__(self) -> None:
        self._set = False
        self._waiters: list[threading.Lock] = []

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return self._set

    def set(self) -> None:
        """Wake whoever waits."""
        self._set = True
        for waiter in tuple(self._waiters):
            waiter.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most `timeout` seconds. Return whether it is set."""
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        try:
            if not self._set:
                waiter.acquire(timeout=-1 if timeout is None else max(timeout, 0))
        finally:
            self._waiters.remove(waiter)
        return self._set


class Thread(threading.Thread):
    """A daemon thread whose `join` and `is_alive` stay right when `join` is interrupted.

    Before Python 3.13, a KeyboardInterrupt in `threading.Thread.join` marks the thread as ended while it runs (CPython,
    Lib/threading.py, `_wait_for_tstate_lock`). The next `join` returns at once, and a thread that still computes when the
    interpreter ends aborts the process. Here a flag says when the target has returned.

    acts_for: the thread that waits while this one runs on its behalf, holding locks for it; None where it acts by itself.
    """

    acts_for: int | None = None

    def __init__(self, target: Callable[..., object], name: str, args: Sequence[object] = ()) -> None:
        super().__init__(target=self._run_target, name=name, args=(target, *args), daemon=True)
        self._returned = Flag()

    def _run_target(self, target: Callable[..., object], *args: object) -> None:
        try:
            target(*args)
        finally:
            self._returned.set()

    def is_alive(self) -> bool:
        """Whether it has been started and its target has not returned."""
        return self.ident is not None and not self._returned.is_set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until its target has returned, at most `timeout` seconds. RuntimeError: not started, or the own thread."""
        if self.ident is None or self is threading.current_thread() or self._returned.wait(timeout):
            super().join(timeout)


def acting_thread() -> int:
    """The identifier of this thread, or of the one for which it acts."""
    return getattr(threading.current_thread(), "acts_for", None) or threading.get_ident()


def aside(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a new thread, wait until that thread has ended, and return the result or raise the error. An
    interrupt is raised once the function has returned.

    On a CPU, OpenMP keeps a team of workers for every thread that ever computed, and lets none of them spin between two
    operations once there are more workers than processors. What only prepares a stream must not leave a team behind: the
    drawing thread then ticks 1.3 to 1.9 times as fast (measured on two cores, embedded model).
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # raised in the caller's thread
            future.set_exception(error)

    thread = Thread(run, "streamflow aside")
    thread.start()
    try:
        thread.join()
    except BaseException:
        thread.join()
        raise
    return future.result()


def freeze_loaded() -> None:
    """Leave everything that is loaded now out of garbage collection, until `gc.unfreeze()`. With torch and a small model
    loaded, a full collection takes 0.3 s of CPU time, in which no other Python thread runs."""
    gc.collect()
    gc.freeze()
