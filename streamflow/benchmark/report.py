"""The results as a table and as JSON: the factor of each optimisation, its share of the total, and ratios of variants with
the same VAE."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamflow._files import Json
from streamflow.benchmark.settings import SWEEPS
from streamflow.benchmark.ways import CHAIN, SAME_VAE

Result = Mapping[str, Any]
Figures = Mapping[str, Result]  # of variants, by name


def rate(figures: Result) -> float:
    """Images a second, the median over rounds."""
    return figures["images_per_s"]["median"]


def measured(found: Figures, names: Sequence[str]) -> list[str]:
    """The names that have figures."""
    return [name for name in names if "images_per_s" in found.get(name, {})]


def factors(found: Figures) -> Json:
    """The speed-up of each variant of the chain over the one before it; the factors multiply to `total`. `share` is a
    factor's part of the total on the logarithmic scale, in per cent (None where the total is 1)."""
    chain = measured(found, CHAIN)
    if len(chain) < 2:
        return {"total": 1.0, "steps": []}
    total = rate(found[chain[-1]]) / rate(found[chain[0]])
    steps = []
    for before, name in zip(chain, chain[1:], strict=False):
        factor = rate(found[name]) / rate(found[before])
        share = 100 * math.log(factor) / math.log(total) if total != 1.0 else None
        steps.append({"from": before, "to": name, "title": found[name]["title"], "factor": factor, "share": share})
    return {"total": total, "steps": steps}


def ratios(found: Figures) -> dict[str, dict[str, float]]:
    """Rates of variants with the same VAE, "5/1" for 5 over 1; `least` and `most` from the spreads of both."""
    made = {}
    for fast, slow in SAME_VAE:
        if len(measured(found, (fast, slow))) == 2:
            made[f"{fast}/{slow}"] = ratio(found[fast]["images_per_s"], found[slow]["images_per_s"])
    return made


