"""A source and a sink each in a thread of its own behind a bounded queue, so that whoever computes never waits on I/O.

Knows the two protocols; not what is read or written, nor any clock of the output.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Self

from streamflow._threads import Thread
from streamflow.io.picture import Picture, Sink, Source

POLICIES = ("newest", "every")


class _Threaded:
    """A queue of at most `depth` pictures, a thread, and the exception that ended it."""

    def __init__(self, depth: int, name: str) -> None:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth is {depth!r}: a queue holds at least 1 picture")
        self.depth, self.dropped, self.count = depth, 0, 0
        self._queue: deque[Picture] = deque()
        self._changed = threading.Condition()
        self._stop = self._done = False
        self._error: BaseException | None = None
        self._thread = Thread(self._run, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def queued(self) -> int:
        """Pictures waiting, never more than `depth`."""
        return len(self._queue)

    @property
    def done(self) -> bool:
        """Whether the thread has ended: at the source's end, by an error or by `close`."""
        return self._done

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # handed to the caller, who raises it
            self._error = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _work(self) -> None:
        raise NotImplementedError

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _end(self, timeout: float) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name} has not ended within {timeout:g} s: its device does not answer")


class Reading(_Threaded):
    """Reads a source in a thread.

    policy: "newest" keeps the latest `depth` pictures and counts those that it discards in `dropped`; a picture with a
    `pts` is held back until its time has come, as a camera would. "every" keeps all: the source waits for the reader.
    depth: what the queue holds, 1 by default for "newest" and 4 for "every".

    The source is opened, read and closed in the thread; what it raises is raised by `read`.
    """

    def __init__(self, source: Source, policy: str = "newest", depth: int | None = None) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: choose one of {', '.join(POLICIES)}")
        super().__init__({"newest": 1, "every": 4}[policy] if depth is None else depth, "reading")
        self.source, self.policy = source, policy
        self._paused_at: float | None = None
        self._paused_for = 0.0
        self._thread.start()

    def pause(self, paused: bool) -> None:
        """While paused, "newest" takes nothing more from the source, so nothing is discarded, and its time stands still."""
        with self._changed:
            if paused and self._paused_at is None:
                self._paused_at = time.monotonic()
            elif not paused and self._paused_at is not None:
                self._paused_for += time.monotonic() - self._paused_at
                self._paused_at = None
            self._changed.notify_all()

    def read(self, timeout: float | None = None) -> Picture | None:
        """The next picture; None at the source's end or after `close`. TimeoutError after `timeout` seconds without one
        (0: whatever is there now)."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._queue or self._done, timeout):
                raise TimeoutError(f"no picture within {timeout:g} s")
            if self._queue:
                picture = self._queue.popleft()
                self._changed.notify_all()
                return picture
        self._raise()
        return None

    def close(self, timeout: float = 5) -> None:
        """End the thread and the source; TimeoutError where its `read` does not return."""
        self._end(timeout)
        self._queue.clear()

    def _work(self) -> None:
        try:
            self.source.open()
            started = time.monotonic()
            while not self._stop and (picture := self.source.read()) is not None:
                self._put(picture, started)
        finally:
            self.source.close()

    def _put(self, picture: Picture, started: float) -> None:
        with self._changed:
            if self.policy == "every":
                self._changed.wait_for(lambda: self._stop or len(self._queue) < self.depth)
            else:
                self._wait_until_due(picture, started)
            if self._stop:
                return
            while len(self._queue) >= self.depth:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append(picture)
            self.count += 1
            self._changed.notify_all()

    def _wait_until_due(self, picture: Picture, started: float) -> None:
        """Until its time has come and the source is not paused, which a pause that begins meanwhile puts off."""
        while not self._stop:
            due = started + self._paused_for + (picture.pts or 0.0)
            left = None if self._paused_at is not None else due - time.monotonic()
            if left is not None and left <= 0:
                return
            self._changed.wait(left)


class Writing(_Threaded):
    """Writes to a sink in a thread.

    block: whether `write` waits while the queue is full; else the oldest picture goes and is counted in `dropped`.

    The sink is opened, written and closed in the thread; what it raises is raised by the next `write` or by `close`.
    """

    def __init__(self, sink: Sink, depth: int = 4, block: bool = False) -> None:
        super().__init__(depth, "writing")
        self.sink, self.block = sink, block
        self._thread.start()

    def write(self, picture: Picture) -> None:
        """Queue one picture; RuntimeError after `close`."""
        with self._changed:
            if self.block:
                self._changed.wait_for(lambda: self._done or len(self._queue) < self.depth)
            if not self._done and not self._stop:
                while len(self._queue) >= self.depth:
                    self._queue.popleft()
                    self.dropped += 1
                self._queue.append(picture)
                self._changed.notify_all()
                return
        self._raise()
        raise RuntimeError("this writing has ended: make a new one")

    def close(self, timeout: float = 30) -> None:
        """Write what is queued, end the thread and the sink."""
        self._end(timeout)
        self._queue.clear()
        self._raise()

    def _work(self) -> None:
        try:
            self.sink.open()
            while (picture := self._get()) is not None:
                self.sink.write(picture)
                self.count += 1
        finally:
            self.sink.close()

    def _get(self) -> Picture | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stop)
            if not self._queue:
                return None
            picture = self._queue.popleft()
            self._changed.notify_all()
            return picture
