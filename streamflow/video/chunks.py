"""What a video stream gives: chunks, and their frames one by one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from streamflow.io import TimedImage


@dataclass(frozen=True, eq=False)
class Chunk:
    """One finished chunk. id: its number. first_frame: that of its first frame. images: as the pipeline's `output_type`
    says, a list of PIL images, an array `[n, H, W, 3]` or a tensor `[n, 3, H, W]`, both in [0, 1]; None for "latent".
    latents: `[1, C, T, h, w]`, what the pipeline returns for "latent". fps: frames a second. seconds: of host time that it
    took."""

    id: int
    first_frame: int
    images: Any
    latents: Tensor
    fps: float
    seconds: float

    def frames(self) -> Iterator[VideoFrame]:
        """Its frames, in order; none where nothing was decoded."""
        return numbered(() if self.images is None else self.images, self.first_frame, self.fps, self.id)


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """One image of a video. id: its number from 0, without gaps. image: as in its chunk. time: seconds from the start of the
    video. chunk: the number of its chunk."""

    id: int
    image: Any
    time: float
    chunk: int

    def timed(self) -> TimedImage:
        """The same as what sinks take (`streamflow.io`)."""
        pixels = self.image
        if isinstance(pixels, Tensor):
            pixels = (pixels.float() if pixels.is_floating_point() else pixels).permute(1, 2, 0).cpu().numpy()
        if isinstance(pixels, np.ndarray) and pixels.dtype != np.uint8:  # those of a postprocess may be bytes
            pixels = (pixels.clip(0, 1) * 255).round()
        return TimedImage(np.array(pixels, np.uint8), time.monotonic(), self.time)


def numbered(images: Iterable[Any], first: int, fps: float, chunk: int) -> Iterator[VideoFrame]:
    """These images of a chunk as frames. first: the number of the first one."""
    for number, image in enumerate(images, first):
        yield VideoFrame(number, image, number / fps, chunk)
