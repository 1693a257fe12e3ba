"""The protocol of what frames are drawn under beside their prompt. A new condition of each frame is a class of this form in
the table of `StreamFlow`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from streamflow.stream.ring import Group


@dataclass(frozen=True, eq=False)
class Start:
    """What the frames of a group start from. noise: `[F, ...]`, their own. sigma: the noise level, `[1, 1, ...]`. x0,
    images: the clean latents and images; None for frames that start from noise."""

    noise: Tensor
    sigma: Tensor
    x0: Tensor | None = None
    images: Tensor | None = None


class Conditioner(Protocol):
    """A condition that calls bring by an argument, read frame by frame.

    name: of that argument. active: frames need the condition, or have it, where a call does not bring it. uses_image: a
    frame under it makes use of its own image, also where its noise hides that.
    """

    name: str
    active: bool
    uses_image: bool

    def read(self, given: Any, images: Tensor | None, positions: range) -> list[Any]:
        """What a call brings for some frames, one entry a frame, None for a frame without the condition. images:
        `[n, 3, H, W]` in [-1, 1], the frames' own; None for frames that start from noise. positions: the frames' rows,
        counted from the first row of a group. Raises TypeError or ValueError before anything has changed."""
        ...

    def compared(self, entries: Sequence[Any]) -> Tensor | None:
        """What the similarity filter compares beside the frames' images, `[n, C, H, W]`; None: nothing."""
        ...

    def join(self, group: Group, entries: Sequence[Any], start: Start) -> Group:
        """The group under the condition, by one entry a row."""
        ...


Conditions = Sequence[tuple[Conditioner, Sequence[Any]]]
"""Conditioners with one entry a frame."""
