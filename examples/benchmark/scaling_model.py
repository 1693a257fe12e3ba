"""How work spreads over GPUs, by simulation: measured costs of one GPU, of copies and of the host go in, seconds on any
number of GPUs come out. Knows numbers; no torch, no package.

Three shapes of work, each with `seconds(gpus)`:
- `Tick`: rows of a denoising batch (`shard_denoiser`). Copies leave and enter the home GPU one after another on its stream.
- `Batch`: rows or tiles decoded in pieces (`shard_vae`, `decode_tiled`). Pieces go round the GPUs; images come home over
  one link, one after another.
- `Stream`: a frame a tick, decoded on the other GPUs in turn (`stream.frames`); a full queue holds the stream.

Nothing here is fitted to measurements on several GPUs; `compare` says how far it is from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

COUNTS = (1, 2, 4, 8, 16, 32, 64)
FRAMES = 480  # of a simulated stream; the second half is counted
DEPTH = 2  # jobs that wait for a GPU, and jobs unfinished on it (`streamflow.parallel.vae.Settings`)


@dataclass(frozen=True)
class Work:
    """Seconds of one GPU for so many rows: measured `points` of (rows, seconds), straight lines between them. Fewer rows
    than the first point take as long as it, more than the last in proportion to it."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not self.points or any(rows < 1 or seconds < 0 for rows, seconds in self.points):
            raise ValueError(f"points are (rows of 1 or more, seconds of 0 or more), one at least, not {self.points}")
        object.__setattr__(self, "points", tuple(sorted(self.points)))

    def times(self, factor: float) -> Work:
        """Work that takes so many times as long."""
        return Work(tuple((rows, factor * seconds) for rows, seconds in self.points))

    def seconds(self, rows: int) -> float:
        """0 for no rows."""
        if not rows:
            return 0.0
        (first, least), (last, most) = self.points[0], self.points[-1]
        if rows <= first:
            return least
        if rows >= last:
            return most * rows / last
        (a, low), (b, high) = next(p for p in zip(self.points, self.points[1:], strict=False) if rows <= p[1][0])
        return low + (high - low) * (rows - a) / (b - a)


@dataclass(frozen=True)
class Link:
    """A copy between two GPUs: seconds for the first byte, and for each."""

    latency: float = 0.0
    per_byte: float = 0.0

    def seconds(self, size: float) -> float:
        return self.latency + self.per_byte * size


