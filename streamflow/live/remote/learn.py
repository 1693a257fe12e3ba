"""Learn mode: the next knob that is moved is the one for a field. Knows values and addresses, not where they are from."""

from __future__ import annotations

import threading
from typing import Any

from streamflow.live.remote.knobs import fits
from streamflow.live.remote.settings import Mapping, is_address

MOST_ADDRESSES = 1000  # that are kept; beyond, the one that was heard first is forgotten


class Learner:
    """Listens for the next address that moves, which is: that sends a second value, unlike its first (some programs send
    all they have when they start); or a text, for a field that is one.

    Raises:
        ValidationError: as `Mapping`, for a field, range or smoothing that cannot be.
    """

    def __init__(self, field: str, range: tuple[float, float] = (0.0, 1.0), smoothing: float = 0.0) -> None:
        self._model = Mapping(address="osc:/", field=field, range=range, smoothing=smoothing)
        self._heard: dict[str, Any] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._found: Mapping | None = None

    def hear(self, address: str, *values: Any) -> Mapping | None:
        """The mapping, where this is the address; from any thread. None once there is one."""
        if len(values) != 1 or not fits(self._model.kind, values[0]) or not is_address(address):
            return None
        with self._lock:
            if self._ended.is_set():
                return None
            if address not in self._heard and len(self._heard) >= MOST_ADDRESSES:
                del self._heard[next(iter(self._heard))]
            first = self._heard.setdefault(address, values[0])
            if first == values[0] and self._model.kind != "text":
                return None
            self._found = Mapping(**{**dict(self._model), "address": address})
            self._ended.set()
            return self._found

    def wait(self, timeout: float | None = None) -> Mapping:
        """The mapping, once there is one. TimeoutError after so many seconds without one; then it listens no more."""
        self._ended.wait(timeout)
        with self._lock:
            self._ended.set()
        if self._found is None:
            raise TimeoutError(f"nothing was moved for {self._model.field} within {timeout:g} s")
        return self._found
