"""Checks of values that come from outside, and what every group of settings is."""

from __future__ import annotations

import math
from numbers import Real

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings: frozen, its types kept to, numbers finite, and no key but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless value is an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of 1 or more, not {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless value is a finite number or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
