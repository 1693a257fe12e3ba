"""Measures of an edit: whether the output has the outline of its target, and in which style it is.

Images are [N, 3, H, W] in [0, 1] on a background of one colour.
"""

import torch
import torch.nn.functional as F
from pairs import overlap

COMPARED = 64  # pixels of a side at which styles are compared


def foreground(images: torch.Tensor, background: float = 1.0, apart: float = 0.1) -> torch.Tensor:
    """Bool [N, 1, H, W]: what is not reached from the border through pixels that differ by less than `apart` from the
    background. Areas inside an object that have the background's colour count as foreground."""
    like = (images - background).abs().amax(1, keepdim=True) < apart
    reached = torch.zeros_like(like)
    reached[..., 0, :] = reached[..., -1, :] = reached[..., 0] = reached[..., -1] = True
    reached &= like
    while True:
        grown = (F.max_pool2d(reached.float(), 3, 1, 1) > 0) & like
        if torch.equal(grown, reached):
            return ~reached
        reached = grown


def outline_agreement(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Intersection over union of the foregrounds [N]."""
    return overlap(foreground(images), foreground(targets))


def nearest(images: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """For each image [N, 3, H, W] the index of the nearest of its candidates [N, K, 3, 64, 64]. A candidate that is NaN is
    never the nearest."""
    small = F.adaptive_avg_pool2d(images, COMPARED)[:, None]
    return (candidates - small).square().mean((2, 3, 4)).nan_to_num(torch.inf).argmin(1)
