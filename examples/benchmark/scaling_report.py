"""The scaling benchmark's results as a table, against the figures that were to be reached, and as a plot with the
simulation's curves. Knows the JSON only; matplotlib is imported when a plot is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamflow.benchmark.plot import INK, OTHERS, OURS, SERIES, error_bars, figure, save, style

Result = Mapping[str, Any]
PANELS = {
    "decode_rows": "images decoded by row",
    "decode_tiles": "one large image by tile",
    "decode_frames": "a stream, decoded by frame",
    "denoise_rows": "rows of the denoising batch",
    "interleave_frames": "whole frames in turn",
}

FORECAST = ("decode_rows", "decode_tiles", "decode_frames", "denoise_rows")


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
    _times("interleave_frames", "kl", 4, 3.8, "whole frames in turn, KL"),
    _times("interleave_frames", "kl", 2, 15.0, "whole frames in turn, KL, against eager diffusers", "times_eager"),
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
    """Two figures: what was measured, as bars, and the forecast for more GPUs, as lines. Returns what was written."""
    with style():
        return [*_measured(result, folder, name), *_forecast(result, folder, f"{name}-forecast")]


def _measured(result: Result, folder: Path, name: str) -> list[Path]:
    """Times one GPU, a bar for every series and number of GPUs."""
    rows = [
        (part, series, one)
        for part in PANELS
        for series in result["parts"].get(part, {})
        if (one := _against_one(result, part, series))
    ]
    rows = [(part, series, one) for part, series, one in rows if len(one) > 1]
    if not rows:
        return []
    counts = sorted({count for _, _, one in rows for count in one})
    made, axes = figure(10, 1.4 + 0.35 * sum(len(one) for _, _, one in rows) + 0.25 * len(rows))
    y, ticks = 0.0, []
    for part, series, one in rows:
        ticks.append((y + (len(one) - 1) / 2, f"{PANELS[part]}\n{series}"))
        for count, times in one.items():
            colour = OTHERS[1] if count == 1 else OURS
            said = f"{times['median']:.2f}   {count} GPU{'s' if count > 1 else ''}"
            spread = {"xerr": error_bars([times])[1], "error_kw": {"elinewidth": 1.5, "ecolor": INK}}
            axes.barh(y, times["median"], color=colour, alpha=0.55 + 0.45 * count / counts[-1], height=0.85, **spread)
            axes.text(times["most"] + 0.05, y, said, va="center", fontsize=10)
            y += 1
        y += 0.7
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 1, -0.8)
    axes.set_xlim(0, counts[-1] + 0.8)
    axes.set_xticks(range(counts[-1] + 1))
    axes.set_xlabel("times one GPU")
    axes.set_title(f"measured on {result['machine']['device']}", loc="left")
    return save(made, folder, name)


def _against_one(result: Result, part: str, series: str) -> dict[int, dict[str, float]]:
    """For every number of GPUs that was measured: times one GPU, as median, least and most."""
    measured = {int(k): f["ms"] for k, f in result["parts"][part][series].items() if k.isdigit() and "ms" in f}
    alone = measured.get(1, {}).get("median")
    if not alone:
        return {}
    of = {"median": "median", "least": "most", "most": "least"}  # the least times are those of the most time
    return {k: {name: alone / ms[time] for name, time in of.items()} for k, ms in measured.items()}


def _forecast(result: Result, folder: Path, name: str) -> list[Path]:
    """A panel for each part: measured points, and lines that are simulated from one GPU's costs."""
    made, grid = figure(12, 9, 2, 2)
    for axes, part in zip(grid.flat, FORECAST, strict=True):
        _panel(axes, result, part)
        axes.set_title(PANELS[part])
    made.suptitle(f"Points: measured on {result['machine']['device']}. Lines: forecast from one GPU's costs")
    return save(made, folder, name)


def _panel(axes: Any, result: Result, part: str) -> None:
    simulated = result.get("scaling_model", {}).get("series", {})
    counts = (1, 64)
    axes.plot(counts, counts, color="0.7", linestyle="--", linewidth=1, label="times the number of GPUs")
    shown = 0
    for series, rows in result["parts"].get(part, {}).items():
        measured = _against_one(result, part, series)
        curve = {int(k): ms for k, ms in simulated.get(f"{part}: {series}", {}).get("simulated_ms", {}).items()}
        if 1 not in measured or not (curve or len(measured) > 1):
            continue
        colour, shown = SERIES[shown % len(SERIES)], shown + 1
        medians, spread = error_bars(list(measured.values()))
        alone = rows["1"]["ms"]["median"]
        axes.errorbar(list(measured), medians, spread, color=colour, marker="o", markersize=5, linestyle="", capsize=3)
        axes.plot(list(curve), [alone / ms for ms in curve.values()], color=colour, linewidth=1.3)
        axes.plot([], [], color=colour, marker="o", markersize=5, label=series)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("times one GPU")
    axes.grid()
    axes.legend()
