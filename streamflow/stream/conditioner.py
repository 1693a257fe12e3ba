"""The protocol of conditions of frames besides their prompt. To add a condition, write a subclass and add it
to `Inputs.conditioners` in `StreamFlow`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from streamflow.conditioning.prompt import Prompt
from streamflow.stream.ring import Group


@dataclass(frozen=True, eq=False)
class Start:
    """The start of the frames of a group. noise: `[F, ...]`, their own. sigma: the noise level, `[1, 1, ...]`. x0, images:
    the clean latents and images; None for frames that start from noise."""

    noise: Tensor
    sigma: Tensor
    x0: Tensor | None = None
    images: Tensor | None = None


class Conditioner(Protocol):
    """A condition that is an argument of calls, with one entry a frame.

    name: the argument's name. active: `read` is called for calls without the argument too. uses_image: a frame under the
    condition uses its own image even where it starts from pure noise.
    """

    name: str
    active: bool
    uses_image: bool

    def read(self, given: Any, images: Tensor | None, positions: range) -> Sequence[Any]:
        """Read a call's argument for some frames. Returns one entry a frame, None for a frame without the condition. images:
        `[n, 3, H, W]` in [-1, 1], the frames' own; None for frames that start from noise. positions: the frames' rows,
        counted from the first row of a group. Raises TypeError or ValueError, and changes nothing."""
        ...

    def compared(self, entries: Sequence[Any]) -> Tensor | None:
        """What the similarity filter compares besides the frames' images, `[n, C, H, W]`; None: nothing."""
        ...

    def example(self, prompt: Prompt) -> Prompt:
        """The prompt with the tensors that the condition adds to that of a frame, for acceleration."""
        ...

    def begin(self, entries: Sequence[Any], images: Tensor | None) -> None:
        """Start what may run beside the encoding of a group's images, given one entry a row; `join` follows. images: as
        `Start.images`. By default it does nothing."""

    def join(self, group: Group, entries: Sequence[Any], start: Start) -> Group:
        """The group with the condition, given one entry a row."""
        ...


Conditions = Sequence[tuple[Conditioner, Sequence[Any]]]
"""Conditioners with one entry a frame."""
