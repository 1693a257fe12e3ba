"""The results as a table and as JSON: the factor of each optimisation, its share of the total, and ratios of variants with
the same VAE."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from streamflow._files import Json, replacing
from streamflow.benchmark.settings import SWEEPS
from streamflow.benchmark.ways import CHAIN, SAME_VAE

Figures = Mapping[str, Json]  # of variants, by name


def measured(found: Figures, names: Sequence[str]) -> list[str]:
    """The names that have figures."""
    return [name for name in names if "images_per_s" in found.get(name, {})]


def factors(found: Figures) -> Json:
    """The speed-up of each variant of the chain over the one before it; the factors multiply to `total`. `share` is a
    factor's part of the total on the logarithmic scale, in per cent (None where the total is 1)."""
    chain = measured(found, CHAIN)
    if len(chain) < 2:
        return {"total": 1.0, "steps": []}
    rate = {name: found[name]["images_per_s"]["median"] for name in chain}
    total = rate[chain[-1]] / rate[chain[0]]
    steps = []
    for before, name in pairwise(chain):
        factor = rate[name] / rate[before]
        share = 100 * math.log(factor) / math.log(total) if total != 1.0 else None
        steps.append({"from": before, "to": name, "title": found[name]["title"], "factor": factor, "share": share})
    return {"total": total, "steps": steps}


def ratios(found: Figures) -> dict[str, dict[str, float]]:
    """Rates of variants with the same VAE, "5/1" for 5 over 1; `least` and `most` from the spreads of both."""
    pairs = [(fast, slow) for fast, slow in SAME_VAE if len(measured(found, (fast, slow))) == 2]
    return {f"{a}/{b}": ratio(found[a]["images_per_s"], found[b]["images_per_s"]) for a, b in pairs}


