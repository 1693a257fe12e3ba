"""What goes further than compilation with CUDA graphs, measured against it: eight-bit matrices, other attention, fused
projections, inductor's own options; what does not pay is in the table too.

    python examples/benchmark/further.py --model flux-schnell --output static/benchmarks/further-flux.json
    python examples/benchmark/further.py --model sd3-medium --variants fuse_qkv,cudnn,int8

Each variant compiles the same network of true size with random weights anew, so they are measured one after another, the
baseline first and again at the end: what differs between these two is drift, and no variant's gain below it counts. A tick
is the network and the decoder alone, their graphs replayed where there are graphs; `times` is the baseline's tick over the
variant's (least and most from the spreads of both). Differences are between the images, in [0, 1], and the baseline's;
with random weights they say how large the errors are, not what they look like. A variant that cannot run is a row with its
error. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamflow._command_line import above, at_least
from streamflow.benchmark.machine import clocks, compile_cache, machine
from streamflow.benchmark.measure import FAILURES, cause, clean, differences, memory, warm
from streamflow.benchmark.report import ratio, rounded, write_json
from streamflow.benchmark.settings import Settings, chosen
from streamflow.benchmark.subject import COMPARED, Subject, load
from streamflow.benchmark.timing import Spread, timed, wait
from streamflow.benchmark.ways import Way, by_hand
from streamflow.image_utils import denormalize
from streamflow.models.loading import default_device

logger = logging.getLogger(__name__)
SIZES = {"flux-schnell": 512, "sd3-medium": 512, "sd15": 512, "embedded": 128}
Compared = Callable[[Tensor], Tensor]
BASELINE, AGAIN = "baseline", "baseline again"
CUDNN, FLASH = {"attention": "_native_cudnn"}, {"attention": "_native_flash"}
FUSED_INT8 = {"quantize": "int8", "options": {"force_fuse_int_mm_with_mul": True}}
VARIANTS: dict[str, dict[str, Any]] = {
    "fuse_qkv": {"fuse_qkv": True},
    "whole": {"regional": False},
    "tuned": {"options": {"coordinate_descent_tuning": True}},
    "cudnn": CUDNN,
    "flash": FLASH,
    "efficient": {"attention": "_native_efficient"},
    "math": {"attention": "_native_math"},
    "fp8": {"quantize": "fp8"},
    "fp8-tensor": {"quantize": "fp8-tensor"},
    "int8": {"quantize": "int8"},
    "int8-fused": FUSED_INT8,
    "fp8+fuse_qkv": {"quantize": "fp8", "fuse_qkv": True},
    "fp8+cudnn": {"quantize": "fp8", **CUDNN},
    "fp8-tensor+fuse_qkv+cudnn": {"quantize": "fp8-tensor", "fuse_qkv": True, **CUDNN},
}


def measure(subject: Subject, tiny: bool, options: Mapping[str, Any], images: Compared) -> dict[str, Any]:
    """One variant's figures. images: takes the first it draws, and gives those to compare them with."""
    device, s = subject.device, subject.settings
    torch.compiler.reset()
    clean(device)
    cache, began = compile_cache(), time.perf_counter()
    with subject.stream(tiny) as stream:
        stream.accelerate("compile", **options)
        first = stream.txt2img()
        wait(device)
        start_up = time.perf_counter() - began
        drawn = [denormalize(first), *(denormalize(stream.txt2img()) for _ in range(COMPARED - 1))]
        difference = differences(torch.cat(drawn), images(torch.cat(drawn).float().cpu()))
        way = Way(by_hand(stream))
        count = warm(subject, way)
        rounds = [timed(way.tick, count, device).mean for _ in range(s.rounds)]
        whole = [timed(stream.txt2img, count, device).mean for _ in range(s.rounds)]
        found = {"clocks": clocks(device), "memory_mib": memory(device), "network_rows": stream.trt_unet_batch_size}
    return {
        "start_up_s": start_up,
        "compile_cache": cache,
        "ticks_per_round": count,
        "tick_ms": vars(Spread.of([1e3 * value for value in rounds])),
        "with_the_stream_ms": vars(Spread.of([1e3 * value for value in whole])),
        "difference": difference,
        **found,
    }


