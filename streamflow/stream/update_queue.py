"""Updates from many threads, made one after another, with pauses that leave time for the thread that draws. It handles
threads and clocks, not the updates' contents."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from streamflow._threads import acting_thread

SHARE = 0.05  # of the time that updates by other threads may take while frames are drawn
LONGEST = 1.0  # seconds that one waits for that at most
DRAWING = 1.0  # seconds since the last tick within which frames count as being drawn


@dataclass(eq=False)
class _Ticket:
    """An update that waits. `replaced_by`: a later one that sets all that this one sets. `parts`: what its fields are read
    together with, so that an update between the two which has a part in common keeps them apart."""

    names: frozenset[str]
    parts: frozenset[str]
    scope: str | None
    replaced_by: _Ticket | None = None
    over: bool = False
    number: int | None = None
    thread: int = field(default_factory=acting_thread)


class UpdateQueue:
    """Lets updates through one at a time, in the order in which they came.

    An update that waits is left out where a later one sets the same fields. While another thread draws, a pause follows
    each update, so that all together take no more than `SHARE` of the time, and at most `LONGEST`. The thread that draws
    waits for the running update alone. drawn_by, drawn_at: the thread that draws, and the clock's time of its last tick,
    which it sets itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()  # of everything below
        self._waiting: list[_Ticket] = []
        self._busy = False
        self._free_at = self.drawn_at = float("-inf")
        self.drawn_by: int | None = None

    @property
    def drawing_elsewhere(self) -> bool:
        """Whether another thread draws."""
        return self.drawn_by != acting_thread() and self._clock() - self.drawn_at < DRAWING

    def apply(self, names: Collection[str], scope: str | None, make: Callable[[], int], parts: Collection[str] = ()) -> int:
        """Call `make`, which sets these fields and gives the update's number; give that number, or the one of the later
        update that replaced it. What `make` raises is raised, and an update that it had replaced is made after all."""
        mine = _Ticket(frozenset(names), frozenset(parts), scope)
        try:
            later = self._turn(mine)
            if later is not None:
                return later
            began = self._clock()
            try:
                mine.number = make()
                return mine.number
            finally:
                now = self._clock()
                self._free_at = now + min(LONGEST, (now - began) * (1 / SHARE - 1))
                self._busy = False
        finally:
            self._end(mine)

    def _turn(self, mine: _Ticket) -> int | None:
        """Wait until it is this one's turn: None. Or the number of the later update that replaces it."""
        with self._changed:
            self._replace(mine)
            self._waiting.append(mine)
            self._changed.notify_all()  # another one may be the first now
            while True:
                if mine.replaced_by is not None and mine.replaced_by.over:
                    if mine.replaced_by.number is not None:
                        return mine.replaced_by.number
                    mine.replaced_by = None  # that one failed
                left = self._left(mine)
                if left == 0:
                    self._busy = True
                    self._waiting.remove(mine)
                    return None
                self._changed.wait(left)

    def _replace(self, mine: _Ticket) -> None:
        """Let this one take the place of those before it. What waits for a running update goes on waiting for that."""
        between: set[str] = set()
        for one in reversed(self._waiting):
            free = one.replaced_by is None or one.replaced_by in self._waiting
            same = one.scope == mine.scope and one.names <= mine.names and one.thread != self.drawn_by
            if free and same and not one.parts & between:
                one.replaced_by = mine
            else:
                between |= one.parts

    def _left(self, mine: _Ticket) -> float | None:
        """Seconds until it is this one's turn; None where it waits for another update."""
        if mine.replaced_by is not None or self._busy:
            return None
        if mine.thread == self.drawn_by:  # what it waits for would wait for it
            return 0
        first = next((one for one in self._waiting if one.replaced_by is None), None)
        if mine is not first or any(one.thread == self.drawn_by for one in self._waiting):
            return None
        now = self._clock()
        drawing = now - self.drawn_at < DRAWING
        return max(0.0, self._free_at - now) if drawing else 0

    def _end(self, mine: _Ticket) -> None:
        """This one is made, or left out, or has failed: whoever waits for that goes on."""
        with self._changed:
            mine.over = True
            if mine.replaced_by is not None:
                mine.number = mine.replaced_by.number
            if mine in self._waiting:
                self._waiting.remove(mine)
            self._changed.notify_all()
