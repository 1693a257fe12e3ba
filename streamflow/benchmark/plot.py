"""Plots of results, PNG and SVG. matplotlib is imported when a plot is drawn."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamflow._files import Json
from streamflow.benchmark.report import swept
from streamflow.benchmark.settings import SWEEPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHERS = "#e8642c", ("#c9ced6", "#8d96a3")  # StreamFlow; diffusers, eager and compiled
SERIES = (OURS, "#2f6fb2", "#4b9b6e", "#8b5fb0", "#b58a2a", "#5c6670")
LABELS = {
    "1": "diffusers, eager",
    "1t": "diffusers, eager",
    "2": "diffusers, compiled",
    "2t": "diffusers, compiled",
    "3": "the denoising batch",
    "4": "the batch, CUDA graph",
    "5": "the batch, compiled",
    "6": "the batch, compiled",
    "7": "the batch, TensorRT",
    "8": "the batch, compiled, decoded on the other GPUs",
    "9": "the batch, compiled, rows on all GPUs",
    "10": "the batch, compiled, frames on all GPUs in turn",
}
INK, GRID = "#20242c", "#e6e9ee"
STYLE: dict[Any, Any] = {  # of matplotlib
    "font.size": 12,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
ROOFS = (
    ("network_images_per_s", "--", "roofline of the network"),
    ("with_decoder_images_per_s", ":", "roofline with the decoder"),
)


def missing() -> str | None:
    """The package that is missing for plots, with the command that installs it, or None."""
    return None if find_spec("matplotlib") else 'matplotlib is not installed: pip install "streamflow-rf[bench]"'


def require() -> None:
    """Raise ImportError, with the command that installs it, where matplotlib is missing."""
    if reason := missing():
        raise ImportError(f"{reason}, or pass --no-plot")


def draw(result: Json, folder: Path, name: str) -> list[Path]:
    """Draw all plots for which there are figures. Returns their paths."""
    paths = []
    with style():
        if any("images_per_s" in figures for figures in result["variants"].values()):
            paths += bars(result, folder, name)
        if any("ring" in point for points in swept(result).values() for point in points):
            paths += sweeps(result, folder, f"{name}-sweeps")
    return paths


def style() -> AbstractContextManager[None]:
    """In this context, plots have the project's fonts and colours: dark on white, readable at half size."""
    require()
    import matplotlib

    return matplotlib.rc_context(STYLE)


def figure(width: float, height: float, rows: int = 1, columns: int = 1, squeeze: bool = True) -> tuple[Figure, Any]:
    """A matplotlib figure of so many inches, and its axes or grid of axes. It opens no window and sets no global state."""
    require()
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=squeeze)


def title(result: Json, *more: str) -> str:
    """The model and its settings, and the device, in two lines."""
    about = f"{result['width']}x{result['height']}", f"{result['steps']} steps", result["dtype"], *more
    return f"{result['model']}, {', '.join(about)}\n{result['machine']['device']}"


def save(made: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG. Returns the paths."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        made.savefig(path, dpi=150)
    return paths


def error_bars(rates: list[Json]) -> tuple[list[float], list[list[float]]]:
    """The medians, and how far the least are below them and the most above them."""
    spread = [[r["median"] - r["least"] for r in rates], [r["most"] - r["median"] for r in rates]]
    return [r["median"] for r in rates], spread


def bars(result: Json, folder: Path, name: str) -> list[Path]:
    """Images a second of every variant, in a group for each VAE. The best of each group has its ratios to diffusers."""
    rows = [(key, f) for key, f in result["variants"].items() if "images_per_s" in f]
    groups: dict[str, list[tuple[str, Json]]] = {}
    for key, f in rows:
        groups.setdefault("tiny VAE" if f["vae"] == "tiny" else f["vae"], []).append((key, f))
    made, axes = figure(10, 1.3 + 0.5 * len(rows) + 0.6 * len(groups))
    y, ticks, most = 0.0, [], max(f["images_per_s"]["most"] for _, f in rows)
    for vae, group in groups.items():
        axes.text(0, y, f" {vae}", va="center", fontweight="bold")
        best = max(f["images_per_s"]["median"] for _, f in group)
        for key, f in group:
            y += 1
            rate, alone = f["images_per_s"], OTHERS[key[0] == "2"] if key[0] in "12" else OURS
            axes.barh(
                y,
                rate["median"],
                xerr=error_bars([rate])[1],
                color=alone,
                height=0.75,
                error_kw={"elinewidth": 1.5, "ecolor": INK},
            )
            said = f"{rate['median']:.1f}" + (_ratios(result, key) if rate["median"] == best else "")
            axes.text(
                rate["most"] + 0.012 * most, y, said, va="center", fontweight="bold" if rate["median"] == best else None
            )
            ticks.append((y, LABELS.get(key, f["title"])))
        y += 1.4
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.6, -0.6)
    axes.set_xlim(0, 1.7 * most)
    axes.set_xlabel("images a second")
    axes.set_title(title(result), loc="left")
    return save(made, folder, name)


