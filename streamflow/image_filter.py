"""Skip frames that resemble the last drawn one: StreamDiffusion's stochastic similarity filter, corrected. It has its own
seeded random numbers, its skip count restarts at every drawn frame, and it never waits."""

from __future__ import annotations

import random

import torch
from torch import Tensor


class SimilarImageFilter:
    """`filter(x)` returns x, or None if the frame is skipped.

    The chance to skip rises from 0 at a cosine similarity of `threshold` to 1 for an equal frame (Kodaira et al.,
    arXiv 2312.12491, section 3.4). After `max_skip_frame` skips in a row the next frame is drawn whatever it looks
    like. A tensor on a GPU costs one synchronisation a frame; a stream filters before it uploads.
    """

    def __init__(self, threshold: float = 0.98, max_skip_frame: float = 10, seed: int = 0) -> None:
        self.seed, self._to_draw = seed, 0
        self.set_threshold(threshold)
        self.set_max_skip_frame(max_skip_frame)
        self.reset()

    def __call__(self, x: Tensor) -> Tensor | None:
        if not self._to_draw and self._similar(x) and self.skip_count < self.max_skip_frame:
            self.skip_count += 1
            return None
        self._to_draw = max(0, self._to_draw - 1)
        self.skip_count = 0
        self.prev_tensor = x.detach().clone()
        return x

    def _similar(self, x: Tensor) -> bool:
        previous = self.prev_tensor
        if previous is None or previous.shape != x.shape or self.threshold >= 1:
            return False
        similarity = torch.cosine_similarity(previous.flatten().float(), x.flatten().float(), dim=0, eps=1e-6).item()
        return self._random.random() < 1 - (1 - similarity) / (1 - self.threshold)

    def reset(self) -> None:
        """Forget the last frame, the count and the place in the random sequence."""
        self.forget()
        self._random = random.Random(self.seed)

    def forget(self, frames: int = 1) -> None:
        """Forget the last frame, so that at least the next `frames` are drawn, whatever they look like."""
        self.prev_tensor: Tensor | None = None
        self.skip_count = 0
        self._to_draw = max(self._to_draw, frames)

    def set_threshold(self, threshold: float) -> None:
        """At 1 and above nothing is skipped. ValueError below 0, and for NaN."""
        if not threshold >= 0:
            raise ValueError(f"threshold is a cosine similarity, 0 or more, not {threshold}")
        self.threshold = threshold

    def set_max_skip_frame(self, max_skip_frame: float) -> None:
        """How many frames in a row may be skipped; 0 skips none. ValueError below 0, and for NaN."""
        if not max_skip_frame >= 0:
            raise ValueError(f"max_skip_frame must be 0 or more, not {max_skip_frame}")
        self.max_skip_frame = max_skip_frame