def ratio(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """One figure with a spread over another one; `least` and `most` are the extremes of both spreads."""
    return {"median": a["median"] / b["median"], "least": a["least"] / b["most"], "most": a["most"] / b["least"]}


def swept(result: Json) -> dict[str, list[Json]]:
    """The sweeps' points by the setting's name."""
    return {name: points for name, points in result.get("sweeps", {}).items() if name in SWEEPS}


def failures(result: Json) -> list[str]:
    """The errors of all failed measurements."""
    points = [point for points in swept(result).values() for point in points]
    all_figures = [*result["variants"].values(), *points, *result.get("latency", {}).get("rows", [])]
    return [figures["failed"] for figures in all_figures if "failed" in figures]


def table(result: Json) -> str:
    """The result as Markdown."""
    found = result["variants"]
    around = {name: f["around_network_and_decode"] for name, f in found.items() if "around_network_and_decode" in f}
    lines = [
        f"{result['model']}, {result['width']}x{result['height']}, {result['steps']} steps, {result['dtype']}, "
        f"guidance {result['cfg_type']}, on {result['machine']['device']}",
        *_rows(
            "| | variant | images/s (least, most) | ms a tick (p95) | latency ms (p95) | memory MiB | start-up s | largest, "
            "mean difference, PSNR |",
            (_variant(name, f) for name, f in found.items()),
        ),
        *_rows("| factor | times | share |", _factors(result["factors"])),
        *_rows("| same VAE on both sides | times (least, most) |", ([n, _spread(r)] for n, r in result["ratios"].items())),
        *_rows(
            "| time around the network and the decode | ms a tick | called alone | per cent |",
            ([n, f"{a['tick_ms']:.3f}", f"{a['by_hand_ms']:.3f}", _spread(a["percent"], 1)] for n, a in around.items()),
        ),
    ]
    return "\n".join(lines + _sweep_lines(result) + _latency_lines(result.get("latency")))


def _rows(head: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table after an empty line, its rows filled with empty cells; nothing where there are no rows."""
    columns = head.count("|") - 1
    lines = [f"| {' | '.join([*row, *[''] * (columns - len(row))])} |" for row in rows]
    return ["", head, "|---" * columns + "|", *lines] if lines else []


def _spread(figure: Mapping[str, float], digits: int = 2) -> str:
    return f"{figure['median']:.{digits}f} ({figure['least']:.{digits}f}, {figure['most']:.{digits}f})"


def _variant(name: str, f: Json) -> list[str]:
    if "images_per_s" not in f:
        return [name, f["title"], f"skipped: {f['skipped']}" if "skipped" in f else f"failed: {f['failed']}"]
    difference = f["difference"]
    psnr = "equal" if difference["psnr_db"] is None else f"{difference['psnr_db']:.1f} dB"
    return [
        name,
        f["title"],
        _spread(f["images_per_s"]),
        *(f"{f[key]['median']:.2f} ({f[key]['p95']:.2f})" for key in ("tick_ms", "latency_ms")),
        f"{f['memory_mib']['reserved']:.0f}" if f["memory_mib"] else "",
        f"{f['start_up_s']:.1f}",
        f"{difference['largest']:.1e}, {difference['mean']:.1e}, {psnr}",
    ]


def _factors(found: Json) -> list[list[str]]:
    rows = []
    for step in found["steps"]:
        share = "" if step["share"] is None else f"{step['share']:.0f} %"
        rows.append([f"({step['from']}) to ({step['to']}): {step['title']}", f"{step['factor']:.2f}", share])
    return [*rows, ["all together", f"{found['total']:.2f}", "100 %"]] if rows else []


def _sweep_lines(result: Json) -> list[str]:
    lines = []
    for name, points in swept(result).items():
        head = (
            f"| {SWEEPS[name].label} | sequential, images/s | ring, images/s (least, most) | ring over sequential "
            "(least, most) | roofline of the network, images/s | with the decoder |"
        )
        lines += _rows(head, map(_point, points))
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


def _point(p: Json) -> list[str]:
    if "failed" in p:
        return [str(p["value"]), f"failed: {p['failed']}"]
    return [
        str(p["value"]),
        f"{p['sequential']['images_per_s']['median']:.2f}",
        _spread(p["ring"]["images_per_s"]),
        _spread(p["ratio"]),
        *(f"{p['roofline'][key]:.2f}" for key in ("network_images_per_s", "with_decoder_images_per_s")),
    ]


def _latency_lines(found: Json | None) -> list[str]:
    if found is None:
        return []
    head = "| input frames/s | stages | the ring fed by the source | the ring ticking freely | sequential | auto |"
    return [
        *_rows(head, map(_latency, found["rows"])),
        "",
        "Latency in ms from an input frame to its finished image, p50 (p95), and input frames drawn a second; "
        f"acceleration {found['acceleration']}, {found['vae']} VAE, image-to-image, one frame a tick. auto: the lowest "
        "latency that holds the input rate, else the fastest.",
    ]


def _latency(row: Json) -> list[str]:
    if "failed" in row:
        return ["", str(row["stages"]), f"failed: {row['failed']}"]
    modes = (row["modes"][name] for name in ("fed", "free", "sequential"))
    figures = (f"{m['p50_ms']:.1f} ({m['p95_ms']:.1f}), {m['images_per_s']:.1f}/s" for m in modes)
    return [str(row["input_rate"]), str(row["stages"]), *figures, row["auto"]]


def rounded(value: Json) -> Json:
    """The value as JSON, with its floats rounded to five significant digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.5g}"))


def write_json(result: Json, path: Path | None) -> None:
    """Write the result with its floats rounded, whole or not at all; its folder is made. Nothing where path is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, mode=0o644, durable=False) as file:
        file.write(f"{json.dumps(rounded(result), indent=1, allow_nan=False)}\n".encode())


def write(result: Json, folder: Path, name: str) -> list[Path]:
    """Write the JSON and the table. Returns their paths."""
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    write_json(result, paths[0])
    paths[1].write_text(table(result) + "\n", encoding="utf-8")
    return paths
