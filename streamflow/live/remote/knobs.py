"""Values of knobs on their way to `update`: scaled, smoothed, and returned when they change. The time is passed in."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import TypeGuard

from streamflow._files import Json
from streamflow.live.remote.settings import Mapping, weight_number

logger = logging.getLogger(__name__)
REACHED = 1e-3  # of the range: nearer than this, a smoothed value is at its end


Value = float | str  # of a field


def accepts(value: object, kind: str) -> TypeGuard[Value]:
    """Whether a field of this kind takes the value: a text, or a finite number."""
    if kind == "text":
        return isinstance(value, str)
    return isinstance(value, Real) and not isinstance(value, bool) and value < math.inf and not value <= -math.inf


class Knobs:
    """Values in by address, from any thread; fields of `update` out.

    weights: of the prompt's texts at the start. Those without a knob keep them; the default is 1.
    """

    def __init__(self, mappings: Iterable[Mapping] = (), weights: Sequence[float] = ()) -> None:
        self._mappings = {one.address: one for one in mappings}
        self._lock = threading.Lock()
        self._targets: dict[
            str, tuple[Mapping, Value]
        ] = {}  # by field: the value to be reached, and the knob that moved last
        self._values: Json = {f"prompt_weights.{i}": float(weight) for i, weight in enumerate(weights)}
        self._sent: Json = {}
        self._refused: set[str] = set()
        self._before: float | None = None

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """All mappings, those that were added included."""
        with self._lock:
            return tuple(self._mappings.values())

    def add(self, mapping: Mapping) -> None:
        """Add a mapping. It replaces an earlier one of the same address."""
        with self._lock:
            self._mappings[mapping.address] = mapping

    def put(self, address: str, *values: object) -> None:
        """Take what a knob sent. An address without a mapping is ignored. A value that the field cannot take is logged,
        once for each address."""
        try:
            self.take(address, *values)
        except ValueError as error:
            with self._lock:
                logged = address in self._refused
                self._refused.add(address)
            if not logged:
                logger.warning("%s sent %.200r, which is dropped: %s", address, values, error)

    def take(self, address: str, *values: object) -> bool:
        """Take what a knob sent. Return whether the address has a mapping. ValueError: its field cannot take the value."""
        value: object = values[0] if len(values) == 1 else None
        with self._lock:
            mapping = self._mappings.get(address)
            if mapping is None:
                return False
            if accepts(value, mapping.kind):
                self._targets[mapping.field] = mapping, scaled(mapping, value)
                return True
        raise ValueError(f"{mapping.field} takes {'one text' if mapping.kind == 'text' else 'one finite number'}")

    def due(self, now: float) -> Json:
        """The fields that changed since the last call, as `update` takes them. now: seconds of a monotonic clock."""
        with self._lock:
            elapsed = 0.0 if self._before is None else max(0.0, now - self._before)
            self._before = now
            changed = {}
            for field, (mapping, target) in list(self._targets.items()):
                value = smoothed(mapping, self._values.get(field), target, elapsed)
                self._values[field] = value
                if value == target:
                    del self._targets[field]
                out = round(value) if mapping.kind == "integer" and isinstance(value, float) else value
                if self._sent.get(field) != out:
                    self._sent[field] = changed[field] = out
            return self._with_weight_list(changed)

    def _with_weight_list(self, changed: Json) -> Json:
        """The changes, with all prompt weights in one list where one of them changed."""
        fields = {field: value for field, value in changed.items() if weight_number(field) is None}
        if len(fields) < len(changed):
            known = (*self._values, *(one.field for one in self._mappings.values()))
            count = 1 + max(number for field in known if (number := weight_number(field)) is not None)
            fields["prompt_weights"] = [self._values.get(f"prompt_weights.{i}", 1.0) for i in range(count)]
        return fields


def scaled(mapping: Mapping, value: Value) -> Value:
    """A knob's value, clamped to its ends and scaled to the field's range; a text unchanged."""
    if isinstance(value, str):
        return value
    (begin, end), (low, high) = mapping.ends, mapping.range
    share = (min(max(value, min(begin, end)), max(begin, end)) - begin) / (end - begin)
    return float(low + share * (high - low)) if share < 1 else float(high)


def unscaled(mapping: Mapping, value: object) -> float | None:
    """The knob's value that `scaled` turns into this one of the field, within its ends; None where it is no number."""
    if mapping.kind == "text" or not accepts(value, mapping.kind):
        return None
    (begin, end), (low, high) = mapping.ends, mapping.range
    share = (float(value) - low) / (high - low) if high != low else 0.0
    return begin + min(max(share, 0.0), 1.0) * (end - begin)


def smoothed(mapping: Mapping, value: Value | None, target: Value, elapsed: float) -> Value:
    """The value after `elapsed` seconds: `target + (value - target) exp(-elapsed / smoothing)`."""
    if not mapping.smoothing or not isinstance(value, float) or not isinstance(target, float):
        return target
    value = target + (value - target) * math.exp(-elapsed / mapping.smoothing)
    near = REACHED * abs(mapping.range[1] - mapping.range[0])
    return target if abs(value - target) <= near else value
