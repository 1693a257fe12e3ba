"""Checks of values that come from outside, and what every group of settings is."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TypeGuard

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings: frozen, its types kept to, numbers finite, and no key but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether value is an integer, Python's or numpy's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(
    name: str,
    value: object,
    least: int,
    unit: str = "an integer",
    wrong_type: type[Exception] = ValueError,
    most: int | None = None,
) -> int:
    """Return value. Raise `wrong_type` for what is no integer, ValueError for one below `least` or above `most`."""
    if not is_whole_number(value) or value < least or (most is not None and value > most):
        error = ValueError if is_whole_number(value) else wrong_type
        bounds = f"of {least} or more" if most is None else f"from {least} to {most:,}"
        raise error(f"{name} must be {unit} {bounds}, not {value!r}")
    return int(value)


def check_number(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless value is a finite number or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be finite, and is an integer that is larger than any float") from error
    if not finite:
        raise ValueError(f"{name} must be finite, not {value}")
