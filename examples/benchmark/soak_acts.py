"""What a soak plays: acts with their own prompt, guidance, steps, mask and size of images; images that carry their
number, which inpainting hands on to what is drawn of them; and the memory meanwhile. Knows no stream and no server.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import PIL.Image
import psutil
import torch

PROMPTS = (
    "a red apple, 3d render",
    "a blue whale, flat vector",
    "a very long prompt of a castle on a hill above the sea in the light of an evening in late summer, with birds",
    "",
    (("a cat", 0.7), ("a dog", 0.3)),
    "ein Fuchs im Schnee, 雪の中の狐",
)
STEPS = ((1, 2, 3), (3,), (2, 3), (1, 3))  # of four
SIZES = ((64, 64), (96, 80), (37, 61), (128, 128), (200, 64))
GRID = 16  # cells a side of an image, of which the upper left 4 x 4 are the bits of its number
BITS = 4


@dataclass(frozen=True)
class Act:
    """numbers: of its frames. steps: a t_index_list of four steps. size: width and height of its images. mask: seed of
    which part of an image is drawn."""

    numbers: range
    prompt: str | tuple[tuple[str, float], ...]
    guidance: float
    steps: tuple[int, ...]
    size: tuple[int, int]
    mask: int

    def image(self, number: int) -> PIL.Image.Image:
        """Coloured squares, the upper left ones black or white: the bits of the number."""
        cells = np.random.default_rng(number).integers(0, 256, (GRID, GRID, 3), np.uint8)
        bits = np.array([number >> i & 1 for i in range(BITS * BITS)], np.uint8)
        cells[:BITS, :BITS] = 255 * bits.reshape(BITS, BITS, 1)
        return PIL.Image.fromarray(cells).resize(self.size, PIL.Image.Resampling.NEAREST)

    def mask_of(self, width: int, height: int) -> np.ndarray:
        """Bool `[H, W]`: all is drawn but the number, and but a rectangle."""
        dice = random.Random(self.mask)
        drawn = np.ones((height, width), bool)
        drawn[: BITS * height // GRID, : BITS * width // GRID] = False
        top, left = dice.randrange(height), dice.randrange(width)
        drawn[top : top + dice.randrange(height), left : left + dice.randrange(width)] = False
        return drawn


def acts(numbers: Iterable[int], seed: int = 0) -> Iterator[Act]:
    """These frames, some dozens an act."""
    dice, left = random.Random(seed), list(numbers)
    while left:
        count = dice.randint(20, 60)
        mine, left = left[:count], left[count:]
        chosen = dice.choice(PROMPTS), dice.uniform(0, 8), dice.choice(STEPS), dice.choice(SIZES)
        yield Act(range(mine[0], mine[-1] + 1), *chosen, dice.randrange(2**32))


def number_of(image: np.ndarray) -> int:
    """The number that an image `[H, W, 3]` in [0, 1] carries."""
    height, width = image.shape[:2]
    rows, columns = (((np.arange(BITS) + 0.5) * size / GRID).astype(int) for size in (height, width))
    bits = image[np.ix_(rows, columns)].mean(2).flatten() > 0.5
    return int(sum(1 << i for i, bit in enumerate(bits) if bit))


def check_answers(answers: Sequence[int], expected: range) -> None:
    """RuntimeError unless these are the expected numbers in order, each at least once; again only right after itself."""
    found = [number for number, _ in groupby(answers)]
    if found != list(expected):
        wrong = next((k for k, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(found))
        raise RuntimeError(
            f"answers {found[max(0, wrong - 3) : wrong + 4]} from the {wrong}th on, of {len(found)}, where frames "
            f"{expected.start} to {expected.stop - 1} went in"
        )


class Memory:
    """Bytes of this process, and of tensors on the GPU, by how many frames have been drawn."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._process = device.type == "cuda", psutil.Process()
        self.samples: list[tuple[int, int, int]] = []

    def sample(self, frames: int) -> None:
        """Now, when so many frames have been drawn and nothing is in flight."""
        gc.collect()
        allocated = 0
        if self._cuda:
            torch.cuda.synchronize()
            allocated = torch.cuda.memory_allocated()
        self.samples.append((frames, self._process.memory_info().rss, allocated))
