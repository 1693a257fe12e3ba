"""Encoded prompts, and how the prompts of a batch's rows become the network's arguments.

A `Cond` is one prompt's tensors by the names of the network's own arguments. Rows with conds of one signature (names,
shapes, dtypes) share a call of the network. There is one call for each signature, so that texts are never padded and the
result is exact for every family.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Velocity = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Cond:
    """`rows`: tensors `[1, ...]`, one row a frame. `shared`: tensors without a batch dimension, such as position ids.
    `layout`: what the values of `shared` depend on, where their shapes do not tell it."""

    rows: Mapping[str, Tensor]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    layout: Hashable = None

    @cached_property
    def signature(self) -> tuple:
        """Names, shapes and dtypes of all tensors, and the layout. Conds with equal signatures can share a call."""
        rows = tuple((name, tuple(t.shape[1:]), t.dtype) for name, t in sorted(self.rows.items()))
        return rows, tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(self.shared.items())), self.layout

    def with_tensors(
        self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor] | None = None, layout: Hashable = None
    ) -> Cond:
        """This cond with more tensors, and with a layout where one is given."""
        return Cond({**self.rows, **rows}, {**self.shared, **(shared or {})}, self.layout if layout is None else layout)

    def to(self, device: torch.device) -> Cond:
        """This cond with its tensors on a device."""
        rows, shared = ({name: value.to(device) for name, value in one.items()} for one in (self.rows, self.shared))
        return Cond(rows, shared, self.layout)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt's cond and, where guidance needs one, the negative prompt's."""

    cond: Cond
    uncond: Cond | None = None

    @property
    def negative(self) -> Cond:
        """`uncond`. ValueError where the prompt has none."""
        if self.uncond is None:
            raise ValueError("this prompt was encoded without a negative prompt, and this guidance needs one")
        return self.uncond

    def differing(self, other: Prompt) -> frozenset[str]:
        """The names of the tensors in which another prompt differs. On a GPU the host waits for the answer."""
        pairs = [(self.cond, other.cond)] + ([(self.uncond, other.uncond)] if self.uncond and other.uncond else [])
        return frozenset(name for mine, its in pairs for name in its.rows if not _equal(mine.rows.get(name), its.rows[name]))

    def taking(self, other: Prompt, names: frozenset[str]) -> Prompt:
        """This prompt with the tensors of these names from another one."""
        if names >= set(self.cond.rows):
            return other
        uncond = self.uncond
        if uncond is not None and other.uncond is not None:
            uncond = _taking(uncond, other.uncond, names)
        return Prompt(_taking(self.cond, other.cond, names), uncond)


Extend = Callable[[Cond, Prompt], Cond]
"""(one of a prompt's conds, the prompt) to that cond with the tensors of one frame."""


@dataclass(frozen=True, eq=False)
class ExtendedPrompt(Prompt):
    """A prompt with the tensors that a condition of one frame adds. plain: the prompt without them. extend: adds them."""

    plain: Prompt = field(kw_only=True)
    extend: Extend = field(kw_only=True)

    def taking(self, other: Prompt, names: frozenset[str]) -> Prompt:
        """As `Prompt.taking`; what the condition adds stays the frame's own."""
        return extended(self.plain.taking(other, names), self.extend)


def extended(plain: Prompt, extend: Extend) -> ExtendedPrompt:
    """A prompt with what a condition of one frame adds to both of its conds."""
    uncond = None if plain.uncond is None else extend(plain.uncond, plain)
    return ExtendedPrompt(extend(plain.cond, plain), uncond, plain=plain, extend=extend)


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b)


def _taking(cond: Cond, other: Cond, names: frozenset[str]) -> Cond:
    rows = {name: other.rows[name] if name in names else value for name, value in cond.rows.items()}
    return Cond(rows, cond.shared, cond.layout)


def stack(conds: Sequence[Cond], buffers: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The network's arguments for rows under these conds, all of one signature. buffers: tensors to be written where they
    fit."""
    arguments = dict(conds[0].shared)
    for name in conds[0].rows:
        rows = [cond.rows[name] for cond in conds]
        buffer = None if buffers is None else buffers.get(name)
        fits = buffer is not None and buffer.dtype == rows[0].dtype and buffer.shape == (len(rows), *rows[0].shape[1:])
        arguments[name] = torch.cat(rows, out=buffer if fits else None)
    return arguments


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the network: its arguments, and the rows of the batch it serves (None: all of them)."""

    arguments: dict[str, Tensor]
    rows: Tensor | None = None


class CondBatch:
    """The arguments of the network for a batch of rows, in buffers that keep their address while shapes do."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self.arguments: dict[str, Tensor] | None = None  # of all rows, where one call serves them

    def set(self, conds: tuple[Cond, ...]) -> None:
        """Give row i the cond conds[i]."""
        self._calls = self._build(conds)
        self.arguments = self._calls[0].arguments if self._calls[0].rows is None else None

    def velocity(self, network: Velocity, x: Tensor, t: Tensor) -> Tensor:
        """The network's velocity of rows x `[rows, ...]` at times t `[rows]`, by one call for each signature."""
        parts = [network(x[call.rows], t[call.rows], **call.arguments) for call in self._calls]
        v = parts[0].new_empty((len(x), *parts[0].shape[1:]))
        for call, part in zip(self._calls, parts, strict=True):
            v[call.rows] = part
        return v

    def _build(self, conds: tuple[Cond, ...]) -> list[Call]:
        by_signature: dict[tuple, list[int]] = {}
        for row, cond in enumerate(conds):
            by_signature.setdefault(cond.signature, []).append(row)
        if len(by_signature) == 1:
            return [Call(self._stack(conds))]
        device = next(iter(conds[0].rows.values())).device
        return [
            Call(self._stack([conds[row] for row in rows]), torch.tensor(rows, device=device))
            for rows in by_signature.values()
        ]

    def _stack(self, conds: Sequence[Cond]) -> dict[str, Tensor]:
        """Stack the conds' rows into the last buffers where those fit, else into new ones."""
        old = self._calls[0].arguments if len(self._calls) == 1 else {}
        return stack(conds, old)
