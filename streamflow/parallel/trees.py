"""Arguments and results of modules: tensors, and tuples, mappings, diffusers' outputs and posteriors that hold tensors."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments, Function

T = TypeVar("T")


def map_tensors(function: Function, *values: Any) -> Any:
    """The first value with every tensor replaced by `function` of it and of the tensors at its place in the other values,
    which have the same structure. An object with tensors as attributes (`DiagonalGaussianDistribution`) is copied."""
    first = values[0]
    if isinstance(first, Tensor):
        return function(*values)
    if isinstance(first, Mapping):
        return type(first)(**{name: map_tensors(function, *(value[name] for value in values)) for name in first})
    if isinstance(first, (tuple, list)):
        return type(first)(map_tensors(function, *parts) for parts in zip(*values, strict=True))
    held = [name for name, value in getattr(first, "__dict__", {}).items() if isinstance(value, Tensor)]
    if not held:
        return first
    made = copy.copy(first)
    for name in held:
        setattr(made, name, function(*(getattr(value, name) for value in values)))
    return made


def join_rows(values: list[T]) -> T:
    """The results of several shares of rows as one: every tensor concatenated along its first dimension."""
    return values[0] if len(values) == 1 else map_tensors(_cat, *values)


def _cat(*tensors: Tensor) -> Tensor:
    if not tensors[0].dim():
        raise TypeError("the result is a single number and has no rows, so the shares of several devices cannot be joined")
    return torch.cat(tensors)


def take_rows(value: T, rows: range, n: int) -> T:
    """The value with these rows of every tensor that has n rows. Other tensors stay whole."""
    return map_tensors(lambda t: t[rows.start : rows.stop] if t.dim() and len(t) == n else t, value)


def list_tensors(value: object) -> list[Tensor]:
    """All tensors of a value, in the order of `map_tensors`."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, value)
    return found


def batch_size(args: tuple) -> int:
    """The rows of a call's first argument.

    Raises:
        TypeError, ValueError: the first argument is no tensor with a batch dimension, or it has no rows.
    """
    if not args or not isinstance(args[0], Tensor) or not args[0].dim():
        raise TypeError("the first argument must be a tensor whose first dimension is the batch")
    if not len(args[0]):
        raise ValueError(f"the batch is empty, {list(args[0].shape)}: pass one row or more")
    return len(args[0])


def rows_of_call(args: tuple, kwargs: Arguments, rows: range, shared: Collection[str] = ()) -> tuple:
    """(args, kwargs) of a call with these rows of its batch only. shared: names of arguments that stay whole."""
    n = len(args[0])
    return take_rows(args, rows, n), {
        name: value if name in shared else take_rows(value, rows, n) for name, value in kwargs.items()
    }
