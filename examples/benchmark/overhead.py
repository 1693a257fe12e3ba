"""What the stream itself costs: milliseconds and memory that it adds around the network's call and the decode.

    python examples/benchmark/overhead.py --output static/benchmarks/overhead.json

Draws 512x512 frames with a UNet of Stable Diffusion 1.5's true size and random weights (speed does not depend on them), or
128x128 frames with `--embedded`, the model of this package. Three measures, each the median of rounds that alternate, so
that drift meets all alike: `tick_ms` is a whole call without the decode; `network_ms` the same network called by hand on
the same rows; `stream_ms` a call whose network gives back its input at once, which leaves only what the stream adds,
waiting for the device each time.
Memory is what is allocated after 20 calls and after `--ticks`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamflow import StreamFlow, models
from streamflow.benchmark.full_size import full_size, prompt_arguments
from streamflow.benchmark.report import write_json
from streamflow.conditioning.prompt import stack
from streamflow.models.loading import default_device


class Nothing(nn.Module):
    """A network that takes no time."""

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return x


def load(device: str, dtype: torch.dtype, embedded: bool) -> Any:
    """The pipeline that is measured."""
    return models.load(device=device, dtype=dtype) if embedded else full_size("sd15", device, dtype)


def make_stream(pipe: Any, cfg_type: str, embedded: bool) -> StreamFlow:
    """A prepared 4-stage stream of one frame, whose decode takes no time."""
    if embedded:
        stream = StreamFlow(pipe, range(4), cfg_type=cfg_type)
        prompt = {"prompt": "a fox, 3d render", "max_sequence_length": 0}
    else:
        stream = StreamFlow(pipe, range(4), cfg_type=cfg_type, family="instaflow", width=512, height=512)
        prompt = prompt_arguments("sd15", pipe.device, pipe.dtype, guided=True)
    stream.prepare(num_inference_steps=4, guidance_scale=2.0, **prompt)
    stream.codec.decode = lambda latents: latents
    return stream


def milliseconds(call: Callable[[], object], device: str, calls: int) -> float:
    """Host time of `calls` calls, each followed by a wait for the device, a call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e3


@torch.no_grad()
def measure(stream: StreamFlow, device: str, rounds: int, calls: int) -> dict[str, list[float]]:
    """The three measures, one value a round."""
    network = stream.velocity
    rows = stream._denoiser.engine.rows
    x = torch.cat([stream.frame_noise(0)] * (rows.count + rows.extra))
    arguments = stack([stream._denoiser.state.prompt.cond] * len(x))
    kinds = {
        "tick_ms": (network, stream.txt2img),
        "network_ms": (network, lambda: network(x, rows.t, **arguments)),
        "stream_ms": (Nothing(), stream.txt2img),
    }
    values: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in tqdm(range(rounds + 1), desc=stream.cfg_type, unit="round"):
        for name, (module, call) in kinds.items():
            stream.velocity = module
            values[name].append(milliseconds(call, device, calls))
    stream.velocity = network
    return {name: found[1:] for name, found in values.items()}


def memory(stream: StreamFlow, device: str, ticks: int) -> dict[str, int] | None:
    """Bytes allocated after 20 calls and after `ticks`, and the peak between."""
    if device != "cuda":
        return None
    for _ in range(20):
        stream.txt2img()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    early, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in tqdm(range(ticks - 20), desc="memory", unit="tick"):
        stream.txt2img()
    torch.cuda.synchronize()
    late = {"allocated_late": torch.cuda.memory_allocated(), "reserved_late": torch.cuda.memory_reserved()}
    return {"allocated_20": early, "reserved_20": reserved, "ticks": ticks, **late}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--rounds", type=int, default=9, help="default 9")
    p.add_argument("--calls", type=int, default=20, help="calls a round, default 20")
    p.add_argument("--ticks", type=int, default=2000, help="calls of the memory measure, default 2000")
    p.add_argument("--embedded", action="store_true", help="the embedded model in place of a large UNet")
    p.add_argument("--output", type=Path, help="also write the JSON here")
    a = p.parse_args()
    dtype = torch.float16 if a.device == "cuda" else torch.float32
    pipe, found = load(a.device, dtype, a.embedded), {}
    for cfg_type in ("none", "self", "full", "initialize"):
        stream = make_stream(pipe, cfg_type, a.embedded)
        raw = measure(stream, a.device, a.rounds, a.calls)
        found[cfg_type] = {name: {"median": median(v), "min": min(v), "max": max(v)} for name, v in raw.items()}
        if cfg_type == "none":
            held = memory(stream, a.device, a.ticks)
    name = torch.cuda.get_device_name() if a.device == "cuda" else platform.processor() or platform.machine()
    result = {"command": " ".join(["python", *sys.argv]), "device": name, "torch": torch.__version__, "dtype": str(dtype)}
    result |= {"threads": torch.get_num_threads(), "by_cfg_type": found, "memory": held}
    write_json(result, a.output)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
