"""What a VAE's `encode` and `decode` take and give: tensors, and whatever holds tensors (tuples, mappings, diffusers' output
classes, a posterior). Knows how to walk these, not what they mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor


def mapped(act: Callable[..., Any], *values: Any) -> Any:
    """`act` on the tensors of one value, or of several of like structure side by side; all else is the first value's. An
    object that holds tensors in its attributes (`DiagonalGaussianDistribution`) is copied with them replaced."""
    first = values[0]
    if isinstance(first, Tensor):
        return act(*values)
    if isinstance(first, Mapping):
        return type(first)(**{name: mapped(act, *(value[name] for value in values)) for name in first})
    if isinstance(first, (tuple, list)):
        return type(first)(mapped(act, *parts) for parts in zip(*values, strict=True))
    held = [name for name, value in getattr(first, "__dict__", {}).items() if isinstance(value, Tensor)]
    if not held:
        return first
    made = copy.copy(first)
    for name in held:
        setattr(made, name, act(*(getattr(value, name) for value in values)))
    return made


def joined(values: list[Any]) -> Any:
    """Results of several shares of rows as one: every tensor joined along its first dimension."""
    return values[0] if len(values) == 1 else mapped(_cat, *values)


def _cat(*tensors: Tensor) -> Tensor:
    if not tensors[0].dim():
        raise TypeError("a result without rows, a single number, cannot be put together from several devices' shares")
    return torch.cat(tensors)


def rows_of(value: Any, rows: range, n: int) -> Any:
    """These rows of every tensor that has n of them; others belong to all rows."""
    return mapped(lambda t: t[rows.start : rows.stop] if t.dim() and len(t) == n else t, value)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a value."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(keep, value)
    return found


def batch_size(args: tuple) -> int:
    """The rows of a call's first argument.

    Raises:
        TypeError, ValueError: the first argument is no tensor with a batch dimension, or it has no rows.
    """
    if not args or not isinstance(args[0], Tensor) or not args[0].dim():
        raise TypeError("the first argument must be a tensor whose first dimension is the batch")
    if not len(args[0]):
        raise ValueError(f"the batch is empty, its shape is {list(args[0].shape)}: pass one row or more")
    return len(args[0])


def rows_of_call(args: tuple, kwargs: Mapping[str, Any], rows: range, shared: Collection[str] = ()) -> tuple:
    """(args, kwargs) of a call with these rows of its batch only. shared: names of arguments that stay whole."""
    n = len(args[0])
    return rows_of(args, rows, n), {
        name: value if name in shared else rows_of(value, rows, n) for name, value in kwargs.items()
    }
