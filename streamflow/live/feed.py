"""What comes in: a source that may go away and come back. Knows sources; no stream."""

from __future__ import annotations

import logging
import time

from streamflow.io import Picture, Reading, Source

logger = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0  # seconds between attempts


class Backoff:
    """Pauses that double, from `FIRST_PAUSE` to `LONGEST_PAUSE`, until something goes well again."""

    def __init__(self) -> None:
        self._pause, self.until = FIRST_PAUSE, 0.0

    def failed(self) -> None:
        """Wait from now on, longer each time."""
        self.until = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def well(self) -> None:
        """The next failure begins with a short pause again."""
        self._pause, self.until = FIRST_PAUSE, 0.0

    @property
    def left(self) -> float:
        """Seconds of the pause that are left."""
        return max(0.0, self.until - time.monotonic())


class Feed:
    """Pictures of a source, read in a thread.

    hold: where the source is lost (OSError), say so once, and open it again after a pause until it is back; else the error
    is raised. A file that is not there is raised in any case, and so is everything that is no OSError.
    """

    def __init__(self, source: Source, policy: str, hold: bool) -> None:
        self._source, self._policy, self._hold = source, policy, hold
        self._reading: Reading | None = Reading(source, policy)
        self._backoff, self._lost_at = Backoff(), None
        self._dropped, self.losses, self.ended = 0, 0, False

    @property
    def dropped(self) -> int:
        """Pictures that were captured and not asked for."""
        return self._dropped + (self._reading.dropped if self._reading else 0)

    def pause(self, paused: bool) -> None:
        """While paused, no picture is discarded: the source waits."""
        if self._reading is not None:
            self._reading.pause(paused)

    def next(self, timeout: float) -> Picture | None:
        """The next picture; None where none came within `timeout` seconds, and after the source's end (`ended`)."""
        if self._reading is None and not self._again(timeout):
            return None
        try:
            picture = self._reading.read(timeout)
        except TimeoutError:
            return None
        except FileNotFoundError:
            raise
        except OSError as error:
            self._lose(error)
            return None
        self.ended = picture is None
        if picture is not None and self._lost_at is not None:
            logger.info("the source is back after %.1f s", time.monotonic() - self._lost_at)
            self._lost_at = None
            self._backoff.well()
        return picture

    def _lose(self, error: OSError) -> None:
        if not self._hold:
            raise error
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            self.losses += 1
            logger.warning("the source is lost, the last picture stays, and it is tried again: %s", error)
        self._dropped, reading, self._reading = self.dropped, self._reading, None
        reading.close()
        self._backoff.failed()

    def _again(self, timeout: float) -> bool:
        left = self._backoff.left
        time.sleep(min(left, timeout))
        if left <= timeout:
            self._reading = Reading(self._source, self._policy)
        return left <= timeout

    def close(self) -> None:
        """Let go of the source; its thread has ended then."""
        if self._reading is not None:
            self._reading.close()
