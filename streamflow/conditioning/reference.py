"""Reference images, which edit models see beside the noise: what a family makes of them, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from streamflow.conditioning.prompt import Extend, Prompt

if TYPE_CHECKING:
    from streamflow.models.adapter import FlowAdapter
    from streamflow.models.protocols import Arguments

Size = tuple[int, int]  # (width, height) in pixels
Grid = tuple[int, int]  # (height, width) in tokens
Image = PIL.Image.Image | np.ndarray | Tensor  # one, as `image_utils.image_tensor` takes it


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference image of a frame. image: `[1, 3, h, w]` in [-1, 1]. latents: clean, `[1, ...]`; None where the rule does
    not use the codec. grid: how many tokens it is high and wide."""

    image: Tensor
    latents: Tensor | None
    grid: Grid


@dataclass(frozen=True, eq=False)
class OwnSize:
    """One reference of some frames, one image a frame: `[1, 3, h, w]` in [-1, 1], in the pipeline's size."""

    images: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class FixedReferences:
    """References of all frames by name, in the order in which they were set; copies of what the caller gave."""

    images: Mapping[str, Image] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Entering:
    """A frame that enters with references. prompt: its own. x: its latents `[1, ...]`. time: of its first step, `[1]`.
    exact: make every tensor with the shapes of the pipeline's own calls, so that the bits are the pipeline's. read: encodes
    the prompt in force with more arguments of the pipeline. reuse: how much a pixel may differ where a rule keeps what it
    computed of a token; None: nothing is kept. memory: what the rule keeps of the last frame in the same row."""

    prompt: Prompt
    x: Tensor
    time: Tensor
    exact: bool
    read: Callable[[Arguments], Prompt]
    reuse: float | None = None
    memory: dict[str, Any] = field(default_factory=dict)


class ReferenceRule:
    """A family's rule for references. A subclass sets the class attributes and defines `sizes` and `ids`.

    least, most: the number of references that a frame must and may have; most None: any.
    uses_codec: references are encoded by the stream's codec.
    reusable: `extend` depends on the references and the prompt alone, and need not be called again for the same ones.
    keeps: it can keep what it computed of tokens that do not change (`Entering.reuse`).
    """

    least: ClassVar[int] = 0
    most: ClassVar[int | None] = None
    uses_codec: ClassVar[bool] = True
    reusable: ClassVar[bool] = False
    keeps: ClassVar[bool] = False

    def sizes(self, adapter: FlowAdapter, size: Size, arguments: Arguments) -> tuple[Size, Size]:
        """The size to which the pipeline resizes a reference of this size, and the size that it crops from the middle of
        that. arguments: of the pipeline's call. ValueError for a size that the pipeline refuses."""
        raise NotImplementedError

    def tokens(self, references: Sequence[Reference]) -> Tensor:
        """The references as the network's tokens `[1, n, channels]`."""
        return torch.cat([self.in_tokens(one.latents) for one in references if one.latents is not None], 1)

    def in_tokens(self, latents: Tensor) -> Tensor:
        """Latents `[1, ...]` as tokens `[1, n, channels]`."""
        return latents

    def ids(self, grids: Sequence[Grid], like: Tensor) -> Tensor:
        """The position ids of the tokens of references with these grids, on the device of `like`, in its dtype."""
        raise NotImplementedError

    def extend(self, adapter: FlowAdapter, references: Sequence[Reference], entering: Entering) -> Extend:
        """What gives the conds of a frame its references. By default they are the network's arguments `references`
        `[1, n, channels]` and `reference_ids`."""
        tokens = self.tokens(references)
        grids = tuple(one.grid for one in references)
        ids = self.ids(grids, entering.prompt.cond.shared["img_ids"])
        return lambda cond, prompt: cond.with_tensors({"references": tokens}, {"reference_ids": ids}, grids)


def several(given: Any) -> Sequence[Any]:
    """A list or a tuple of references as it is, one reference as a tuple, and none for None."""
    if given is None:
        return ()
    return given if isinstance(given, (list, tuple)) else (given,)
