"""Image prompts of a network (IP-Adapter): encoded images, their blends, the velocity that passes them on, and the prompt
with a frame's images.

Each row has its own images and scales. An adapter's embeddings are the network's arguments `image_prompt_0`,
`image_prompt_1`, ... `[rows, ...]`, and the scales are `image_prompt_scales` `[rows, adapters]`, float32. An image that a
frame does not have is a zero tensor at scale 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamflow.conditioning.blending import linear
from streamflow.conditioning.prompt import Cond, Prompt, extended
from streamflow.image_utils import Images

PREFIX = "image_prompt_"
SCALES = f"{PREFIX}scales"

Scaled = tuple[Tensor, Tensor]  # an adapter's embeddings, or what was made of them, `[rows, ...]`, and its scales `[rows]`


def embeds_name(i: int) -> str:
    """The name of adapter i's embeddings among the network's arguments."""
    return f"{PREFIX}{i}"


@dataclass(frozen=True, eq=False)
class Encoded:
    """An image, or a blend of several, encoded for one adapter, `[1, ...]`. negative: for the rows of the negative prompt;
    None: the family's own."""

    positive: Tensor
    negative: Tensor | None = None


class ImageEmbeds:
    """Image prompts that are encoded already, in diffusers' shapes. The tensors are copied.

    Args:
        embeds: `ip_adapter_image_embeds`: a tensor for each adapter, or the one tensor of the only one; `[1, images, width]`
            or `[1, images, tokens, width]`, for Stable Diffusion 3 `[1, tokens, width]`. `[2, ...]`, as the pipelines take
            it for guidance in one call, holds the negative prompt's first.
        negative: the negative prompt's apart, as Flux's `negative_ip_adapter_image_embeds`.

    Raises:
        TypeError, ValueError: no tensors of numbers, another batch size, NaN or infinite values on the CPU.
    """

    def __init__(self, embeds: Tensor | Sequence[Tensor], negative: Tensor | Sequence[Tensor] | None = None) -> None:
        given = _tensors("embeds", embeds)
        apart: list[Any] = [None] * len(given) if negative is None else _tensors("negative", negative)
        if len(apart) != len(given):
            raise ValueError(f"{len(given)} embeds and {len(apart)} negative ones: pass a negative one for each adapter")
        self.parts = tuple(_encoded(one, other) for one, other in zip(given, apart, strict=True))

    @classmethod
    def of(cls, parts: Sequence[Encoded]) -> ImageEmbeds:
        """Embeddings in this package's own form, one for each adapter, which are not copied."""
        made = cls.__new__(cls)
        made.parts = tuple(parts)
        return made


ImagePromptArgument = Images | ImageEmbeds | Mapping[str, Any]
"""The forms of an image prompt, which `streamflow.stream.image_prompts.ImagePrompts` lists."""


def _tensors(name: str, value: object) -> list[Tensor]:
    tensors = [value] if isinstance(value, Tensor) else list(value) if isinstance(value, (list, tuple)) else []
    if not tensors or not all(isinstance(one, Tensor) and one.is_floating_point() for one in tensors):
        raise TypeError(f"{name} of ImageEmbeds are a floating tensor for each adapter, not {type(value).__name__}")
    return [one.detach().clone() for one in tensors]


def _encoded(embeds: Tensor, negative: Tensor | None) -> Encoded:
    if negative is None and embeds.ndim > 2 and len(embeds) == 2:
        negative, embeds = embeds.chunk(2)
    for one in (embeds,) if negative is None else (embeds, negative):
        if one.ndim < 3 or len(one) != 1 or one.shape[1:] != embeds.shape[1:]:
            raise ValueError(
                f"embeds of one image prompt are [1, images, ...], or [2, images, ...] with the negative ones first, not "
                f"{list(one.shape)}"
            )
        if one.device.type == "cpu" and not torch.isfinite(one).all():
            raise ValueError("the embeds of an image prompt hold NaN or infinite values")
    return Encoded(embeds, negative)


def blended(parts: Sequence[Encoded], shares: Sequence[float]) -> Encoded:
    """The weighted mean of encoded images, in float32. ValueError: they differ in shape."""
    shapes = {tuple(one.positive.shape) for one in parts}
    if len(shapes) > 1:
        raise ValueError(f"image embeddings of {', '.join(map(str, sorted(shapes)))} cannot be blended: pass equal shapes")
    negatives = [one.negative for one in parts if one.negative is not None]
    negative = _mean(negatives, shares) if len(negatives) == len(parts) else None
    return Encoded(_mean([one.positive for one in parts], shares), negative)


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if len(values) == 1:
        return values[0]
    stacked = torch.stack([one.float() for one in values])
    weights = torch.tensor(shares, dtype=torch.float32, device="cpu").to(stacked.device, non_blocking=True)
    return linear(stacked, weights.reshape(-1, *([1] * (stacked.ndim - 1)))).to(values[0].dtype)


@dataclass(frozen=True, eq=False)
class ImagePrompting:
    """The adapters of a network, for its velocity. arguments: from each adapter's embeddings with their scales to the
    network's arguments. shapes: of each adapter's embeddings of one row, for rows without an image. intact: whether they are
    still in the network."""

    arguments: Callable[[list[Scaled]], dict[str, Any]]
    shapes: tuple[tuple[int, ...], ...]
    intact: Callable[[], bool]


class ImagePromptVelocity(nn.Module):
    """A velocity module whose network has adapters. Without `image_prompt_scales` no row has an image."""

    def __init__(self, velocity: nn.Module, prompting: ImagePrompting):
        super().__init__()
        self.velocity = velocity
        self.arguments, self.shapes = prompting.arguments, prompting.shapes

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        plain = {name: value for name, value in cond.items() if not name.startswith(PREFIX)}
        if SCALES in cond:
            embeds = [cond[embeds_name(i)] for i in range(len(self.shapes))]
            scales = cond[SCALES].unbind(1)
        else:
            embeds = [x.new_zeros(len(x), *shape) for shape in self.shapes]
            scales = [torch.zeros(len(x), device=x.device)] * len(embeds)
        return self.velocity(x, t, **plain, **self.arguments(list(zip(embeds, scales, strict=True))))


def prompted(
    plain: Prompt, images: Mapping[str, Encoded], blanks: Mapping[str, Tensor], scales: Callable[[], Tensor]
) -> Prompt:
    """A prompt with one frame's images.

    images: by the adapters' names. blanks: of every adapter, in order, what stands in the place of an image, `[1, ...]`.
    scales: returns the frame's present scales `[1, adapters]`.
    """

    def add_images(cond: Cond, prompt: Prompt) -> Cond:
        rows = {SCALES: scales()}
        for i, (name, blank) in enumerate(blanks.items()):
            one = images.get(name)
            if one is not None and cond is prompt.uncond:
                if one.negative is None:
                    raise ValueError(f"the image prompt for adapter {name!r} has no negative embeddings")
                rows[embeds_name(i)] = one.negative
            else:
                rows[embeds_name(i)] = blank if one is None else one.positive
        return cond.with_tensors(rows)

    return extended(plain, add_images)
