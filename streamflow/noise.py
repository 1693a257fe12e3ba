"""Noise for frames: one float32 draw a frame on the CPU, by (seed, frame id), so that neither the batch nor the
call pattern nor the device can change a picture. No global random state is read or written."""

from __future__ import annotations

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

    def preview(self) -> Tensor:
        """What `fixed` would give, drawn aside: a generator's state stays as it is."""
        if self._fixed is not None or self._generator is None:
            return self.fixed()
        aside = torch.Generator(self._generator.device)
        return NoiseSource(self.shape, generator=aside.set_state(self._generator.get_state())).fixed()

    def _normal(self, key: tuple[int, int]) -> Tensor:
        generator = self._generator or _generator(self.seed, key)
        return torch.randn((1, *self.shape), generator=generator, device=generator.device, dtype=torch.float32)


def _generator(seed: int, key: tuple[int, int]) -> torch.Generator:
    """A generator whose state mixes the seed with the key, so that neighbouring seeds and frames share nothing."""
    state = 0
    for part in (seed, *key):
        state = _mix(state ^ (part & _MASK))
    return torch.Generator("cpu").manual_seed(state)


_MASK = 0xFFFF_FFFF_FFFF_FFFF


def _mix(z: int) -> int:
    """One step of splitmix64 (Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014)."""
    z = (z + 0x9E37_79B9_7F4A_7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return z ^ (z >> 31)
