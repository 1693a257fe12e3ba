"""Plots of results, PNG and SVG. matplotlib is imported when a plot is drawn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamflow._files import Json
from streamflow.benchmark.report import swept
from streamflow.benchmark.settings import SWEEPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    if any("images_per_s" in figures for figures in result["variants"].values()):
        paths += bars(result, folder, name)
    if any("ring" in point for points in swept(result).values() for point in points):
        paths += sweeps(result, folder, f"{name}-sweeps")
    return paths


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
    """Images a second of every variant as bars, with their spread."""
    rows = [(key, f) for key, f in result["variants"].items() if "images_per_s" in f]
    made, axes = figure(9, 1.2 + 0.45 * len(rows))
    medians, spread = error_bars([f["images_per_s"] for _, f in rows])
    colours = ["tab:orange" if f["vae"] == "tiny" else "tab:blue" for _, f in rows]
    drawn = axes.barh([f"({key}) {f['title']}" for key, f in rows], medians, xerr=spread, color=colours, height=0.7)
    axes.bar_label(drawn, [f"{rate:.1f}" for rate in medians], padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("images a second (orange: tiny VAE)")
    axes.set_title(title(result), fontsize=10)
    return save(made, folder, name)


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
    made.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    s = result["sweeps"]
    about = f"guidance {result['cfg_type']}", f"{s['vae']} VAE", f"acceleration {s['acceleration']}"
    made.suptitle(title(result, *about), fontsize=10)
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
    for way, colour, label in (("ring", "tab:blue", "the ring"), ("sequential", "tab:orange", "sequential, batch 1")):
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
        axes.annotate(times, (x, top), (0, 6), textcoords="offset points", ha="center", fontsize=9, color="tab:blue")
    axes.set_xticks(positions, [str(value) for value in values])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1 if numbers else 0.2, y=0.12)
    axes.set_xlabel(SWEEPS[name].label)
    axes.set_ylabel("images a second")
    axes.grid(axis="y", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
