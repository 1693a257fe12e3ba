"""Admission of viewers: a ticket reserves a session slot for some seconds, and a viewer occupies one. Knows counts and
quotas."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from streamflow.app.server.safety import COME_BACK, Bucket
from streamflow.app.server.tokens import Holder

KEPT = 10.0  # seconds for which a ticket reserves a slot
UNUSED = 2  # unused tickets of one holder


@dataclass(frozen=True)
class Refusal(Exception):
    """Raised when no session slot is free for the holder."""

    message: str
    retry_after: int = COME_BACK


@dataclass(frozen=True)
class Full(Refusal):
    """Raised when all session slots are taken, whoever the holder is."""


@dataclass(frozen=True)
class Unused(Refusal):
    """Raised when the holder has unused tickets. A page that has just been opened uses its own within milliseconds."""

    retry_after: int = 1


class Admission:
    """Counts session slots, in all and by holder. streams: the quota of a holder without one of its own, None for no quota.
    Used in the event loop only."""

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic, streams: int | None = None):
        self._slots, self._clock, self._streams = slots, clock, streams
        self._tickets: dict[str, tuple[Holder, float]] = {}
        self._inside: Counter[str] = Counter()
        self._paces: dict[str, Bucket] = {}

    @property
    def inside(self) -> int:
        """The number of viewers."""
        return self._inside.total()

    def ticket(self, holder: Holder) -> str:
        """A ticket, good once and for `KEPT` seconds. Raises Refusal, and Unused for a third unused one."""
        self._tickets = {name: kept for name, kept in self._tickets.items() if kept[1] > self._clock()}
        waiting = Counter(kept[0].name for kept in self._tickets.values())
        quota = self._streams if holder.streams is None else holder.streams
        if quota is not None and waiting[holder.name] + self._inside[holder.name] >= quota:
            raise Refusal(f"your quota is {quota} streams at once, and they are in use: close one")
        if waiting.total() + self.inside >= self._slots:
            raise Full(f"all {self._slots} session slots are taken")
        if waiting[holder.name] >= UNUSED:
            raise Unused(f"you have {UNUSED} unused tickets: use one, or wait until it expires after {KEPT:g} seconds")
        ticket = secrets.token_urlsafe(24)
        self._tickets[ticket] = holder, self._clock() + KEPT
        return ticket

    def enter(self, ticket: str) -> Holder | None:
        """Occupy the slot of a ticket. None for a ticket that is unknown, used or expired."""
        holder, until = self._tickets.pop(ticket, (None, 0.0))
        if holder is None or until <= self._clock():
            return None
        self._inside[holder.name] += 1
        return holder

    def leave(self, holder: Holder) -> None:
        """Free the holder's slot."""
        self._inside[holder.name] -= 1

    def pace(self, holder: Holder) -> tuple[Bucket, ...]:
        """The holder's limit of images a second, which all its streams share."""
        if holder.fps is None:
            return ()
        return (self._paces.setdefault(holder.name, Bucket(holder.fps, max(1.0, holder.fps / 4))),)
