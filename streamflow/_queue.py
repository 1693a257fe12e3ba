"""A bounded queue between two threads, which waits or drops the oldest item when it is full. Knows nothing of its items."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """Items on their way from one thread to another, in order, at most `depth` of them.

    block: whether `put` waits while the queue is full; otherwise the oldest item is dropped and counted in `dropped`.

    Raises:
        ValueError: depth is not an integer of at least 1.
    """

    def __init__(self, depth: int, block: bool) -> None:
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth is {depth!r}: a queue holds at least 1 item")
        self.depth, self.block, self.dropped = depth, block, 0
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> bool:
        """Queue an item. Return False once the queue is closed; the item is then not queued."""
        with self._changed:
            if self.block:
                self._changed.wait_for(lambda: self._closed or len(self._items) < self.depth)
            if self._closed:
                return False
            if len(self._items) == self.depth:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._changed.notify_all()
            return True

    def get(self, timeout: float | None = None) -> T | None:
        """Wait for the oldest item and remove it. Return None once the queue is closed and empty.

        Raises:
            TimeoutError: nothing was queued within `timeout` seconds (0: there is nothing now).
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._closed, timeout):
                raise TimeoutError(f"nothing was queued within {timeout:g} s")
            self._changed.notify_all()
            return self._items.popleft() if self._items else None

    def take(self) -> T | None:
        """Remove the oldest item without waiting. Return None where there is none."""
        with self._changed:
            self._changed.notify_all()
            return self._items.popleft() if self._items else None

    def wait_for_room(self, timeout: float) -> bool:
        """Wait until the queue is not full, at most `timeout` seconds. Return whether `put` would queue an item at once."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self.depth, timeout)
            return not self._closed and len(self._items) < self.depth

    def close(self) -> None:
        """Queue nothing more, and wake whoever waits. What is queued can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Drop what is queued."""
        with self._changed:
            self._items.clear()
            self._changed.notify_all()
