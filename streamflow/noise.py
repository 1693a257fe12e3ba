"""Noise for frames: one float32 draw a frame on the CPU, by (seed, frame id), so that neither the batch nor the
call pattern nor the device can change a picture. No global random state is read or written."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

POLICIES = ("fixed", "frame")


class NoiseSource:
    """Draws noise of one row's shape.

    Either from a `seed`, then `draw(k)` is a function of (seed, k) alone; or from a `generator`, which is used as it
    is and never reseeded, then draws follow one another.
    """

    def __init__(self, shape: tuple[int, ...], seed: int | None = None, generator: torch.Generator | None = None):
        if (seed is None) == (generator is None):
            raise ValueError("noise comes from a seed or from a generator: pass one of them, not both and not neither")
        self.shape = tuple(shape)
        self.seed = seed
        self._generator = generator
        self._fixed: Tensor | None = None

    def draw(self, frame_id: int) -> Tensor:
        """The noise of a frame, float32 `[1, *shape]` on the CPU (on the generator's device where one was given)."""
        return self._normal((1, frame_id))

    def fixed(self) -> Tensor:
        """The noise that all image frames of a stream share, drawn once; it keeps a still picture still."""
        if self._fixed is None:
            self._fixed = self._normal((0, 0))
        return self._fixed

    def _normal(self, key: tuple[int, int]) -> Tensor:
        generator = self._generator or _generator(self.seed, key)
        return torch.randn((1, *self.shape), generator=generator, device=generator.device, dtype=torch.float32)


def _generator(seed: int, key: tuple[int, int]) -> torch.Generator:
    """A generator whose state mixes the seed with the key, so that neighbouring seeds and frames share nothing."""
    entropy = (seed & 0xFFFF_FFFF_FFFF_FFFF, *key)
    state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator("cpu").manual_seed(state)
