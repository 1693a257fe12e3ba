"""Who decodes what: shares of rows, chunks of a share, tiles of a picture. Pure geometry; knows no tensor and no device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


def shares(n: int, k: int) -> tuple[range, ...]:
    """n rows over k workers: k contiguous ranges in order, of sizes that differ by one at most, the larger first. With fewer
    rows than workers the last ranges are empty.

    Raises:
        ValueError: n < 0 or k < 1.
    """
    _check_counts(n, k)
    return shares_by(n, (1,) * k)


def shares_by(n: int, weights: Sequence[float]) -> tuple[range, ...]:
    """n rows in contiguous ranges as near to these weights as whole rows allow (largest remainders, the earlier first)."""
    _check_counts(n, len(weights))
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights must be 0 or more and not all 0, not {list(weights)}")
    exact = [n * weight / sum(weights) for weight in weights]
    sizes = [int(size) for size in exact]
    nearest = sorted(range(len(exact)), key=lambda i: (sizes[i] - exact[i], i))
    for i in nearest[: n - sum(sizes)]:
        sizes[i] += 1
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))


def chunks(rows: range, limit: int | None) -> Iterator[range]:
    """A range in pieces of `limit` at most, the first ones full; an empty range has none. None: in one piece."""
    step = len(rows) if limit is None else limit
    return (rows[start : start + step] for start in range(0, len(rows), max(step, 1)))


def row_shares(n: int, k: int, pairs: bool = False) -> tuple[tuple[range, ...], ...]:
    """For each of k workers the ranges of its rows of n, none where it has no row. pairs: the first half of the rows are the
    twins of the second, and a twin stays with its row. ValueError: pairs of an odd number of rows."""
    if not pairs:
        return tuple((share,) if share else () for share in shares(n, k))
    half, odd = divmod(n, 2)
    if odd:
        raise ValueError(f"{n} rows are no pairs: as many twins as rows are needed")
    return tuple((share, range(half + share.start, half + share.stop)) if share else () for share in shares(half, k))


def _check_counts(n: int, k: int) -> None:
    if n < 0 or k < 1:
        raise ValueError(f"{n} rows cannot be shared by {k} workers: 0 rows or more, 1 worker or more")


@dataclass(frozen=True)
class Span:
    """One side of a tile, in latents. `core`: what this tile alone answers for; the cores of all tiles cover the picture
    once. `window`: what is decoded, the core and its halo, as long for every tile of a picture."""

    core: range
    window: range

    def cut(self, factor: int) -> slice:
        """Where the core lies in the decoded window, in pixels of which a latent has `factor`."""
        start = self.core.start - self.window.start
        return slice(start * factor, (start + len(self.core)) * factor)


@dataclass(frozen=True)
class Tile:
    """A tile of a picture: its rows and its columns."""

    rows: Span
    columns: Span


def spans(size: int, count: int, halo: int) -> tuple[Span, ...]:
    """A side of `size` latents in `count` cores as equal as can be, each with `halo` latents around it where the picture
    goes on. Windows are of one length: at an edge the window moves inwards and the halo on the other side is longer."""
    if not 1 <= count <= size or halo < 0:
        raise ValueError(f"{size} latents cannot be cut in {count} tiles with a halo of {halo}")
    cores = shares(size, count)
    length = min(size, len(cores[0]) + 2 * halo)
    starts = (min(max(core.start - halo, 0), size - length) for core in cores)
    return tuple(Span(core, range(start, start + length)) for core, start in zip(cores, starts, strict=True))


def tiles(height: int, width: int, counts: tuple[int, int], halo: int) -> tuple[Tile, ...]:
    """A picture of `height` x `width` latents in `counts` (down, across) tiles, row by row."""
    down, across = spans(height, counts[0], halo), spans(width, counts[1], halo)
    return tuple(Tile(rows, columns) for rows in down for columns in across)


def ramp(span: Span, size: int, blend: int, factor: int) -> list[float]:
    """The weight of each pixel of a decoded window, `[len(window) * factor]`, in 0..1. It falls from 1 to 0 over the
    `2 * blend` latents around each end of the core, but for the picture's own ends; neighbours' weights add up to 1."""

    def rises(pixel: float, at: int) -> float:
        if not blend:
            return float(pixel > at * factor)
        return min(max((pixel - (at - blend) * factor) / (2 * blend * factor), 0.0), 1.0)

    weights = []
    for i in range(len(span.window) * factor):
        pixel = span.window.start * factor + i + 0.5
        left = 1.0 if span.core.start == 0 else rises(pixel, span.core.start)
        right = 0.0 if span.core.stop == size else rises(pixel, span.core.stop)
        weights.append(left - right)
    return weights


def window_area(height: int, width: int, counts: tuple[int, int], halo: int) -> int:
    """How many latents one tile decodes."""
    sides = (min(size, -(-size // count) + 2 * halo) for size, count in zip((height, width), counts, strict=True))
    return next(sides) * next(sides)


def grid(height: int, width: int, workers: int, halo: int, room: int) -> tuple[int, int]:
    """How many tiles (down, across) a picture of `height` x `width` latents is best cut in: as few as a multiple of the
    workers allows whose windows hold `room` latents or fewer, and of those counts the one with the least in its halos.

    Raises:
        ValueError: not even tiles of one latent and its halo fit, with the numbers.
    """
    least = window_area(height, width, (height, width), halo)
    if least > room:
        raise ValueError(
            f"a tile of one latent and its halo of {halo} holds {least} latents, and memory has room for {room}: "
            f"free memory on the device or take fewer rows at once"
        )
    for wanted in _multiples(workers, height * width):
        fitting = [
            (window_area(height, width, (down, wanted // down), halo), abs(down - wanted // down), down)
            for down in range(1, wanted + 1)
            if wanted % down == 0 and down <= height and wanted // down <= width
        ]
        if fitting and min(fitting)[0] <= room:
            down = min(fitting)[2]
            return down, wanted // down
    return height, width


def _multiples(workers: int, limit: int) -> Iterator[int]:
    return iter(range(workers, limit + 1, workers)) if workers <= limit else iter(())


def room_for(free: int, bytes_per_latent: float, share: float = 0.8) -> int:
    """How many latents a window may hold where `free` bytes are free and decoding takes so many bytes a latent; `share` of
    the free bytes are used."""
    return int(free * share / bytes_per_latent)
