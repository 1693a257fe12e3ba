"""Reading from a socket for a limited time, however slowly the bytes come. Knows sockets; no protocol."""

from __future__ import annotations

import io
import socket
import time


class DeadlineReader(io.RawIOBase):
    """The bytes of a socket until a deadline, and no more than so many of them. A socket's own timeout is not enough: it
    begins again with every byte.

    raw: the socket's own reader. seconds, size: the limits, in seconds and bytes, until `restart`.

    Raises, from reads: TimeoutError after the deadline, OSError beyond the size.
    """

    def __init__(self, connection: socket.socket, raw: io.RawIOBase, seconds: float, size: int) -> None:
        self._connection, self._raw = connection, raw
        self.restart(seconds, size)

    def restart(self, seconds: float, size: int) -> None:
        """New limits, which begin now."""
        self._seconds, self._size = seconds, size
        self._end, self._left = time.monotonic() + seconds, size

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int | None:
        """Wait for some bytes and put them into the buffer; how many, 0 at the end."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError(f"it was not complete after {self._seconds:g} s")
        if not self._left:
            raise OSError(f"it was not complete after {self._size:,} bytes")
        self._connection.settimeout(seconds)
        count = self._raw.readinto(memoryview(buffer)[: self._left])
        self._left -= count or 0
        return count

    def close(self) -> None:
        """Close the socket's reader too."""
        if not self.closed:
            self._raw.close()
        super().close()
