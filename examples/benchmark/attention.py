"""Attention kernels, with and without matrices of eight bits: one call of the network at its true size with random weights,
compiled and in a CUDA graph, for the rows of a stream of 4 steps.

    python examples/benchmark/attention.py --output static/benchmarks/attention-h100.json
    python examples/benchmark/attention.py --sets flux-schnell-1024 --budget 240

The ways of a set are captured one after another, and then their graphs are replayed in turns, so that their ratios hold. The
first is torch's own attention, and `times` is its time over a way's (least and most over the rounds).
`error` is relative, of the network's output for noise from that of the first. A way that cannot run is a row with its error.
On a CPU, which has no graphs, the ways are measured one after another: that checks the script only. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from edit import SIZES  # klein-4b

from streamflow import StreamFlow
from streamflow._command_line import above, at_least
from streamflow.acceleration import Part, check_options, compile
from streamflow.acceleration.cuda_graph import Graphed
from streamflow.acceleration.quantize import quantize, require
from streamflow.benchmark.full_size import Size, full_size, prompt_arguments
from streamflow.benchmark.machine import clocks, compile_cache, machine
from streamflow.benchmark.measure import FAILURES, cause, clean, memory
from streamflow.benchmark.report import rounded, write_json
from streamflow.benchmark.timing import Call, Spread, ticks_within, timed
from streamflow.models.loading import default_device

logger = logging.getLogger(__name__)
euler = partial(FlowMatchEulerDiscreteScheduler, shift=3.0)
SIZES["qwen-image"] = Size(
    pipeline=QwenImagePipeline,
    network=QwenImageTransformer2DModel,
    config={},
    vae={},
    embeds={"prompt_embeds": (1, 64, 3584)},
    dtype=torch.bfloat16,
    scheduler=euler,
    make_vae=AutoencoderKLQwenImage,
)
SIZES["z-image"] = replace(
    SIZES["sd3-medium"],
    pipeline=ZImagePipeline,
    network=ZImageTransformer2DModel,
    config={},
    embeds={"prompt_embeds": (1, 64, 2560)},
)
SIZES["tiny"] = Size(
    pipeline=FluxPipeline,
    network=FluxTransformer2DModel,
    config={
        **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)},
    },
    vae={"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16}
    | {f"{way}_block_types": (f"{name}Block2D",) * 4 for way, name in (("down", "DownEncoder"), ("up", "UpDecoder"))},
    embeds={"prompt_embeds": (1, 16, 32), "pooled_prompt_embeds": (1, 16)},
    dtype=torch.bfloat16,
    scheduler=euler,
)
MODELS = ("flux-schnell", "klein-4b", "sd3-medium", "z-image", "qwen-image")
SETS = {f"{model}-{size}": (model, size) for model in MODELS for size in (1024, 512)} | {"tiny": ("tiny", 64)}

KERNELS = ("_native_cudnn", "fa3", "fa3-fp8", "fa4")
NAMES = {"torch": None, **{name.removeprefix("_native_"): name for name in KERNELS}}
WAYS: dict[str, tuple[bool, str | None]] = {  # whether matrices have eight bits, and the attention
    **{name: (False, attention) for name, attention in NAMES.items()},
    **{"fp8" if name == "torch" else f"fp8+{name}": (True, one) for name, one in NAMES.items()},
}


def make_stream(model: str, size: int, steps: int, device: torch.device) -> StreamFlow:
    """A prepared stream that draws from noise."""
    pipe = full_size(model, device, torch.float32 if device.type == "cpu" else None)
    prompt: dict[str, Any] = prompt_arguments(model, device, pipe.dtype)
    if model == "z-image":  # takes a list of prompts
        prompt["prompt_embeds"] = list(prompt["prompt_embeds"])
    stream = StreamFlow(pipe, cfg_type="none", width=size, height=size, image_as="start")
    stream.prepare(num_inference_steps=steps, **prompt)
    return stream


class Way:
    """The network with one attention, which stays callable after that has been undone, as a CUDA graph. On a CPU it is
    measured at once, and `seconds` has its times."""

    def __init__(self, part: Part, attention: str | None, first: Way | None, a: argparse.Namespace) -> None:
        began, device = time.perf_counter(), part.inputs["x"].device
        options = check_options("compile", device, {"attention": attention, "backend": a.backend})
        made = compile.accelerate([part], options)
        self.velocity, self.seconds = made.modules["velocity"], []
        self.call: Call = partial(part.call, self.velocity)
        try:
            if first and isinstance(self.velocity, Graphed):
                self.velocity._pool = first.velocity._pool  # graphs that never run at the same time share their memory
            self.output = self.call().float()
            self.start_up_s = time.perf_counter() - began
            if isinstance(self.velocity, Graphed):
                self.call = self.velocity.replay_last
            else:
                count = ticks_within(a.seconds, self.call, 1000, device)
                self.seconds = [timed(self.call, count, device).mean for _ in range(a.rounds)]
        finally:
            made.undo()


def measure(model: str, size: int, device: torch.device, a: argparse.Namespace) -> dict[str, Any]:
    """The figures of a set: one row a way. Ways that the time does not suffice for are left out."""
    torch.compiler.reset()
    clean(device)
    stream = make_stream(model, size, a.steps, device)
    parts = stream.parts()
    assert parts is not None, "the stream is prepared"
    like, generator = parts.velocity.inputs["x"], torch.Generator().manual_seed(0)
    x = torch.randn(like.shape, generator=generator).to(like)
    part = replace(parts.velocity, inputs={**parts.velocity.inputs, "x": x})
    ways: dict[str, Way] = {}
    rows: dict[str, Any] = {}
    undo = None
    for name in sorted(a.ways, key=lambda name: WAYS[name][0]):  # matrices are rounded once, after the other ways
        if ways and time.perf_counter() > a.deadline:
            logger.info("%s and what follows: no time left", name)
            break
        eight_bits, attention = WAYS[name]
        first, cache = next(iter(ways.values()), None), compile_cache()
        try:
            if eight_bits and undo is None:
                require("fp8", device)
                undo = quantize(part, compile.repeated_blocks(part.module), "fp8")
            ways[name] = way = Way(part, attention, first, a)
        except (*FAILURES, ImportError) as error:
            rows[name] = {"failed": cause(error)}
            logger.info("  %s %s: failed: %s", model, name, rows[name]["failed"])
            continue
        error = 0.0 if first is None else ((way.output - first.output).norm() / first.output.norm()).item()
        rows[name] = {"start_up_s": way.start_up_s, "compile_cache": cache, "error": error}
        logger.info("  %s %s: started in %.1f s, error %.2g", model, name, way.start_up_s, error)
    if device.type == "cuda":
        counts = {name: ticks_within(a.seconds, way.call, 1000, device) for name, way in ways.items()}
        for _ in range(a.rounds):
            for name, way in ways.items():
                way.seconds.append(timed(way.call, counts[name], device).mean)
    for name, way in ways.items():
        base = next(iter(ways.values())).seconds
        rows[name]["call_ms"] = vars(Spread.of([1e3 * one for one in way.seconds]))
        rows[name]["times"] = vars(Spread.of([first / one for first, one in zip(base, way.seconds, strict=True)]))
    if undo is not None:
        undo()
    shapes = {name: list(value.shape) for name, value in part.inputs.items()}
    about = {"width": size, "height": size, "rows": len(x), "inputs": shapes, "clocks": clocks(device)}
    return {**about, "memory_mib": memory(device), "ways": rows}


def row(name: str, f: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in f:
        return f"| {name} | failed: {f['failed']} | | |"
    call, times = f["call_ms"], f["times"]
    spread = f"{times['median']:.3f} ({times['least']:.3f} to {times['most']:.3f})"
    return f"| {name} | {call['median']:.2f} ({call['least']:.2f} to {call['most']:.2f}) | {spread} | {f['error']:.1e} |"


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sets", nargs="+", choices=SETS, default=[name for name in SETS if name != "tiny"], help="default: all")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all; the first is the baseline")
    p.add_argument("--steps", type=at_least(1), default=4, help="rows of a call (default: %(default)s)")
    p.add_argument("--rounds", type=at_least(1), default=7, help="default: %(default)s")
    p.add_argument("--seconds", type=above(0), default=0.3, help="of each measurement (default: %(default)s)")
    p.add_argument("--budget", type=above(0), default=1e9, help="seconds after which no further way is started")
    p.add_argument("--backend", default="inductor", help="torch.compile's (default: %(default)s)")
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here, after each set")
    a = p.parse_args(argv)
    a.deadline = began + a.budget
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(a.device)
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": machine(device), "sets": {}}
    for name in a.sets:
        if time.perf_counter() > a.deadline:
            logger.info("%s and what follows: no time left", name)
            break
        logger.info("%s", name)
        model, size = SETS[name]
        try:
            found = measure(model, size, device, a)
        except FAILURES as error:
            found = {"failed": cause(error), "ways": {}}
            logger.info("%s failed: %s", name, found["failed"])
        result["sets"][name] = rounded(found)
        print(f"| {name} | ms a call | times the first | error |", "|---|---|---|---|", sep="\n")
        print(*(row(way, f) for way, f in result["sets"][name]["ways"].items()), sep="\n", flush=True)
        write_json(result, a.output)
    print(json.dumps(result, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
