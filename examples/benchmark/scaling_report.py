"""The scaling benchmark's results as a table, against the figures that were to be reached, and as a plot with the
simulation's curves. Knows the JSON only; matplotlib is imported when a plot is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamflow.benchmark.plot import figure, save

Result = Mapping[str, Any]
PANELS = {
    "decode_rows": "images decoded by row",
    "decode_tiles": "one large image by tile",
    "decode_frames": "a stream, decoded by frame",
    "denoise_rows": "rows of the denoising batch",
}


@dataclass(frozen=True)
class Target:
    """A bound, `least` or `most`, of the value under these keys of `parts`."""

    what: str
    path: tuple[str, ...]
    least: float | None = None
    most: float | None = None

    def check(self, result: Result) -> dict[str, Any] | None:
        """The figure and whether it is reached; None where it was not measured."""
        value: Any = result
        for name in self.path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            return None
        reached = value >= self.least if self.least is not None else value <= self.most
        bound = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        return {"what": self.what, "bound": bound, "found": value, "reached": reached}


def _times(part: str, series: str, gpus: int, least: float, what: str, name: str = "times") -> Target:
    return Target(f"{what}, {gpus} against 1, times", ("parts", part, series, str(gpus), name, "median"), least=least)


AGAINST = {"times": "", "times_eager": " to eager", "times_alone": " to one process"}
ROWS = "latents through the KL VAE by row"
FLUX = "Flux-schnell, 4 stages, rows"
TARGETS = (
    *(_times("decode_rows", "kl", k, least, ROWS) for k, least in ((2, 1.9), (4, 3.7), (8, 7.0))),
    _times("decode_tiles", "tiles", 2, 1.8, "a large image by tiles, KL"),
    _times("decode_frames", "network", 2, 12.0, "denoise on GPU 0, decode on GPU 1, against eager diffusers", "times_eager"),
    *(_times("denoise_rows", "flux-schnell, 4 stages", k, least, FLUX) for k, least in ((2, 1.9), (4, 3.6))),
    Target("host time that sharding over 2 adds to a tick, ms", ("parts", "host", "tick", "2", "added_ms"), most=0.3),
    *(
        Target(
            f"host time that each of {k} adds beyond the second, ms",
            ("parts", "host", "tick", str(k), "added_each_ms"),
            most=0.1,
        )
        for k in (4, 8)
    ),
    Target("simulation against measured points, per cent", ("scaling_model", "largest_off_percent"), most=10.0),
)


def checked(result: Result) -> list[dict[str, Any]]:
    """The targets that were measured; none by models that are not of true size."""
    if result["model"] != "true-size":
        return []
    return [found for target in TARGETS if (found := target.check(result)) is not None]


def table(result: Result) -> str:
    """All rows, and the figures against what was to be reached, as Markdown."""
    lines = [
        "| part | series | devices | ms (least, most) | times | simulated | equal, relative error |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(cells)} |" for cells in _rows(result)]
    if found := checked(result):
        lines += ["", "| figure | to reach | found | |", "|---|---|---|---|"]
        lines += [
            f"| {f['what']} | {f['bound']} | {f['found']:.3g} | {'reached' if f['reached'] else 'missed'} |" for f in found
        ]
    return "\n".join(lines)


def _rows(result: Result) -> Iterator[tuple[str, ...]]:
    simulated = result.get("scaling_model", {}).get("series", {})
    for part, all_series in result["parts"].items():
        for series, rows in all_series.items():
            for key, f in rows.items():
                if key == "costs" and "failed" not in f:
                    continue
                off = simulated.get(f"{part}: {series}", {}).get("off_percent", {}).get(key)
                yield part, series, key, *_cells(f), "" if off is None else f"{off:+.1f} %", _alike(f)


def _cells(f: Mapping[str, Any]) -> tuple[str, str]:
    """(time, times) of a row, or why there is none."""
    if why := f.get("failed") or f.get("skipped"):
        return why, ""
    ms = f.get("ms") or f["host_ms"]
    said = ((name, against) for name, against in AGAINST.items() if name in f)
    times = ", ".join(f"{f[name]['median']:.2f}{against}" for name, against in said)
    return f"{ms['median']:.3f} ({ms['least']:.3f}, {ms['most']:.3f})", times


def _alike(f: Mapping[str, Any]) -> str:
    """What is known of how a row's results compare."""
    said = []
    for name, against in (("", "one device"), ("_shares", "the same shares")):
        if f"equal{name}" in f:
            equal, off = f[f"equal{name}"], f[f"relative_error{name}"]
            said.append(f"{against}: {'equal' if equal else f'{off:.1e}'}")
    if "psnr_db_to_whole" in f:
        said.append(f"whole: {f['psnr_db_to_whole']:.1f} dB")
    return ", ".join(said)


def draw(result: Result, folder: Path, name: str) -> list[Path]:
    """A panel a part: how many times faster than one GPU, measured as points and simulated as lines; what was written."""
    made, grid = figure(11, 8.4, 2, 2)
    for axes, (part, title) in zip(grid.flat, PANELS.items(), strict=True):
        _panel(axes, result, part)
        axes.set_title(title, fontsize=10)
    made.suptitle(f"Points: measured on {result['machine']['device']}. Lines: simulated from one GPU's costs", fontsize=10)
    return save(made, folder, name)


def _panel(axes: Any, result: Result, part: str) -> None:
    simulated = result.get("scaling_model", {}).get("series", {})
    counts = (1, 64)
    axes.plot(counts, counts, color="0.7", linestyle="--", linewidth=1, label="as many times as GPUs")
    for i, (series, rows) in enumerate(result["parts"].get(part, {}).items()):
        colour = f"C{i}"
        measured = {int(k): f["ms"] for k, f in rows.items() if k.isdigit() and "ms" in f}
        curve = {int(k): ms for k, ms in simulated.get(f"{part}: {series}", {}).get("simulated_ms", {}).items()}
        if 1 not in measured or not (curve or len(measured) > 1):
            continue
        alone = measured[1]["median"]
        medians = [alone / ms["median"] for ms in measured.values()]
        low = [m - alone / ms["most"] for m, ms in zip(medians, measured.values(), strict=True)]
        high = [alone / ms["least"] - m for m, ms in zip(medians, measured.values(), strict=True)]
        axes.errorbar(list(measured), medians, [low, high], color=colour, marker="o", markersize=5, linestyle="", capsize=3)
        axes.plot(list(curve), [alone / ms for ms in curve.values()], color=colour, linewidth=1.3)
        axes.plot([], [], color=colour, marker="o", markersize=5, label=series)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("times one GPU")
    axes.grid(color="0.93")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
