"""Noise for frames: one float32 draw a frame on the CPU, by (seed, frame id), so that neither the batch nor the
call pattern nor the device can change an image. No global random state is read or written."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from streamflow._validation import is_whole_number, whole_number

logger = logging.getLogger(__name__)
RANDOM_SEEDS = 1_000_000  # random seeds are below it, as in StreamDiffusion's wrapper
POLICIES = ("fixed", "frame", "interpolated", "constant")


def check_policy(noise: object, period: object) -> None:
    """ValueError unless `noise` is one of `POLICIES` and `period` an integer of 1 or more frames."""
    if noise not in POLICIES:
        raise ValueError(f"unknown noise {noise!r}: choose one of {', '.join(map(repr, POLICIES))}")
    whole_number("noise_period", period, 1, "an integer number of frames")


def resolve_seeds(seed: object) -> Any:
    """A seed as an integer, or seeds with weights; -1 is replaced by a random one, which is logged. None stays.

    Raises:
        TypeError: not an integer, and not a tuple of (integer, weight). ValueError: not in 0 .. 2^64 - 1, and not -1.
    """
    if seed is None:
        return None
    if isinstance(seed, tuple):
        return tuple((resolve_seeds(one), weight) for one, weight in seed)
    if not is_whole_number(seed):
        raise TypeError(f"seed must be an integer or a list of (integer, weight), not {seed!r}")
    if seed == -1:
        drawn = random.SystemRandom().randrange(RANDOM_SEEDS)
        logger.info("seed -1 stands for a random one: seed=%d draws the same images again", drawn)
        return drawn
    number = int(seed)
    if not 0 <= number <= _MASK:
        raise ValueError(f"seed must be an integer from 0 to 2^64 - 1, or -1 for a random one, not {seed}")
    return number


def interpolated(noise: Callable[[int], Tensor], frame: int, period: int) -> Tensor:
    """The noise of a frame on the way from `noise(j)` to `noise(j + 1)`, which takes `period` frames, along a quarter of a
    great circle: `cos(a) n_j + sin(a) n_(j+1)` with `a = pi f / 2` at share f of the way, of variance one at every frame."""
    step, share = divmod(frame, int(period))  # numpy's would overflow in the mixing of seeds
    angle = math.pi / 2 * share / period
    return math.cos(angle) * noise(step) + math.sin(angle) * noise(step + 1)


class NoiseSource:
    """Draws noise of one row's shape.

    Either from a `seed`, then `draw(k)` is a function of (seed, k) alone; or from a `generator`, which is used as it
    is and never reseeded, then draws follow one another. Several seeds with weights, `((1, 0.5), (7, 0.5))`, give
    `sum_i w_i n_i / |w|`: Gaussian, of variance one whatever the weights, since their draws n_i are independent, and so as
    good as at right angles on one sphere. A plain mean has variance `|w|^2 < 1`, which flows draw as blur.

    period: frames over which `draw` moves from one noise to the next (`interpolated`); 0: every draw is that of frame 0.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        seed: int | tuple[tuple[int, float], ...] | None = None,
        generator: torch.Generator | None = None,
        period: int | None = None,
    ):
        if (seed is None) == (generator is None):
            raise ValueError("noise comes from a seed or from a generator: pass one of them, not both and not neither")
        if period is not None and generator is not None:
            raise ValueError("interpolated and constant noise are functions of the frame, a generator's is not: pass a seed")
        self.shape = tuple(shape)
        self.seed, self.period = seed, period
        self.generator = generator
        self._seeds = seed if isinstance(seed, tuple) else () if seed is None else ((seed, 1.0),)
        self._fixed: Tensor | None = None
        self._fixed_steps: Tensor | None = None

    def moving(self, period: int | None) -> NoiseSource:
        """This source under another period; itself where that is the same."""
        if period == self.period:
            return self
        moved = NoiseSource(self.shape, self.seed, self.generator, period)
        moved._fixed = self._fixed
        return moved

    def with_fixed(self, noise: Tensor) -> NoiseSource:
        """This source with another `fixed` noise, `[1, *shape]`."""
        source = copy.copy(self)
        source._fixed = noise.detach().to("cpu", torch.float32, copy=True)
        return source

    def draw(self, frame_id: int) -> Tensor:
        """The noise of a frame, float32 `[1, *shape]` on the CPU (on the generator's device where one was given)."""
        if not self.period:
            return self._normal((1, frame_id if self.period is None else 0))
        return interpolated(lambda step: self._normal((1, step)), frame_id, self.period)

    def fixed(self) -> Tensor:
        """The noise that all image frames of a stream share, drawn once; it keeps a still image still."""
        if self._fixed is None:
            self._fixed = self._normal((0, 0))
        return self._fixed

    def draw_steps(self, frame_id: int, steps: int) -> Tensor:
        """A frame's fresh noise for each of its steps, float32 `[steps, *shape]`, to be drawn after `draw`; from a
        generator, in the order in which the pipeline's scheduler draws."""
        return torch.cat([self._normal((2, frame_id, step)) for step in range(steps)])

    def fixed_steps(self, steps: int) -> Tensor:
        """The fresh noise of steps that all image frames of a stream share, drawn once."""
        if self._fixed_steps is None or len(self._fixed_steps) != steps:
            self._fixed_steps = torch.cat([self._normal((3, step)) for step in range(steps)])
        return self._fixed_steps

    def preview(self) -> Tensor:
        """The noise that `fixed` would return. A generator's state stays as it is."""
        if self._fixed is not None or self.generator is None:
            return self.fixed()
        scratch = torch.Generator(self.generator.device)
        return NoiseSource(self.shape, generator=scratch.set_state(self.generator.get_state())).fixed()

    def _normal(self, key: tuple[int, ...]) -> Tensor:
        if self.generator is not None:
            return self._of_one(self.generator)
        drawn = [weight * self._of_one(_generator(seed, key)) for seed, weight in self._seeds]
        return reduce(torch.add, drawn) / math.hypot(*(weight for _, weight in self._seeds))

    def _of_one(self, generator: torch.Generator) -> Tensor:
        return torch.randn((1, *self.shape), generator=generator, device=generator.device, dtype=torch.float32)


def _generator(seed: int, key: tuple[int, ...]) -> torch.Generator:
    """A generator whose state mixes the seed with the key, so that neighbouring seeds and frames have independent noise."""
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
