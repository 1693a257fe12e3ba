"""Arguments and results of modules, as trees of `torch.utils._pytree`, which knows diffusers' outputs. A leaf is a tensor or
an object that holds tensors as attributes, such as the posterior of a VAE (`DiagonalGaussianDistribution`)."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments, Function

T = TypeVar("T")


def _held_tensors(leaf: object) -> dict[str, Tensor]:
    return {name: value for name, value in getattr(leaf, "__dict__", {}).items() if isinstance(value, Tensor)}


def map_tensors(function: Function, value: T, *others: T) -> T:
    """The first value with every tensor replaced by `function` of it and of the tensors at its place in the other values,
    which have the same structure. An object with tensors as attributes is copied."""

    def map_leaf(leaf: Any, *rest: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf, *rest)
        if not (held := _held_tensors(leaf)):
            return leaf
        made = copy.copy(leaf)
        for name, tensor in held.items():
            setattr(made, name, function(tensor, *(getattr(one, name) for one in rest)))
        return made

    return tree_map(map_leaf, value, *others)


def list_tensors(value: object) -> list[Tensor]:
    """All tensors of a value, in the order of `map_tensors`."""
    leaves = tree_leaves(value)
    return [t for leaf in leaves for t in ([leaf] if isinstance(leaf, Tensor) else _held_tensors(leaf).values())]


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


def batch_size(args: tuple) -> int:
    """The rows of a call's first argument. TypeError, ValueError: it is no tensor, or has no rows."""
    if not args or not isinstance(args[0], Tensor) or not args[0].dim():
        raise TypeError("the first argument must be a tensor whose first dimension is the batch")
    if not len(args[0]):
        raise ValueError(f"the batch is empty, {list(args[0].shape)}: pass one row or more")
    return len(args[0])


def rows_of_call(args: tuple, kwargs: Arguments, rows: range, shared: Collection[str] = ()) -> tuple:
    """(args, kwargs) of a call with these rows of its batch only. shared: names of arguments that stay whole."""
    n = len(args[0])
    return take_rows(args, rows, n), {k: v if k in shared else take_rows(v, rows, n) for k, v in kwargs.items()}
