"""A source and a sink each in a thread of its own behind a bounded queue, so that whoever computes never waits on I/O.

Knows the two protocols; not what is read or written, nor any clock of the output.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Self, TypeVar

from streamflow._threads import Thread
from streamflow.io.picture import Picture, Sink, Source

POLICIES = ("newest", "every")

T = TypeVar("T")


class _Threaded:
    """A queue of at most `depth` pictures, a thread that works on a device, and the exception that ended it."""

    def __init__(self, device: Source | Sink, depth: int, name: str) -> None:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth is {depth!r}: a queue holds at least 1 picture")
        self.depth, self.dropped, self.count = depth, 0, 0
        self.error: BaseException | None = None
        self.opened = self.lost = False
        self._device = device
        self._queue: deque[Picture] = deque()
        self._changed = threading.Condition()
        self._stop = self._done = self._raised = False
        self._since: float | None = None
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

    @property
    def waiting(self) -> float:
        """Seconds since when the device does not return from a call; 0 outside of calls."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _run(self) -> None:
        self._keep_error(self._open_and_work)
        self.lost = self.error is not None
        self._keep_error(partial(self._call, self._device.close))
        with self._changed:
            self._done = True
            self._changed.notify_all()

    def _open_and_work(self) -> None:
        self._call(self._device.open)
        self.opened = True
        self._work()

    def _keep_error(self, step: Callable[[], None]) -> None:
        """Keep the first error for the caller, who raises it; a later one becomes a note of it."""
        try:
            step()
        except BaseException as error:
            if self.error is None:
                self.error = error
            else:
                self.error.add_note(f"Then close() raised {type(error).__name__}: {error}")

    def _call(self, method: Callable[..., T], *arguments: object) -> T:
        self._since = time.monotonic()
        try:
            return method(*arguments)
        finally:
            self._since = None

    def _work(self) -> None:
        raise NotImplementedError

    def _raise(self) -> None:
        if self.error is not None and not self._raised:
            self._raised = True
            raise self.error

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

    The source is opened, read and closed in the thread. What `open` and `read` of it raise is raised by `read`; by `close`
    where nobody read so far, and so is what `close` of it raises. `error` is the exception; `lost` says that it is not of
    `close`. `opened`: whether the source was opened; `ended`: whether it has come to its end.
    """

    def __init__(self, source: Source, policy: str = "newest", depth: int | None = None) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: choose one of {', '.join(POLICIES)}")
        super().__init__(source, {"newest": 1, "every": 4}[policy] if depth is None else depth, "reading")
        self.source, self.policy, self.ended = source, policy, False
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
        if not self.ended:
            self._raise()
        return None

    def close(self, timeout: float = 5) -> None:
        """End the thread and the source. Raises what the source raised, unless `read` has; TimeoutError where a call of the
        source does not return."""
        self._end(timeout)
        self._queue.clear()
        self._raise()

    def _work(self) -> None:
        started = time.monotonic()
        while not self._stop:
            picture = self._call(self.source.read)
            if picture is None:
                self.ended = True
                return
            self._put(picture, started)

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

    The sink is opened, written and closed in the thread; what it raises is raised by the next `write` or by `close`, and is
    kept as `error`.
    """

    def __init__(self, sink: Sink, depth: int = 4, block: bool = False) -> None:
        super().__init__(sink, depth, "writing")
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
        while (picture := self._get()) is not None:
            self._call(self.sink.write, picture)
            self.count += 1

    def _get(self) -> Picture | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stop)
            if not self._queue:
                return None
            picture = self._queue.popleft()
            self._changed.notify_all()
            return picture
