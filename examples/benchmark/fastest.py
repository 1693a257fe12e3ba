"""`accelerate("max")` against compiled and graphed, at the true size with random weights: milliseconds an image, network and
decode, of a stream and of images drawn one after another.

    python examples/benchmark/fastest.py --output static/benchmarks/fastest-flux-h100.json
    python examples/benchmark/fastest.py --sizes 1024 --ways sequential

Both change the same weights in place, so they are measured one after another, the baseline first and again at the end.
`times` is the baseline's time over that of "max", its least and most from the spreads of both. What "max" measured, chose
and left out is in the JSON, which is the last line.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from attention import SIZES

from streamflow import StreamFlow
from streamflow._command_line import above, at_least
from streamflow.benchmark.full_size import full_size, prompt_arguments
from streamflow.benchmark.machine import clocks, machine
from streamflow.benchmark.measure import clean, memory
from streamflow.benchmark.report import ratio, rounded, write_json
from streamflow.benchmark.timing import Spread, ticks_within, timed
from streamflow.models.loading import default_device

WAYS = {"stream": True, "sequential": False}  # with the denoising batch, and image after image
BASELINE, MAX, AGAIN = "compiled and graphed", "max", "compiled and graphed again"


def measure(stream: StreamFlow, kind: str, a: argparse.Namespace) -> dict[str, Any]:
    """The start-up and the milliseconds an image of one acceleration."""
    began = time.perf_counter()
    given = {"psnr": a.psnr} if kind == "max" else {"backend": a.backend}
    stream.accelerate(kind, **given)
    for _ in range(a.steps + 1):
        stream.txt2img()
    found: dict[str, Any] = {"kind": stream.acceleration, "start_up_s": time.perf_counter() - began}
    count = ticks_within(a.seconds, stream.txt2img, 1000, stream.device)
    found["image_ms"] = vars(Spread.of([1e3 * timed(stream.txt2img, count, stream.device).mean for _ in range(a.rounds)]))
    if kind == "max":
        found["measured"] = [finite(asdict(way)) for way in stream.acceleration_measured]
    return found | {"clocks": clocks(stream.device), "memory_mib": memory(stream.device)}


def finite(way: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which is the PSNR of equal images."""
    return {name: None if value == float("inf") else value for name, value in way.items()}


def compare(model: str, size: int, batched: bool, a: argparse.Namespace) -> dict[str, Any]:
    """The baseline, "max", and the baseline again."""
    device = torch.device(a.device)
    torch.compiler.reset()
    clean(device)
    pipe = full_size(model, device, torch.float32 if device.type == "cpu" else None)
    given = {"width": size, "height": size, "use_denoising_batch": batched}
    found: dict[str, Any] = {}
    with StreamFlow(pipe, cfg_type="none", **given) as stream:
        stream.prepare(num_inference_steps=a.steps, **prompt_arguments(model, device, pipe.dtype))
        for name, kind in ((BASELINE, "compile"), (MAX, "max"), (AGAIN, "compile")):
            found[name] = measure(stream, kind, a)
            found[name]["times"] = ratio(found[BASELINE]["image_ms"], found[name]["image_ms"])
            image, times = found[name]["image_ms"], found[name]["times"]
            print(
                f"{model} {size}x{size}, {name}: {image['median']:.2f} ms an image ({image['least']:.2f} to "
                f"{image['most']:.2f}), {times['median']:.3f} times ({times['least']:.3f} to {times['most']:.3f})",
                flush=True,
            )
            if name == MAX and a.skip_again:
                break
    return found


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=SIZES, default="flux-schnell", help="default: %(default)s")
    p.add_argument("--sizes", nargs="+", type=at_least(1), default=[1024, 512], help="pixels (default: 1024 512)")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: both")
    p.add_argument("--steps", type=at_least(1), default=4, help="default: %(default)s")
    p.add_argument("--psnr", type=above(0), default=40.0, help="the least PSNR in dB (default: %(default)s)")
    p.add_argument("--rounds", type=at_least(1), default=5, help="default: %(default)s")
    p.add_argument("--seconds", type=above(0), default=2.0, help="of each round (default: %(default)s)")
    p.add_argument("--skip-again", action="store_true", help="do not measure the baseline again")
    p.add_argument("--backend", default="inductor", help="torch.compile's, of the baseline (default: %(default)s)")
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here, after each comparison")
    a = p.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("streamflow.acceleration").setLevel(logging.INFO)
    result: dict[str, Any] = {
        **{"command": " ".join(["python", *sys.argv]), "model": a.model, "steps": a.steps, "rounds": a.rounds},
        **{"machine": machine(torch.device(a.device)), "sizes": {}},
    }
    for size in a.sizes:
        for way in a.ways:
            result["sizes"].setdefault(str(size), {})[way] = rounded(compare(a.model, size, WAYS[way], a))
            write_json(result, a.output)
    print(json.dumps(result, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
