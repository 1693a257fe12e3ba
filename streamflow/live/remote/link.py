"""Tempo and beat of an Ableton Link session. Knows aalink; no knob, no field."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from streamflow.io.protocols import need


class LinkInput:
    """Joins the session of the local network, and takes over its tempo. Alone, it keeps the last tempo, 120 BPM at first.

    Raises:
        ImportError: without aalink.
    """

    def __init__(self) -> None:
        aalink = need("aalink", "aalink")

        async def join() -> Any:
            return aalink.Link(120.0)

        with ThreadPoolExecutor(1) as pool:  # it asks for the running event loop, and this thread may have one that is busy
            self._link = pool.submit(asyncio.run, join()).result()
        self._link.enabled = True

    def values(self, now: float) -> dict[str, float]:
        """Phase in [0, 1) within the beat at this moment, and tempo in BPM, by address."""
        return {"link:beat": self._link.beat % 1.0 % 1.0, "link:tempo": self._link.tempo}

    def close(self) -> None:
        """Leave the session."""
        self._link.enabled = False
