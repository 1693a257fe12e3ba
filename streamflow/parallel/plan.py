"""The geometry of parallel work: shares of rows, chunks of a share, tiles of an image. Knows no tensor and no device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product


def shares(n: int, k: int) -> tuple[range, ...]:
    """n rows for k workers: k contiguous ranges in order. Their sizes differ by one at most, and the larger come first. With
    fewer rows than workers, the last ranges are empty. ValueError: n < 0 or k < 1."""
    return shares_by(n, (1,) * k)


def shares_by(n: int, weights: Sequence[float]) -> tuple[range, ...]:
    """n rows in contiguous ranges, whose sizes are as near to these weights as whole rows allow (largest remainder method).
    ValueError: n < 0, or the weights are negative or all 0."""
    if n < 0 or not weights:
        raise ValueError(f"{n} rows cannot be shared by {len(weights)} workers: pass 0 rows or more and 1 worker or more")
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights must be 0 or more and not all 0, not {list(weights)}")
    exact = [n * weight / sum(weights) for weight in weights]
    sizes = [int(size) for size in exact]
    nearest = sorted(range(len(exact)), key=lambda i: (sizes[i] - exact[i], i))
    for i in nearest[: n - sum(sizes)]:
        sizes[i] += 1
    return tuple(range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True))


def chunks(rows: range, limit: int | None) -> Iterator[range]:
    """A range in pieces of `limit` rows at most. limit None: one piece. An empty range has no pieces."""
    step = len(rows) if limit is None else limit
    return (rows[start : start + step] for start in range(0, len(rows), max(step, 1)))


def row_shares(n: int, k: int, pairs: bool = False) -> tuple[tuple[range, ...], ...]:
    """For each of k workers, the ranges of its rows out of n; a worker without rows has none. pairs: row i and row n / 2 + i
    are a pair, which stays on one worker. ValueError: pairs of an odd number of rows."""
    if not pairs:
        return tuple((share,) if share else () for share in shares(n, k))
    half, odd = divmod(n, 2)
    if odd:
        raise ValueError(f"{n} rows are no pairs: an even number of rows is needed")
    return tuple((share, range(half + share.start, half + share.stop)) if share else () for share in shares(half, k))


@dataclass(frozen=True)
class Span:
    """One side of a tile, in latents. core: the part of the image that this tile provides; the cores of all tiles cover the
    image once. window: the part that is decoded, which is the core and its halo, of one length for all tiles of an image."""

    core: range
    window: range

    def cut(self, factor: int) -> slice:
        """The core as a slice of the decoded window, in pixels. factor: pixels per latent."""
        start = self.core.start - self.window.start
        return slice(start * factor, (start + len(self.core)) * factor)


Tile = tuple[Span, Span]  # the rows and the columns of a tile


def spans(size: int, count: int, halo: int) -> tuple[Span, ...]:
    """A side of `size` latents as `count` spans, whose cores are as equal as possible, with `halo` latents around each. All
    windows have one length: at the edge of the image the window moves inwards, so the halo on its other side is longer.
    ValueError: not 1 <= count <= size, or halo < 0."""
    if not 1 <= count <= size or halo < 0:
        raise ValueError(f"{size} latents cannot be cut in {count} tiles with a halo of {halo}")
    cores = shares(size, count)
    length = min(size, len(cores[0]) + 2 * halo)
    starts = (min(max(core.start - halo, 0), size - length) for core in cores)
    return tuple(Span(core, range(start, start + length)) for core, start in zip(cores, starts, strict=True))


def tiles(height: int, width: int, counts: tuple[int, int], halo: int) -> tuple[Tile, ...]:
    """An image of `height` x `width` latents as `counts` (down, across) tiles, row by row."""
    return tuple(product(spans(height, counts[0], halo), spans(width, counts[1], halo)))


def ramp(span: Span, size: int, blend: int, factor: int) -> list[float]:
    """The weight of each pixel of a decoded window, `[len(window) * factor]`, in 0..1. It falls from 1 to 0 over the
    `2 * blend` latents around each end of the core, except at the edges of the image. The weights of neighbours sum to 1."""

    def rise(pixel: float, at: int) -> float:
        if not blend:
            return float(pixel > at * factor)
        return min(max((pixel - (at - blend) * factor) / (2 * blend * factor), 0.0), 1.0)

    weights = []
    for i in range(len(span.window) * factor):
        pixel = span.window.start * factor + i + 0.5
        left = 1.0 if span.core.start == 0 else rise(pixel, span.core.start)
        right = 0.0 if span.core.stop == size else rise(pixel, span.core.stop)
        weights.append(left - right)
    return weights


def window_area(height: int, width: int, counts: tuple[int, int], halo: int) -> int:
    """The number of latents in the window of one tile."""
    sides = (min(size, -(-size // count) + 2 * halo) for size, count in zip((height, width), counts, strict=True))
    return next(sides) * next(sides)


def grid(height: int, width: int, workers: int, halo: int, room: int) -> tuple[int, int]:
    """The number of tiles (down, across) for an image of `height` x `width` latents: the smallest multiple of `workers` for
    which each window holds `room` latents or fewer, in the layout with the smallest windows. ValueError: tiles of one latent
    and its halo do not fit either."""
    least = window_area(height, width, (height, width), halo)
    if least > room:
        raise ValueError(
            f"a tile of one latent and its halo of {halo} holds {least} latents, and memory has room for {room}: "
            f"free memory on the device or decode fewer rows at once"
        )
    for count in range(workers, height * width + 1, workers):
        layouts = [
            (window_area(height, width, (down, count // down), halo), abs(down - count // down), down)
            for down in range(1, min(count, height) + 1)
            if count % down == 0 and count // down <= width
        ]
        if layouts and min(layouts)[0] <= room:
            down = min(layouts)[2]
            return down, count // down
    return height, width


def room_for(free: int, bytes_per_latent: float, share: float = 0.8) -> int:
    """The number of latents that a window may hold, with `share` of the `free` bytes."""
    return int(free * share / bytes_per_latent)
