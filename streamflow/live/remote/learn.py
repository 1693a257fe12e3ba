"""Learn mode: the next knob that moves is mapped to a field. Knows values and addresses, not where they come from."""

from __future__ import annotations

import threading

from streamflow._files import Json
from streamflow.live.remote.knobs import accepts
from streamflow.live.remote.settings import Mapping, is_address

MOST_ADDRESSES = 1000  # that are kept; the oldest is dropped for another one


class Learner:
    """Waits for the next address that moves. An address moves when its second value differs from its first, since some
    programs send all their values when they start. For a field that is a text, the first text is enough.

    Raises:
        ValidationError: as `Mapping`, for an invalid field, range or smoothing.
    """

    def __init__(self, field: str, range: tuple[float, float] | None = None, smoothing: float = 0.0) -> None:
        given = {} if range is None else {"range": range}
        self._model = Mapping(address="osc:/", field=field, smoothing=smoothing, **given)
        self._first_values: Json = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._found: Mapping | None = None

    def receive(self, address: str, *values: object) -> Mapping | None:
        """Take what an address sent, from any thread. Return the mapping if this is the address, and None otherwise."""
        if len(values) != 1 or not accepts(values[0], self._model.kind) or not is_address(address):
            return None
        with self._lock:
            if self._ended.is_set():
                return None
            if address not in self._first_values and len(self._first_values) >= MOST_ADDRESSES:
                del self._first_values[next(iter(self._first_values))]
            first = self._first_values.setdefault(address, values[0])
            if first == values[0] and self._model.kind != "text":
                return None
            self._found = Mapping(**{**dict(self._model), "address": address})
            self._ended.set()
            return self._found

    def wait(self, timeout: float | None = None) -> Mapping:
        """Wait for the mapping. TimeoutError after `timeout` seconds; then nothing more is learned."""
        self._ended.wait(timeout)
        with self._lock:
            self._ended.set()
        if self._found is None:
            raise TimeoutError(f"no knob was moved for {self._model.field} within {timeout:g} s")
        return self._found
