"""Results as pictures, PNG and SVG. matplotlib is imported here, when a plot is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streamflow.benchmark.report import swept
from streamflow.benchmark.settings import SWEEPS

ROOFS = (
    ("network_pictures_per_s", "--", "roofline of the network"),
    ("with_decoder_pictures_per_s", ":", "roofline with the decoder"),
)


def missing() -> str | None:
    """What is missing for plots, and the command that brings it; None where nothing is."""
    if find_spec("matplotlib") is None:
        return 'matplotlib is not installed: pip install "streamflow-rf[bench]"'
    return None


def require() -> None:
    """ImportError that names the command, where matplotlib is missing."""
    if lacking := missing():
        raise ImportError(f"{lacking}, or pass --no-plot")


def draw(result: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """All plots that there are figures for; what was written."""
    paths = []
    if any("pictures_per_s" in figures for figures in result["variants"].values()):
        paths += bars(result, folder, name)
    if any("ring" in point for points in swept(result).values() for point in points):
        paths += sweeps(result, folder, f"{name}-sweeps")
    return paths


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Any, Any]:
    """A matplotlib figure of so many inches, and its axes; no window, no global state."""
    require()
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, **shared)


def title(result: Mapping[str, Any], *more: str) -> str:
    """What was measured and on what, in two lines."""
    about = f"{result['width']}x{result['height']}", f"{result['steps']} steps", result["dtype"], *more
    return f"{result['model']}, {', '.join(about)}\n{result['machine']['device']}"


def save(made: Any, folder: Path, name: str) -> list[Path]:
    """PNG and SVG of a figure; what was written."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        made.savefig(path, dpi=150)
    return paths


def bars(result: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Pictures a second of every variant as bars, with their spread."""
    rows = [(key, f) for key, f in result["variants"].items() if "pictures_per_s" in f]
    made, axes = figure(9, 1.2 + 0.45 * len(rows))
    rates = [f["pictures_per_s"] for _, f in rows]
    medians = [r["median"] for r in rates]
    spread = [[r["median"] - r["least"] for r in rates], [r["most"] - r["median"] for r in rates]]
    colours = ["tab:orange" if f["vae"] == "tiny" else "tab:blue" for _, f in rows]
    drawn = axes.barh([f"({key}) {f['title']}" for key, f in rows], medians, xerr=spread, color=colours, height=0.7)
    axes.bar_label(drawn, [f"{rate:.1f}" for rate in medians], padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("pictures a second (orange: tiny VAE)")
    axes.set_title(title(result), fontsize=10)
    return save(made, folder, name)


def sweeps(result: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """A panel for every swept setting: pictures a second of the ring and of the sequential loop with their spread, how many
    times faster the ring is, and the rooflines."""
    panels = {swept_name: [p for p in points if "ring" in p] for swept_name, points in swept(result).items()}
    panels = {swept_name: points for swept_name, points in panels.items() if points}
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    made, grid = figure(5.6 * columns + 0.4, 3.9 * rows + 1.1, rows, columns, squeeze=False)
    for axes, (swept_name, points) in zip(grid.flat, panels.items(), strict=False):
        panel(axes, swept_name, points)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    s = result["sweeps"]
    about = f"guidance {result['cfg_type']}", f"{s['vae']} VAE", f"acceleration {s['acceleration']}"
    made.suptitle(title(result, *about), fontsize=10)
    return save(made, folder, name)


def panel(axes: Any, name: str, points: list[Mapping[str, Any]]) -> None:
    """One sweep. Numbers lie on a logarithmic axis, kinds of guidance side by side; rates on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    numbers = not isinstance(points[0]["value"], str)
    if numbers:
        points = sorted(points, key=lambda p: p["value"])
        axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    values = [p["value"] for p in points]
    places = values if numbers else list(range(len(values)))
    lines = numbers and len(points) > 1
    for way, colour, label in (("ring", "tab:blue", "the ring"), ("sequential", "tab:orange", "sequential, batch 1")):
        rates = [p[way]["pictures_per_s"] for p in points]
        medians = [r["median"] for r in rates]
        spread = [[r["median"] - r["least"] for r in rates], [r["most"] - r["median"] for r in rates]]
        style = {"color": colour, "marker": "o", "markersize": 5, "capsize": 3, "linestyle": "-" if lines else ""}
        axes.errorbar(places, medians, spread, label=label, **style)
    for key, style, label in ROOFS:
        roof = [p["roofline"][key] for p in points]
        if lines:
            axes.plot(places, roof, color="0.3", linestyle=style, label=label)
        elif numbers:
            axes.axhline(roof[0], color="0.3", linestyle=style, label=label)
        else:
            ends = [place - 0.3 for place in places], [place + 0.3 for place in places]
            axes.hlines(roof, *ends, color="0.3", linestyle=style, label=label)
    for place, p in zip(places, points, strict=True):
        top = max(p[way]["pictures_per_s"]["most"] for way in ("ring", "sequential"))
        times = f"{p['ratio']['median']:.2f}x"
        axes.annotate(times, (place, top), (0, 6), textcoords="offset points", ha="center", fontsize=9, color="tab:blue")
    axes.set_xticks(places, [str(value) for value in values])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1 if numbers else 0.2, y=0.12)
    axes.set_xlabel(SWEEPS[name].label)
    axes.set_ylabel("pictures a second")
    axes.grid(axis="y", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
