"""Updates from many threads, one after another, so that they leave the thread that draws its time. Knows threads and clocks;
nothing of what is updated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

SHARE = 0.15  # of the time that updates by other threads may take while frames are drawn
LONGEST = 1.0  # seconds that one waits for that at most
DRAWING = 1.0  # seconds since the last tick within which frames count as being drawn


@dataclass(eq=False)
class _Ticket:
    """An update that waits. `replaced_by`: a later one that sets all that this one sets."""

    names: frozenset[str]
    scope: str | None
    replaced_by: _Ticket | None = None
    over: bool = False
    number: int | None = None


class Updates:
    """Lets updates through one at a time, in the order in which they came.

    An update that waits is left out where a later one sets the same fields. While another thread draws, a pause follows
    each update, so that all together take no more than `SHARE` of the time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._busy = False
        self._free_at = self._drawn_at = float("-inf")
        self._drawn_by: int | None = None

    def drawn(self) -> None:
        """This thread draws. To be called at every tick; takes no lock."""
        self._drawn_by, self._drawn_at = threading.get_ident(), self._clock()

    def apply(self, names: Collection[str], scope: str | None, make: Callable[[], int]) -> int:
        """Call `make`, which sets these fields and gives the update's number; give that number, or the one of the later
        update that took its place. What `make` raises is raised, and an update whose place it took is made after all."""
        mine = _Ticket(frozenset(names), scope)
        if (taken_by := self._turn(mine)) is not None:
            return taken_by
        began = self._clock()
        try:
            mine.number = make()
            return mine.number
        finally:
            with self._changed:
                now = self._clock()
                mine.over, self._busy = True, False
                self._free_at = now + min(LONGEST, (now - began) * (1 / SHARE - 1))
                self._changed.notify_all()

    def _turn(self, mine: _Ticket) -> int | None:
        """Wait until it is this one's turn: None; or the number of the update that took its place."""
        with self._changed:
            for one in self._waiting:
                if one.scope == mine.scope and one.names <= mine.names:
                    one.replaced_by = mine
            self._waiting.append(mine)
            self._changed.notify_all()
            try:
                while (left := self._left(mine)) != 0:
                    if mine.replaced_by is None or not mine.replaced_by.over:
                        self._changed.wait(left)
                    elif mine.replaced_by.number is not None:
                        return mine.replaced_by.number
                    else:
                        mine.replaced_by = None  # that one failed
                self._busy = True
            except BaseException:  # an interrupt: whoever waits for this one goes on
                mine.over = True
                raise
            finally:
                self._waiting.remove(mine)
                self._changed.notify_all()
        return None

    def _left(self, mine: _Ticket) -> float | None:
        """Seconds until it is this one's turn; None while that is not known."""
        if mine.replaced_by is not None or self._busy:
            return None
        if self._drawn_by == threading.get_ident():  # what it waits for would wait for it
            return 0
        if mine is not next(one for one in self._waiting if one.replaced_by is None):
            return None
        now = self._clock()
        drawing = now - self._drawn_at < DRAWING
        return max(0.0, self._free_at - now) if drawing else 0