def ratio(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """One figure with a spread over another one; `least` and `most` are the extremes of both spreads."""
    return {"median": a["median"] / b["median"], "least": a["least"] / b["most"], "most": a["most"] / b["least"]}


def swept(result: Result) -> dict[str, list[Result]]:
    """The sweeps' points by the setting's name."""
    return {name: points for name, points in result.get("sweeps", {}).items() if name in SWEEPS}


def failures(result: Result) -> list[str]:
    """The errors of all failed measurements."""
    points = [point for points in swept(result).values() for point in points]
    all_figures = [*result["variants"].values(), *points, *result.get("latency", {}).get("rows", [])]
    return [figures["failed"] for figures in all_figures if "failed" in figures]


def table(result: Result) -> str:
    """The result as Markdown."""
    found = result["variants"]
    lines = [
        f"{result['model']}, {result['width']}x{result['height']}, {result['steps']} steps, {result['dtype']}, "
        f"guidance {result['cfg_type']}, on {result['machine']['device']}",
    ]
    lines += _variant_lines(found) + _factor_lines(result["factors"]) + _ratio_lines(result["ratios"]) + _around_lines(found)
    lines += _sweep_lines(result) + _latency_lines(result.get("latency"))
    return "\n".join(lines)


def _variant_lines(found: Figures) -> list[str]:
    if not found:
        return []
    return [
        "",
        "| | variant | images/s (least, most) | ms a tick (p95) | latency ms (p95) | memory MiB | start-up s | largest, "
        "mean difference, PSNR |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, figures) for name, figures in found.items()),
    ]


def _row(name: str, f: Result) -> str:
    if "images_per_s" not in f:
        reason = f"skipped: {f['skipped']}" if "skipped" in f else f"failed: {f['failed']}"
        return f"| {name} | {f['title']} | {reason} | | | | | |"
    r, t, wait, d = f["images_per_s"], f["tick_ms"], f["latency_ms"], f["difference"]
    memory = f"{f['memory_mib']['reserved']:.0f}" if f["memory_mib"] else ""
    psnr = "equal" if d["psnr_db"] is None else f"{d['psnr_db']:.1f} dB"
    cells = (
        name,
        f["title"],
        f"{r['median']:.2f} ({r['least']:.2f}, {r['most']:.2f})",
        f"{t['median']:.2f} ({t['p95']:.2f})",
        f"{wait['median']:.2f} ({wait['p95']:.2f})",
        memory,
        f"{f['start_up_s']:.1f}",
        f"{d['largest']:.1e}, {d['mean']:.1e}, {psnr}",
    )
    return f"| {' | '.join(cells)} |"


def _factor_lines(found: Result) -> list[str]:
    if not found["steps"]:
        return []
    lines = ["", "| factor | times | share |", "|---|---|---|"]
    for step in found["steps"]:
        share = "" if step["share"] is None else f"{step['share']:.0f} %"
        lines.append(f"| ({step['from']}) to ({step['to']}): {step['title']} | {step['factor']:.2f} | {share} |")
    return [*lines, f"| all together | {found['total']:.2f} | 100 % |"]


def _ratio_lines(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not found:
        return []
    lines = ["", "| same VAE on both sides | times (least, most) |", "|---|---|"]
    return lines + [f"| {name} | {r['median']:.2f} ({r['least']:.2f}, {r['most']:.2f}) |" for name, r in found.items()]


def _around_lines(found: Figures) -> list[str]:
    rows = [(name, f["around_network_and_decode"]) for name, f in found.items() if "around_network_and_decode" in f]
    if not rows:
        return []
    lines = [
        "",
        "| time around the network and the decode | ms a tick | called alone | per cent |",
        "|---|---|---|---|",
    ]
    for name, a in rows:
        p = a["percent"]
        spread = f"{p['median']:.1f} ({p['least']:.1f}, {p['most']:.1f})"
        lines.append(f"| {name} | {a['tick_ms']:.3f} | {a['by_hand_ms']:.3f} | {spread} |")
    return lines


def _sweep_lines(result: Result) -> list[str]:
    lines = []
    for name, points in swept(result).items():
        lines += [
            "",
            f"| {SWEEPS[name].label} | sequential, images/s | ring, images/s (least, most) | ring over sequential "
            "(least, most) | roofline of the network, images/s | with the decoder |",
            "|---|---|---|---|---|---|",
            *(_point(point) for point in points),
        ]
    if lines:
        s = result["sweeps"]
        rate = s["matrix_rate"]
        size = f"{rate['side']}x{rate['side']} {rate['dtype']}"
        lines += [
            "",
            f"Both with acceleration {s['acceleration']} and the {s['vae']} VAE, the sequential one frame after another. "
            f"The roofline: {rate['flops_per_s']['median'] / 1e12:.3g} TFLOP/s, measured multiplying {size} matrices.",
        ]
    return lines


def _point(p: Result) -> str:
    if "failed" in p:
        return f"| {p['value']} | failed: {p['failed']} | | | | |"
    ring, times, roof = p["ring"]["images_per_s"], p["ratio"], p["roofline"]
    cells = (
        str(p["value"]),
        f"{p['sequential']['images_per_s']['median']:.2f}",
        f"{ring['median']:.2f} ({ring['least']:.2f}, {ring['most']:.2f})",
        f"{times['median']:.2f} ({times['least']:.2f}, {times['most']:.2f})",
        f"{roof['network_images_per_s']:.2f}",
        f"{roof['with_decoder_images_per_s']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _latency_lines(found: Result | None) -> list[str]:
    if found is None:
        return []
    lines = [
        "",
        "| input frames/s | stages | the ring fed by the source | the ring ticking freely | sequential | auto |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        if "failed" in row:
            lines.append(f"| | {row['stages']} | failed: {row['failed']} | | | |")
            continue
        cells = (_mode(row["modes"][name]) for name in ("fed", "free", "sequential"))
        lines.append(f"| {row['input_rate']} | {row['stages']} | {' | '.join(cells)} | {row['auto']} |")
    return [
        *lines,
        "",
        "Latency in ms from an input frame to its finished image, p50 (p95), and input frames drawn a second; "
        f"acceleration {found['acceleration']}, {found['vae']} VAE, image-to-image, one frame a tick. auto: the lowest "
        "latency that holds the input rate, else the fastest.",
    ]


def _mode(m: Mapping[str, float]) -> str:
    return f"{m['p50_ms']:.1f} ({m['p95_ms']:.1f}), {m['images_per_s']:.1f}/s"


def rounded(value: object, digits: int = 5) -> Any:
    """The value with its floats rounded to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {name: rounded(entry, digits) for name, entry in value.items()}
    return [rounded(entry, digits) for entry in value] if isinstance(value, (list, tuple)) else value


def write(result: Result, folder: Path, name: str) -> list[Path]:
    """Write the JSON and the table. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    paths[1].write_text(table(result) + "\n", encoding="utf-8")
    return paths
