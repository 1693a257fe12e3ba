"""The input of a show: a source that may be lost and come back. Knows sources; no stream."""

from __future__ import annotations

import logging
import time

from streamflow.io import InvalidSource, Reading, Source, TimedImage

logger = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0  # seconds between attempts
SILENCE = 10.0  # seconds after which a call of a source or sink that does not return is logged


def describe(error: BaseException) -> str:
    """An error with its class, since a message alone may say nothing, as that of a KeyError."""
    return f"{type(error).__name__}: {error}"


class Backoff:
    """Pauses that double, from `FIRST_PAUSE` to `LONGEST_PAUSE`, until `reset`."""

    def __init__(self) -> None:
        self._pause, self.until = FIRST_PAUSE, 0.0

    def failed(self) -> None:
        """Begin a pause, longer each time."""
        self.until = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def reset(self) -> None:
        """End the pause. The next one is short again."""
        self._pause, self.until = FIRST_PAUSE, 0.0

    @property
    def left(self) -> float:
        """Seconds of the pause that are left."""
        return max(0.0, self.until - time.monotonic())


class Feed:
    """Images of a source, read in a thread.

    hold: as `Live`'s on_error. What opening cannot solve is raised in any case: ImportError, InvalidSource, an exception
    that is no Exception, such as KeyboardInterrupt, and FileNotFoundError of a source that never was open.
    """

    def __init__(self, source: Source, policy: str, hold: bool) -> None:
        self._source, self._policy, self._hold = source, policy, hold
        self._reading: Reading | None = Reading(source, policy)
        self._backoff, self._lost_at = Backoff(), None
        self._opened = self._silent = False
        self._dropped, self.losses, self.ended = 0, 0, False

    @property
    def dropped(self) -> int:
        """Images that were captured and not drawn."""
        return self._dropped + (self._reading.dropped if self._reading else 0)

    def pause(self, paused: bool) -> None:
        """While paused, no image is discarded: the source waits."""
        if self._reading is not None:
            self._reading.pause(paused)

    def next(self, timeout: float) -> TimedImage | None:
        """The next image; None where none came within `timeout` seconds, and after the source's end (`ended`)."""
        reading = self._reading or self._reopen(timeout)
        if reading is None:
            return None
        try:
            image = reading.read(timeout)
        except Exception as error:
            if error is reading.error:
                self._lose(reading, error)
            else:  # TimeoutError of read()
                self._notice_silence(reading)
            return None
        self.ended = image is None
        if image is not None:
            self._notice_return()
        return image

    def _notice_return(self) -> None:
        self._silent = False
        if self._lost_at is not None:
            logger.info("the source is back after %.1f s", time.monotonic() - self._lost_at)
            self._lost_at = None
            self._backoff.reset()

    def _notice_silence(self, reading: Reading) -> None:
        if reading.waiting > SILENCE and not self._silent:
            self._silent = True
            logger.warning("the source does not answer: a call of it has not returned for %.0f s", reading.waiting)

    def _lose(self, reading: Reading, error: Exception) -> None:
        self._opened = self._opened or reading.opened
        never_there = isinstance(error, FileNotFoundError) and not self._opened
        if not self._hold or never_there or isinstance(error, (ImportError, InvalidSource)):
            raise error
        self._log_lost(error)
        self._dropped, self._reading = self.dropped, None
        reading.close()
        self._backoff.failed()

    def _log_lost(self, error: Exception) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            self.losses += 1
            logger.warning("the source is lost, the last image stays, and it is opened again: %s", describe(error))

    def _reopen(self, timeout: float) -> Reading | None:
        left = self._backoff.left
        time.sleep(min(left, timeout))
        if left <= timeout:
            self._reading = Reading(self._source, self._policy)
        return self._reading

    def close(self) -> None:
        """Close the source; its thread has ended then. Raises what its `close` raised, and what nobody has read of its
        other errors unless they are held; TimeoutError where a call of it does not return."""
        if self._reading is None:
            return
        try:
            self._reading.close()
        except Exception as error:
            if not (self._hold and self._reading.lost and error is self._reading.error):
                raise
            self._log_lost(error)