def _ratios(result: Json, key: str) -> str:
    """The ratios of a variant to diffusers, eager (1) and compiled (2), where they were measured."""
    ratios = result.get("ratios", {})
    said = [
        f"{ratios[name]['median']:.{1 if ratios[name]['median'] >= 5 else 2}f}x {than}"
        for number, than in (("1", "eager"), ("2", "compiled"))
        for name in (f"{key}/{number}", f"{key}/{number}t")
        if name in ratios
    ]
    return "".join(f"   {one}" for one in said)


def sweeps(result: Json, folder: Path, name: str) -> list[Path]:
    """A panel for every swept setting: images a second of the ring and of the sequential loop with their spread, their
    ratio, and the rooflines."""
    panels = {key: measured for key, points in swept(result).items() if (measured := [p for p in points if "ring" in p])}
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    made, grid = figure(5.6 * columns + 0.4, 3.9 * rows + 1.1, rows, columns, squeeze=False)
    for axes, (key, points) in zip(grid.flat, panels.items(), strict=False):
        panel(axes, key, points)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=2)
    s = result["sweeps"]
    about = f"guidance {result['cfg_type']}", f"{s['vae']} VAE", f"acceleration {s['acceleration']}"
    made.suptitle(title(result, *about))
    return save(made, folder, name)


def panel(axes: Axes, name: str, points: list[Json]) -> None:
    """One sweep. Rates and numbers have logarithmic axes; kinds of guidance are next to each other."""
    from matplotlib.ticker import LogLocator, NullFormatter

    numbers = not isinstance(points[0]["value"], str)
    if numbers:
        points = sorted(points, key=lambda p: p["value"])
        axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    values = [p["value"] for p in points]
    positions = values if numbers else list(range(len(values)))
    lines = numbers and len(points) > 1
    for way, colour, label in (("ring", OURS, "the ring"), ("sequential", OTHERS[1], "sequential, batch 1")):
        medians, spread = error_bars([p[way]["images_per_s"] for p in points])
        style = {"color": colour, "marker": "o", "markersize": 5, "capsize": 3, "linestyle": "-" if lines else ""}
        axes.errorbar(positions, medians, spread, label=label, **style)
    for key, style, label in ROOFS:
        roof = [p["roofline"][key] for p in points]
        if lines:
            axes.plot(positions, roof, color="0.3", linestyle=style, label=label)
        elif numbers:
            axes.axhline(roof[0], color="0.3", linestyle=style, label=label)
        else:
            ends = [x - 0.3 for x in positions], [x + 0.3 for x in positions]
            axes.hlines(roof, *ends, color="0.3", linestyle=style, label=label)
    for x, p in zip(positions, points, strict=True):
        top = max(p[way]["images_per_s"]["most"] for way in ("ring", "sequential"))
        times = f"{p['ratio']['median']:.2f}x"
        axes.annotate(times, (x, top), (0, 6), textcoords="offset points", ha="center", fontsize=10, color=OURS)
    axes.set_xticks(positions, [str(value) for value in values])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1 if numbers else 0.2, y=0.12)
    axes.set_xlabel(SWEEPS[name].label)
    axes.set_ylabel("images a second")
    axes.grid(axis="y")
