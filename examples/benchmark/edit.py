"""Edit streams at the true size of FLUX.2 Klein, with random weights: images a second and latency, from a camera's image to
the drawn image, VAE included. The ways of a set are measured in turns in one run, so that their ratios hold.

python examples/benchmark/edit.py --output edit.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)

from streamflow import StreamFlow
from streamflow.benchmark.full_size import SIZES, Size, full_size, prompt_arguments
from streamflow.benchmark.machine import machine
from streamflow.benchmark.report import write_json
from streamflow.benchmark.timing import Call, Spread, latencies, ticks_within, timed
from streamflow.models.loading import default_device

TEXT = 512  # tokens to which Klein's pipeline pads a prompt
SHORT = 40  # tokens of a prompt of a usual length


def size(pipeline: Any, double: int, single: int, heads: int, width: int, text: int = TEXT) -> Size:
    """A Klein with so many blocks and heads; width: of its text encoder."""
    return Size(
        pipeline=pipeline,
        network=Flux2Transformer2DModel,
        config={
            "num_layers": double,
            "num_single_layers": single,
            "num_attention_heads": heads,
            "joint_attention_dim": 3 * width,
            "guidance_embeds": False,
        },
        vae={},
        embeds={"prompt_embeds": (1, text, 3 * width)},
        dtype=torch.bfloat16,
        scheduler=partial(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True),
        options={"is_distilled": True},
        make_vae=AutoencoderKLFlux2,
    )


SIZES["klein-4b"] = size(Flux2KleinPipeline, 5, 20, 24, 2560)
SIZES["klein-4b-short"] = size(Flux2KleinPipeline, 5, 20, 24, 2560, SHORT)
SIZES["klein-9b"] = size(Flux2KleinPipeline, 8, 24, 32, 4096)
SIZES["klein-9b-kv"] = size(Flux2KleinKVPipeline, 8, 24, 32, 4096)
SIZES["tiny"] = size(Flux2KleinPipeline, 1, 1, 1, 8, 16)
SIZES["tiny-kv"] = size(Flux2KleinKVPipeline, 1, 1, 1, 8, 16)


@dataclass(frozen=True)
class Way:
    """One way of drawing. batched: with the denoising batch; else the stream draws as the pipeline does, image after image.
    quantize: of the network's matrices. style: a second reference, which stays."""

    name: str
    model: str
    batched: bool = True
    quantize: str | None = None
    style: bool = False
    steps: int = 4
    width: int = 512
    height: int = 512
    options: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def stream(self, pipe: Any, kind: str) -> Iterator[StreamFlow]:
        """A warm stream of this way."""
        given = {"width": self.width, "height": self.height, "use_denoising_batch": self.batched, "noise": "constant"}
        with StreamFlow(pipe, cfg_type="none", **given) as stream:
            embeds = prompt_arguments(self.model, pipe.device, pipe.dtype)
            stream.prepare(num_inference_steps=self.steps, **embeds)
            if self.style:
                stream.set_reference("style", camera(99, self.width, self.height))
            more = {} if self.quantize is None or kind == "none" else {"quantize": self.quantize}
            stream.accelerate(kind, **more)
            yield stream


IMAGES = 16  # that the camera shows in turn


@cache
def camera(frame: int, width: int, height: int) -> np.ndarray:
    """An image of a camera."""
    return np.random.default_rng(frame).integers(0, 256, (height, width, 3), dtype=np.uint8)


SETS = {
    "4b": [
        Way("one after another, bf16", "klein-4b", batched=False),
        Way("stream, bf16", "klein-4b"),
        Way("stream, fp8", "klein-4b", quantize="fp8"),
        Way("stream, fp8, a prompt of 40 tokens", "klein-4b-short", quantize="fp8"),
        Way("stream, bf16, a prompt of 40 tokens", "klein-4b-short"),
    ],
    "4b-2steps": [
        Way("one after another, bf16", "klein-4b", batched=False, steps=2, width=576, height=320),
        Way("stream, bf16", "klein-4b", steps=2, width=576, height=320),
        Way("stream, fp8", "klein-4b", steps=2, width=576, height=320, quantize="fp8"),
        Way("stream, bf16, a prompt of 40 tokens", "klein-4b-short", steps=2, width=576, height=320),
        Way("stream, fp8, a prompt of 40 tokens", "klein-4b-short", steps=2, width=576, height=320, quantize="fp8"),
    ],
    "9b": [
        Way("keys and values of references in every step", "klein-9b", style=True),
        Way("keys and values of references cached", "klein-9b-kv", style=True),
    ],
    "tiny": [
        Way("one after another", "tiny", batched=False, steps=2, width=64, height=64),
        Way("stream", "tiny", steps=2, width=64, height=64),
        Way("stream, cached", "tiny-kv", steps=2, width=64, height=64, style=True),
    ],
}
REUSE = {"9b": SETS["9b"][-1], "tiny": SETS["tiny"][-1]}  # the ways whose error with `reference_reuse` is measured
SHARES = (0.1, 0.5, 1.0)  # of the camera's image that changes from frame to frame


