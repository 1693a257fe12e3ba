"""A source and a sink each in a thread of its own behind a bounded queue, so that whoever computes never waits on I/O.

Knows the two protocols; not what is read or written, nor any clock of the output.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Self, TypeVar

from streamflow._queue import BoundedQueue
from streamflow._threads import Thread
from streamflow.io.protocols import Sink, Source, TimedImage

DEPTHS = {"newest": 1, "every": 4}  # of the queue, by policy

T = TypeVar("T")


class _Threaded:
    """A queue of images, a thread that works on a device, and the exception that ended it."""

    def __init__(self, device: Source | Sink, queue: BoundedQueue[TimedImage], name: str) -> None:
        self.count = 0
        self.error: BaseException | None = None
        self.opened = self.lost = False
        self._device, self._queue = device, queue
        self._done = self._raised = False
        self._call_began: float | None = None
        self._thread = Thread(self._run, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def dropped(self) -> int:
        """Images that a newer one replaced in the queue."""
        return self._queue.dropped

    @property
    def queued(self) -> int:
        """Images that wait."""
        return len(self._queue)

    @property
    def done(self) -> bool:
        """Whether the thread has ended: at the source's end, by an error or by `close`."""
        return self._done

    @property
    def waiting(self) -> float:
        """Seconds since the call of the device that has not returned began; 0 outside of calls."""
        began = self._call_began
        return 0.0 if began is None else time.monotonic() - began

    def _run(self) -> None:
        self._keep_error(self._open_and_work)
        self.lost = self.error is not None
        self._keep_error(partial(self._call, self._device.close))
        self._done = True
        self._queue.close()

    def _open_and_work(self) -> None:
        self._call(self._device.open)
        self.opened = True
        self._work()

    def _keep_error(self, step: Callable[[], None]) -> None:
        """Keep the first error for the caller, who raises it. A later one becomes a note of it."""
        try:
            step()
        except BaseException as error:
            if self.error is None:
                self.error = error
            else:
                self.error.add_note(f"Then close() raised {type(error).__name__}: {error}")

    def _call(self, method: Callable[..., T], *arguments: object) -> T:
        self._call_began = time.monotonic()
        try:
            return method(*arguments)
        finally:
            self._call_began = None

    def _work(self) -> None:
        raise NotImplementedError

    def _raise(self) -> None:
        if self.error is not None and not self._raised:
            self._raised = True
            raise self.error

    def _end(self, timeout: float) -> None:
        """Wait for the thread, discard what is queued, and raise the error that ended it."""
        self._queue.close()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name} has not ended within {timeout:g} s: its device does not answer")
        self._queue.clear()
        self._raise()

    def close(self) -> None:
        """End the thread."""
        raise NotImplementedError


class Reading(_Threaded):
    """Reads a source in a thread.

    policy: "newest" keeps the latest `depth` images and counts those that it discards in `dropped`; an image with a
    `pts` is held back until its time has come, as a camera would. "every" keeps all: the source waits for the reader.
    depth: what the queue holds, 1 by default for "newest" and 4 for "every".

    The source is opened, read and closed in the thread. What its `open` and `read` raise is raised by `read`; by `close`
    where nobody read so far, and so is what its `close` raises. `error` is the exception; `lost`: whether `open` or `read`
    raised it. `opened`: whether the source was opened; `ended`: whether it has come to its end.
    """

    def __init__(self, source: Source, policy: str = "newest", depth: int | None = None) -> None:
        if policy not in DEPTHS:
            raise ValueError(f"unknown policy {policy!r}: choose one of {', '.join(DEPTHS)}")
        queue = BoundedQueue(DEPTHS[policy] if depth is None else depth, block=policy == "every")
        super().__init__(source, queue, "reading")
        self.source, self.policy, self.ended = source, policy, False
        self._changed = threading.Condition()
        self._stop = False
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

    def read(self, timeout: float | None = None) -> TimedImage | None:
        """The next image; None at the source's end or after `close`. TimeoutError after `timeout` seconds without one
        (0: whatever is there now)."""
        image = self._queue.get(timeout)
        if image is None and not self.ended:
            self._raise()
        return image

    def close(self, timeout: float = 5) -> None:
        """End the thread and the source. Raises what the source raised, unless `read` has; TimeoutError where a call of the
        source does not return."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._end(timeout)

    def _work(self) -> None:
        started = time.monotonic()
        while not self._stop:
            image = self._call(self.source.read)
            if image is None:
                self.ended = True
                return
            if self.policy == "newest":
                self._wait_until_due(image, started)
            self.count += self._queue.put(image)

    def _wait_until_due(self, image: TimedImage, started: float) -> None:
        """Wait until the image's time has come and the source is not paused. A pause that begins meanwhile delays it."""
        with self._changed:
            while not self._stop:
                due = started + self._paused_for + (image.pts or 0.0)
                left = None if self._paused_at is not None else due - time.monotonic()
                if left is not None and left <= 0:
                    return
                self._changed.wait(left)


class Writing(_Threaded):
    """Writes to a sink in a thread.

    block: whether `write` waits while the queue is full; otherwise the oldest image is dropped and counted in `dropped`.

    The sink is opened, written and closed in the thread; what it raises is raised by the next `write` or by `close`, and is
    kept as `error`.
    """

    def __init__(self, sink: Sink, depth: int = 4, block: bool = False) -> None:
        super().__init__(sink, BoundedQueue(depth, block), "writing")
        self.sink, self.block = sink, block
        self._thread.start()

    def write(self, image: TimedImage) -> None:
        """Queue one image; RuntimeError after `close`."""
        if not self._queue.put(image):
            self._raise()
            raise RuntimeError("this writing has ended: make a new one")

    def close(self, timeout: float = 30) -> None:
        """Write what is queued, end the thread and the sink."""
        self._end(timeout)

    def _work(self) -> None:
        while (image := self._queue.get()) is not None:
            self._call(self.sink.write, image)
            self.count += 1