def share_sizes(n: int, k: int) -> list[int]:
    """n rows over k GPUs, as equal as can be, the larger shares first."""
    return [n // k + (i < n % k) for i in range(k)]


@dataclass(frozen=True)
class Tick:
    """One tick of `rows` rows. row_bytes: of one row's latents, each way. host: of an unsharded tick; host_each: what each
    further GPU adds to it."""

    rows: int
    work: Work
    link: Link = Link()
    row_bytes: float = 0.0
    host: float = 0.0
    host_each: float = 0.0

    def seconds(self, gpus: int) -> float:
        """Of a steady tick: the slower of the GPUs and the host, which runs ahead of them."""
        own, *others = (size for size in share_sizes(self.rows, gpus) if size)
        home, finished = 0.0, []
        for size in others:
            home += self.link.seconds(size * self.row_bytes)
            finished.append((home + self.work.seconds(size), size))
        home += self.work.seconds(own)
        for end, size in reversed(finished):
            home = max(home, end) + self.link.seconds(size * self.row_bytes)
        return max(home, self.host + self.host_each * len(others))


@dataclass(frozen=True)
class Batch:
    """`rows` rows, each GPU's share in pieces of at most `piece`. bytes_in, bytes_out: of a row's latents and image.
    around: what is done once, such as putting images together. host: to launch one piece, by the thread of its GPU, while
    the GPU computes."""

    rows: int
    piece: int
    work: Work
    link: Link = Link()
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    around: float = 0.0
    host: float = 0.0

    def seconds(self, gpus: int) -> float:
        """Until all images are at home."""
        free, launched, road = [0.0] * gpus, [0.0] * gpus, 0.0
        for gpu, rows in self._pieces(gpus):
            launched[gpu] += self.host
            away = gpu > 0
            began = free[gpu] + (self.link.seconds(rows * self.bytes_in) if away else 0.0)
            free[gpu] = max(began + self.work.seconds(rows), launched[gpu])
            if away:
                road = free[gpu] = max(free[gpu], road) + self.link.seconds(rows * self.bytes_out)
        return max(free) + self.around

    def _pieces(self, gpus: int) -> Iterator[tuple[int, int]]:
        """(GPU, rows) in the order in which they are given out: every GPU's first, then every GPU's second."""
        left = share_sizes(self.rows, gpus)
        while any(left):
            for gpu in range(gpus):
                if rows := min(self.piece, left[gpu]):
                    left[gpu] -= rows
                    yield gpu, rows


@dataclass(frozen=True)
class Stream:
    """A frame every `tick` seconds on the first GPU, decoded in `decode` seconds on the others in turn, or there where it is
    alone. bytes_in: of a frame's latents; its image stays where it was decoded. host: of one frame."""

    tick: float
    decode: float
    link: Link = Link()
    bytes_in: float = 0.0
    host: float = 0.0

    def seconds(self, gpus: int) -> float:
        """A frame, in the long run."""
        if gpus == 1:
            return max(self.tick + self.decode, self.host)
        ends: list[list[float]] = [[] for _ in range(gpus - 1)]
        now, shown = 0.0, [0.0]
        for frame in range(FRAMES):
            mine = ends[frame % len(ends)]
            now += max(self.tick, self.host)
            if len(mine) >= 2 * DEPTH:
                now = max(now, mine[-2 * DEPTH])
            mine.append(max(now + self.link.seconds(self.bytes_in), mine[-1] if mine else 0.0) + self.decode)
            shown.append(max(shown[-1], mine[-1]))
        half = FRAMES // 2
        return (shown[-1] - shown[half]) / (FRAMES - half)


# -- of the benchmark's JSON -------------------------------------------------------------------------------------------

Rows = Mapping[str, Any]  # of one series: "costs", and by the number of GPUs what was measured


def _link(parts: Rows) -> Link:
    found = parts.get("links", {}).get("home to second", {}).get("costs", {})
    return Link(found.get("latency_ms", 0.0) / 1e3, found.get("ms_per_mib", 0.0) / 1e3 / 2**20)


def _host(parts: Rows) -> tuple[float, float]:
    """(seconds of an unsharded tick, seconds that each further GPU adds)."""
    rows = {int(k): f["host_ms"]["median"] for k, f in parts.get("host", {}).get("tick", {}).items() if "host_ms" in f}
    if 1 not in rows:
        return 0.0, 0.0
    most = max(rows)
    each = (rows[most] - rows[1]) / (most - 1) if most > 1 else 0.0
    return rows[1] / 1e3, max(each, 0.0) / 1e3


def _work(by_rows: Mapping[str, float]) -> Work:
    return Work(tuple((int(rows), ms / 1e3) for rows, ms in by_rows.items()))


def _tick(parts: Rows, costs: Rows, alone: float) -> Tick:
    work, rows = _work(costs["network_ms"]), costs["rows"]
    slower = max(alone / work.seconds(rows), 1.0)  # in a tick, by copies of inputs and lower clocks, than by itself
    return Tick(rows, work.times(slower), _link(parts), costs["row_bytes"], *_host(parts))


def _batch(parts: Rows, costs: Rows, alone: float) -> Batch:
    work = _work(costs["piece_ms"])
    sizes = costs["rows"], costs["piece"], work, _link(parts), costs["bytes_in"], costs["bytes_out"]
    around = max(alone - Batch(*sizes).seconds(1), 0.0)
    return Batch(*sizes, around, costs["host_job_ms"] / 1e3)


def _stream(parts: Rows, costs: Rows, alone: float) -> Stream:
    return Stream(costs["tick_ms"] / 1e3, costs["decode_ms"] / 1e3, _link(parts), costs["bytes_in"], _host(parts)[0])


SHAPES: dict[str, Callable[[Rows, Rows, float], Tick | Batch | Stream]] = {
    "decode_rows": _batch,
    "decode_tiles": _batch,
    "decode_frames": _stream,
    "denoise_rows": _tick,
}


def compare(parts: Mapping[str, Mapping[str, Rows]]) -> dict[str, Any]:
    """For every series with costs and a time on one GPU: the simulation's milliseconds on 1 to 64 GPUs and how far they are
    from what was measured on several (per cent of it); and the largest of these differences, None where there is none."""
    series = {}
    for part, shape in SHAPES.items():
        for name, rows in parts.get(part, {}).items():
            measured = {int(k): f["ms"]["median"] for k, f in rows.items() if k.isdigit() and "ms" in f}
            costs = rows.get("costs", {})
            if 1 not in measured or not costs or "failed" in costs or "skipped" in costs:
                continue
            simulated = shape(parts, costs, measured[1] / 1e3)
            most = costs.get("most_gpus", COUNTS[-1])
            points = {k: 1e3 * simulated.seconds(k) for k in sorted({*COUNTS, *measured}) if k <= most}
            off = {k: 100 * (points[k] / ms - 1) for k, ms in measured.items() if k > 1 and k in points}
            series[f"{part}: {name}"] = {
                "simulated_ms": {str(k): ms for k, ms in points.items()},
                "off_percent": {str(k): percent for k, percent in off.items()},
            }
    offs = [abs(percent) for one in series.values() for percent in one["off_percent"].values()]
    return {"series": series, "largest_off_percent": max(offs) if offs else None}
