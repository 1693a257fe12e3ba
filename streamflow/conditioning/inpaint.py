"""Inpainting: part of a frame is known and the rest is drawn. In every stage the known part of a row is its own latent at
the row's noise level, made with the frame's own noise; so it ends as it is, and the network sees it on its way.

    x_next = (1 - mask) path(x0, noise, sigma_next) + mask x_next

It is the rule of diffusers' inpainting pipelines for networks without mask channels (pipelines/stable_diffusion_3/
pipeline_stable_diffusion_3_inpaint.py, pipelines/flux/pipeline_flux_inpaint.py, the end of the denoising loop). A mask is 1
where the frame is drawn. This file handles masks, latents and images, not networks, prompts or stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from streamflow.image_utils import Images

Path = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Region:
    """The known part of one frame. `mask` bool `[1, 1, H, W]`, true where it is drawn, and `latent_mask` `[1, ...]`, the
        same in the form of latents. `image` `[1, 3, H, W]` in [-1, 1] and its clean latent `x0` `[1, ...]`; None: the
        frame's own. paste: put the image's pixels back into the drawn one. given: the mask as a call brought it; None: it
    was set before."""

    mask: Tensor
    latent_mask: Tensor
    image: Tensor | None = None
    x0: Tensor | None = None
    paste: bool = True
    given: Tensor | None = None


X0, NOISE, MASK = "known_x0", "known_noise", "known_mask"  # what the rows of inpainted frames carry


def put_known(x: Tensor, known: Mapping[str, Tensor], sigma: Tensor, path: Path) -> Tensor:
    """Rows x `[rows, ...]` at levels sigma with their known part in place: clean latents `X0` and `NOISE` `[rows, ...]`, and
    `MASK` `[rows, ...]`, which broadcasts against them. A row of which nothing is known has a mask of 1."""
    mask = known[MASK]
    return (1 - mask) * path(known[X0], known[NOISE], sigma) + mask * x


@dataclass(frozen=True, eq=False)
class Paste:
    """Known pixels to put back: `pixels` `[F, 3, H, W]` in [-1, 1] where `drawn`, bool `[F, 1, H, W]`, is false."""

    pixels: Tensor
    drawn: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Decoded images `[F, 3, H, W]` with the known pixels in their place."""
        drawn, pixels = self.drawn.to(images.device), self.pixels.to(images.device, images.dtype)
        return torch.where(drawn, images, pixels)


def known_rows(regions: Sequence[Region | None], x0: Tensor | None, noise: Tensor) -> dict[str, Tensor]:
    """The known parts of the frames that enter, as `put_known` takes them. regions: one a frame, at least one of them not
    None. x0: `[F, ...]`, the frames' own clean latents, where they came from images. noise: `[F, ...]`, the frames' own."""
    free = torch.ones_like(next(one for one in regions if one).latent_mask)
    latents = [noise[i : i + 1] if one is None else _first(one.x0, x0, i) for i, one in enumerate(regions)]
    masks = [free if one is None else one.latent_mask for one in regions]
    return {X0: torch.cat(latents), NOISE: noise, MASK: torch.cat(masks)}


def paste_of(regions: Sequence[Region | None], images: Tensor | None) -> Paste | None:
    """The known pixels of the frames' images, or None. `images` `[F, 3, H, W]`: the frames' own."""
    pasting = [one if one and one.paste else None for one in regions]
    if not any(pasting):
        return None
    like = next(one for one in pasting if one)
    everywhere, black = torch.ones_like(like.mask), torch.zeros_like(_first(like.image, images, 0))
    pixels = [black if one is None else _first(one.image, images, i) for i, one in enumerate(pasting)]
    return Paste(torch.cat(pixels), torch.cat([everywhere if one is None else one.mask for one in pasting]))


def _first(own: Tensor | None, frames: Tensor | None, i: int) -> Tensor:
    """The region's own tensor, or row i of the frames'."""
    if own is not None:
        return own
    if frames is None:
        raise ValueError(f"frame {i} has a mask and no image, so that nothing of it is known: pass an image too")
    return frames[i : i + 1]


# -- masks from outside ------------------------------------------------------------------------------------------------


def read_mask(mask: Images, height: int, width: int, check: bool = False) -> Tensor:
    """Make bool `[n, 1, height, width]` of one mask or several, true (white) where images are drawn. Grey counts as white
    from one half on, as in diffusers' mask processor.

    mask: a PIL image in mode "1", "L" or "RGB"; an array or tensor `[H, W]`, `[n, H, W]` or `[n, 1, H, W]`, of bool, of
        uint8 (0..255) or floating (0..1); or a list of masks. check: also look at the values of tensors that are not on
        the CPU, which makes the host wait.

    Raises:
        TypeError: not a mask, or of a dtype that is none.
        ValueError: number of dimensions, size, NaN or range; with what was found and the remedy.
    """
    if isinstance(mask, (list, tuple)):
        if not mask:
            raise ValueError("an empty list of masks")
        return torch.cat([read_mask(one, height, width, check) for one in mask])
    mask = _as_tensor(mask)
    if mask.ndim not in (2, 3, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        raise ValueError(f"a mask is [H, W], [n, H, W] or [n, 1, H, W], not {list(mask.shape)}: it has no colours")
    if tuple(mask.shape[-2:]) != (height, width):
        raise ValueError(
            f"a mask of {mask.shape[-1]}x{mask.shape[-2]} for a stream of {width}x{height}: resize it with its image, by "
            f"nearest neighbour, so that its edge stays sharp"
        )
    if not mask.numel():
        raise ValueError("an empty list of masks")
    mask = mask.reshape(-1, 1, height, width)
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype == torch.uint8:
        return mask >= 128
    if not mask.is_floating_point():
        raise TypeError(f"a mask is of bool, uint8 (0..255) or floating (0..1), not {mask.dtype}")
    if check or mask.device.type == "cpu":
        _check_values(mask)
    return mask >= 0.5


def _as_tensor(mask: Images) -> Tensor:
    if isinstance(mask, PIL.Image.Image):
        if mask.mode not in ("1", "L", "RGB"):
            raise ValueError(f"a mask in mode {mask.mode}: pass mask.convert('L'), white where the image is drawn")
        mask = np.array(mask.convert("L"))
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.require(mask, requirements=("C", "W")))
    if not isinstance(mask, Tensor):
        raise TypeError(f"a mask is a PIL image, a numpy array or a tensor, not {type(mask).__name__}")
    return mask


def _check_values(mask: Tensor) -> None:
    least, most = mask.aminmax()
    if not (least >= 0 and most <= 1):
        raise ValueError(
            f"the mask's values run from {least:.4g} to {most:.4g}, outside of [0, 1]: 1 is drawn, 0 is known; masks of "
            f"0..255 are uint8"
        )