def measure_all(subject: Subject, tiny: bool, names: tuple[str, ...], common: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The baseline, each variant, and the baseline again, by name; {"failed": why} for one that cannot be. After each: all
    that has been found, so that a run that is cut short leaves what it has."""
    kept: list[Tensor] = []

    def images(drawn: Tensor) -> Tensor:
        if not kept:
            kept.append(drawn)
        return kept[0]

    found: dict[str, Any] = {}
    for name, own in {BASELINE: {}, **{name: VARIANTS[name] for name in names}, AGAIN: {}}.items():
        logger.info("%s %s", name, own)
        options = {**common, **own}
        try:
            figures = measure(subject, tiny, options, images)
        except FAILURES as error:
            if name == BASELINE:
                raise
            figures = {"failed": cause(error)}
            logger.warning("  failed: %s", figures["failed"])
        if "failed" not in figures:
            figures["times"] = ratio(found.get(BASELINE, figures)["tick_ms"], figures["tick_ms"])
            logger.info("  %s", row(name, figures))
        found[name] = {"options": options, **figures}
        yield found


def table(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    head = "| variant | ms a tick (least, most) | times (least, most) | largest difference, PSNR | start-up s | memory MiB |"
    return "\n".join([head, "|---|---|---|---|---|---|", *(row(name, figures) for name, figures in found.items())])


def row(name: str, f: Mapping[str, Any]) -> str:
    """One line of the table."""
    if "failed" in f:
        return f"| {name} | failed: {f['failed']} | | | | |"
    tick, times, d = f["tick_ms"], f["times"], f["difference"]
    psnr = "equal" if d["psnr_db"] is None else f"{d['psnr_db']:.1f} dB"
    cells = (
        name,
        f"{tick['median']:.3f} ({tick['least']:.3f}, {tick['most']:.3f})",
        f"{times['median']:.3f} ({times['least']:.3f}, {times['most']:.3f})",
        f"{d['largest']:.1e}, {psnr}",
        f"{f['start_up_s']:.1f} ({f['compile_cache']} cache)",
        f"{f['memory_mib']['reserved']:.0f}" if f["memory_mib"] else "",
    )
    return f"| {' | '.join(cells)} |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=SIZES, default="flux-schnell", help="default: %(default)s")
    p.add_argument("--variants", type=chosen(list(VARIANTS)), default=tuple(VARIANTS), help="comma-separated (default: all)")
    p.add_argument("--vae", choices=("tiny", "own"), default="tiny", help="the decoder (default: %(default)s)")
    p.add_argument("--steps", type=at_least(1), default=4, help="default 4")
    p.add_argument("--width", type=at_least(1), help="pixels (default: 512, embedded 128)")
    p.add_argument("--height", type=at_least(1), help="pixels (default: 512, embedded 128)")
    p.add_argument("--rounds", type=at_least(1), default=7, help="default 7")
    p.add_argument("--frames", type=at_least(1), default=30, help="most ticks a round (default 30)")
    p.add_argument("--round-seconds", type=above(0), default=0.5, help="a slow variant takes fewer ticks (default 0.5)")
    p.add_argument("--frame-buffer-size", type=at_least(1), default=1, help="frames a tick (default 1)")
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the model's own")
    p.add_argument("--backend", default="inductor", help="torch.compile's (default: %(default)s)")
    p.add_argument("--output", type=Path, help="also write the JSON here")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = Settings(
        model=a.model,
        random_weights=a.model != "embedded",
        steps=a.steps,
        width=a.width or SIZES[a.model],
        height=a.height or SIZES[a.model],
        frames=a.frames,
        rounds=a.rounds,
        round_seconds=a.round_seconds,
        device=a.device,
        dtype=a.dtype,
        frame_buffer_size=a.frame_buffer_size,
    )
    subject = load(settings)
    about = {
        "command": " ".join(["python", *sys.argv]),
        "model": a.model,
        "vae": a.vae,
        "width": settings.width,
        "height": settings.height,
        "steps": a.steps,
        "frame_buffer_size": a.frame_buffer_size,
        "dtype": str(subject.pipe.dtype).removeprefix("torch."),
        "rounds": a.rounds,
        "machine": machine(subject.device),
    }
    if a.output:
        a.output.parent.mkdir(parents=True, exist_ok=True)
    for found in measure_all(subject, a.vae == "tiny", a.variants, {"backend": a.backend}):
        result = rounded({**about, "variants": found})
        write_json(result, a.output)
    print(table(found), json.dumps(result, allow_nan=False), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
