"""The four modes of guidance, as a table. A mode defines how many extra (negative) rows a call of the network has, and how
the network's outputs become one velocity a row. It handles rows, not prompts or models.

`none` and `full` are the pipelines' own. `self` and `initialize` are StreamDiffusion's residual guidance
(Kodaira et al., arXiv 2312.12491, section 3.2) in velocity form, and one idea: carry an anchor, the clean latent that the
unprompted flow would reach. The straight line to it is the negative velocity, `v_uncond = (x - anchor) / sigma`.
`self` takes the encoded input image for anchor, `initialize` what one negative row predicts at the first stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamflow.flow.convention import guide, per_row

Rule = Callable[[Tensor, Tensor, float], Tensor]
ALWAYS, NEVER = 0.0, 2.0  # of `Weight.until`: below, and above, every sigma


class Weight(float):
    """The guidance weight w, a number, with its pipeline's rule of guidance.

    rule: (v_cond, v_uncond, w) to the guided velocity; by default `convention.guide`. Pipelines that normalise the guided
        velocity have their own rule. Called with w > 1 only.
    until: rows with a sigma below it are not guided, for pipelines that stop guiding at some step.
    """

    rule: Rule
    until: float

    def __new__(cls, w: float, rule: Rule = guide, until: float = ALWAYS) -> Weight:
        weight = super().__new__(cls, w)
        weight.rule, weight.until = rule, until
        return weight

    def guided(self, v_cond: Tensor, v_uncond: Tensor, sigma: Tensor, known: Tensor | None = None) -> Tensor:
        """The guided velocity of rows `[rows, ...]` at levels `sigma`; `known`, bool `[rows]`: which have a v_uncond."""
        v = self.rule(v_cond, v_uncond, self)
        if self.until > ALWAYS:
            late = sigma.flatten() >= self.until
            known = late if known is None else known & late
        return v if known is None else torch.where(per_row(known, v), v, v_cond)


UNGUIDED = Weight(1.0)


def renormalized(v_cond: Tensor, v_uncond: Tensor, w: float) -> Tensor:
    """Guided, then brought back to the length of v_cond along the last dimension, as Qwen-Image and Lumina2 do
    (diffusers pipelines/qwenimage/pipeline_qwenimage.py, the denoising loop)."""
    v = guide(v_cond, v_uncond, w)
    return v * (torch.norm(v_cond, dim=-1, keepdim=True) / torch.norm(v, dim=-1, keepdim=True))


@dataclass(frozen=True)
class Mode:
    """One row of the table.

    extra_rows(rows, newest): how many of a call's rows get a negative twin. `newest` of the `rows` are at stage 0.
        The twins are always those of the first rows, and stand before them all.
    carries_anchor: rows carry a clean latent, and `delta` acts.
    """

    name: str
    extra_rows: Callable[[int, int], int]
    carries_anchor: bool = False

    @property
    def measures_anchor(self) -> bool:
        """Whether a frame's anchor comes from a negative row at its first stage, and so is known of every frame."""
        return self.carries_anchor and self.extra_rows(1, 1) > 0

    def scale(self, scale: float, delta: float, unguided: float = 1.0) -> float:
        """The pipeline's guidance scale in force: the given one, and under an anchor `delta` of the way to it from the
        scale that does not guide, `unguided + (scale - unguided) delta`."""
        return unguided + (scale - unguided) * delta if self.carries_anchor else scale


MODES = {
    mode.name: mode
    for mode in (
        Mode("none", lambda rows, newest: 0),
        Mode("full", lambda rows, newest: rows),
        Mode("self", lambda rows, newest: 0, carries_anchor=True),
        Mode("initialize", lambda rows, newest: newest, carries_anchor=True),
    )
}


def mode(cfg_type: str) -> Mode:
    """Look a mode up by name; ValueError with the known names otherwise."""
    if cfg_type not in MODES:
        raise ValueError(f"unknown cfg_type {cfg_type!r}: choose one of {', '.join(map(repr, MODES))}")
    return MODES[cfg_type]


@dataclass
class Anchors:
    """What rows carry under `self` and `initialize`: `x0` float32 `[rows, ...]`, and `known`, bool `[rows]`, None for all.
    A row without a known anchor is not guided."""

    x0: Tensor
    known: Tensor | None = None


class Lines(Protocol):
    """From outputs of the network for the first rows to estimates of images, and back (`ring.Rows`)."""

    def x0(self, x: Tensor, v: Tensor) -> Tensor:
        """The estimate of the image, given these outputs."""
        ...

    def toward(self, x: Tensor, x0: Tensor) -> Tensor:
        """The outputs that lead to this image."""
        ...


def combine(
    v_cond: Tensor, v_extra: Tensor, x: Tensor, sigma: Tensor, w: Weight, anchors: Anchors | None, lines: Lines
) -> Tensor:
    """The guided velocity of all rows, `[rows, ...]`.

    v_cond: the network's output for the rows. v_extra `[extra_rows, ...]`: its output for their negative twins. With
    anchors, the anchors of the twins' rows are measured here and kept.
    """
    n = len(v_extra)
    if anchors is not None and n:
        anchors.x0[:n] = lines.x0(x[:n], v_extra)
    if w <= 1.0 or (anchors is None and not n):
        return v_cond
    if anchors is None:
        return w.guided(v_cond, v_extra, sigma)
    return w.guided(v_cond, lines.toward(x, anchors.x0).to(v_cond.dtype), sigma, anchors.known)