def reuse_errors(way: Way, device: torch.device, kind: str, frames: int = 8) -> list[dict[str, Any]]:
    """How far images are from those without `reference_reuse`, where so much of the camera's image changes."""
    pipe = full_size(way.model, device, torch.float32 if device.type == "cpu" else None)
    rows = []
    with way.stream(pipe, kind) as stream:
        for share in SHARES:
            changing = round(share * way.height)
            images = [camera(0, way.width, way.height).copy() for _ in range(frames)]
            for i, image in enumerate(images):
                image[:changing] = camera(i, way.width, way.height)[:changing]
            drawn = {}
            for reuse in (None, 0.0):
                stream.reset()
                stream.update(reference_reuse=reuse)
                out = [frame.wait().image.float() for frame in stream.frames(images)]
                drawn[reuse] = torch.stack(out[1:])  # the first frame is computed whole
            error = (drawn[0.0] - drawn[None]).norm() / drawn[None].norm()
            rows.append({"share": share, "relative_error": error.item()})
    return rows


def measure(ways: list[Way], device: torch.device, kind: str, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Each way's images a second over several rounds, in turns, and its latency. Every way has a model of its own, since
    quantization changes the weights."""
    with ExitStack() as opened:
        ticks = []
        for way in ways:
            pipe = full_size(way.model, device, torch.float32 if device.type == "cpu" else None)
            ticks.append(ticking(opened.enter_context(way.stream(pipe, kind)), way))
        rows: list[dict[str, Any]] = [{"way": way.name, "model": way.model, "images_per_s": []} for way in ways]
        for _ in range(rounds):
            for row, tick in zip(rows, ticks, strict=True):
                row["images_per_s"].append(1 / timed(tick, ticks_within(seconds, tick, 1000, device), device).mean)
        for row, tick, way in zip(rows, ticks, ways, strict=True):
            times = latencies(tick, way.steps if way.batched else 1, ticks_within(seconds, tick, 60, device), device)
            times = sorted(1e3 * one for one in times)
            row["latency_ms"] = {"p50": times[len(times) // 2], "p95": times[int(0.95 * (len(times) - 1))]}
        return rows


def ticking(stream: StreamFlow, way: Way) -> Call:
    """A call that gives a warm stream the camera's next image."""
    ids = count()

    def tick() -> object:
        return stream(camera(next(ids) % IMAGES, way.width, way.height))

    for _ in range(2 * way.steps):
        tick()
    return tick


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sets", nargs="+", choices=SETS, default=["4b", "4b-2steps", "9b"], help="default: all but tiny")
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--accelerate", default="auto", help="kind of acceleration (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    p.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("edit.json"), metavar="FILE", help="default: %(default)s")
    a = p.parse_args()
    device = torch.device(a.device)
    command = " ".join(["python", *sys.argv])
    result: dict[str, Any] = {"command": command, "machine": machine(device), "sets": {}}
    for name in a.sets:
        rows = measure(SETS[name], device, a.accelerate, a.rounds, a.seconds)
        first = rows[0]["images_per_s"]
        for row in rows:
            spread = Spread.of(row["images_per_s"])
            ratio = Spread.of([one / base for one, base in zip(row["images_per_s"], first, strict=True)])
            row["ratio_to_first"] = [ratio.least, ratio.median, ratio.most]
            print(
                f"{name}: {row['way']}: {spread.median:.2f} images/s ({spread.least:.2f} to {spread.most:.2f}), "
                f"{ratio.median:.2f} times the first, latency p50 {row['latency_ms']['p50']:.0f} ms, "
                f"p95 {row['latency_ms']['p95']:.0f} ms",
                flush=True,
            )
        result["sets"][name] = rows
        write_json(result, a.output)  # what follows may fail or run out of time
        if name in REUSE:
            result.setdefault("reference_reuse", {})[name] = reuse_errors(REUSE[name], device, a.accelerate)
            for row in result["reference_reuse"][name]:
                print(
                    f"{name}: reference_reuse=0, {row['share']:.0%} of the camera's image change: "
                    f"relative error {row['relative_error']:.2g}",
                    flush=True,
                )
            write_json(result, a.output)
    print(f"wrote {a.output}")


if __name__ == "__main__":
    main()
