"""GPU memory of a stream, by the ways of saving it: torch's own peak while a pipeline of true size with random weights is
moved to the GPU, encodes a prompt, is accelerated, and draws.

    python examples/benchmark/memory.py --output static/benchmarks/memory.json
    python examples/benchmark/memory.py --models klein-4b --ways fp8-placed-offloaded
    python examples/benchmark/memory.py --table static/benchmarks/memory.json

Every row is a process of its own. The pipeline, text encoders included, is made on the CPU, as a loaded one would be.
Prompts are random tokens. Klein is given an image with every call, as its reference. The last line is JSON. GiB are of
`torch.cuda.max_memory_allocated`; CUDA's own context and the allocator's reserve come on top (`process_gib` of a row).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

sys.path.insert(0, str(Path(__file__).parent))

from edit import SIZES, camera  # noqa: E402

from streamflow import StreamFlow  # noqa: E402
from streamflow.acceleration.memory import place  # noqa: E402
from streamflow.benchmark.full_size import full_size_tiny_vae  # noqa: E402
from streamflow.benchmark.machine import machine  # noqa: E402
from streamflow.benchmark.report import write_json  # noqa: E402
from streamflow.benchmark.timing import Spread, timed, wait  # noqa: E402
from streamflow.models.loading import default_device  # noqa: E402

STEPS, GIB = 4, 2**30
Encoder = Callable[[], PreTrainedModel]
CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
T5_XXL = T5Config(
    d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128
)
QWEN3_4B = Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
)
TINY = Qwen3Config(
    hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=1, num_key_value_heads=1, head_dim=8
)


def last_layers(pipe: Any, ids: Tensor, layers: tuple[int, ...]) -> dict[str, Tensor]:
    """The hidden states of these layers, side by side, as Klein's pipeline takes them."""
    states = pipe.text_encoder(ids[:, :512], output_hidden_states=True, use_cache=False).hidden_states
    return {"prompt_embeds": torch.cat([states[i] for i in layers], dim=-1)}


def flux_embeds(pipe: Any, ids: Tensor) -> dict[str, Tensor]:
    """What Flux's pipeline takes of CLIP and T5."""
    pooled = pipe.text_encoder(ids[:, :77]).pooler_output
    return {"prompt_embeds": pipe.text_encoder_2(ids[:, :256])[0], "pooled_prompt_embeds": pooled}


@dataclass(frozen=True)
class Model:
    """A model and its text encoders. tokens: the number of different ones. edit: every call has an image."""

    size: str
    encoders: dict[str, Encoder]
    embeds: Callable[[Any, Tensor], dict[str, Tensor]]
    tokens: int
    edit: bool = False
    pixels: int = 512


MODELS = {
    "klein-4b": Model(
        "klein-4b",
        {"text_encoder": lambda: Qwen3ForCausalLM(QWEN3_4B)},
        lambda pipe, ids: last_layers(pipe, ids, (9, 18, 27)),
        tokens=151936,
        edit=True,
    ),
    "flux-schnell": Model(
        "flux-schnell",
        {"text_encoder": lambda: CLIPTextModel(CLIP_L), "text_encoder_2": lambda: T5EncoderModel(T5_XXL)},
        flux_embeds,
        tokens=32128,
    ),
    "tiny": Model(
        "tiny",
        {"text_encoder": lambda: Qwen3ForCausalLM(TINY)},
        lambda pipe, ids: last_layers(pipe, ids[:, :16], (1, 2, 3)),
        tokens=1000,
        edit=True,
        pixels=64,
    ),
}


@dataclass(frozen=True)
class Way:
    """A way of saving memory. placed: quantised layer by layer on the way to the GPU. offloaded: text encoders stay on the
    CPU. tiny: a tiny VAE, where there is a random one. options: of `accelerate`."""

    placed: str | None = None
    offloaded: bool = False
    tiny: bool = False
    options: dict[str, Any] = field(default_factory=dict)


FP8 = {"quantize": "fp8"}
WAYS = {
    "plain": Way(),
    "offloaded": Way(offloaded=True),
    "fp8": Way(options=FP8),
    "fp8-dropped": Way(options={**FP8, "keep_plain": False}),
    "fp8-placed": Way(placed="fp8"),
    "fp8-placed-offloaded": Way(placed="fp8", offloaded=True),
    "fp8-placed-offloaded-tiny": Way(placed="fp8", offloaded=True, tiny=True),
    "int8-placed-offloaded": Way(placed="int8", offloaded=True),
}
DEFAULT = ("plain", "offloaded", "fp8", "fp8-placed", "fp8-placed-offloaded")


def random_module(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A module on the CPU whose weights are copies of one block of random values: made within seconds at any size."""
    block = (0.02 * torch.randn(2**22)).to(dtype)
    with init_empty_weights():
        module = make().eval()
    made: dict[int, nn.Parameter] = {}
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                values = torch.empty(parameter.numel(), dtype=dtype)
                for part in values.split(len(block)):
                    part.copy_(block[: len(part)])
                made[id(parameter)] = nn.Parameter(values.view(parameter.shape), requires_grad=False)
            one._parameters[name] = made[id(parameter)]
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module


def random_pipe(model: Model, dtype: torch.dtype) -> Any:
    """The pipeline on the CPU, with text encoders and without tokenizers."""
    size = SIZES[model.size]
    network = random_module(lambda: size.network(**size.config), dtype)
    vae = size.make_vae(**size.vae).to(dtype).eval().requires_grad_(False)
    pipe = size.assemble(network, vae)
    pipe.register_modules(**{name: random_module(make, dtype) for name, make in model.encoders.items()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Peaks:
    """The peak of each stage, in GiB; zero on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.found = device, {}

    def end(self, stage: str) -> None:
        """The stage that began with the last call has ended."""
        wait(self.device)
        if self.device.type == "cuda":
            self.found[stage] = round(torch.cuda.max_memory_allocated(self.device) / GIB, 3)
            torch.cuda.reset_peak_memory_stats(self.device)


def measure(name: str, way_name: str, device: torch.device, kind: str, rounds: int) -> dict[str, Any]:
    """One row."""
    model, way = MODELS[name], WAYS[way_name]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipe, peaks = random_pipe(model, dtype), Peaks(device)
    began = time.perf_counter()
    place(pipe, device, quantize=way.placed, offload_text_encoders=way.offloaded)
    peaks.end("place")
    place_s = time.perf_counter() - began

    def encode() -> dict[str, Tensor]:
        ids = torch.randint(model.tokens, (1, 512)).to(device)
        with torch.no_grad():
            embeds = model.embeds(pipe, ids)
        wait(device)
        return {name: value.to(dtype) for name, value in embeds.items()}

    embeds = encode()
    peaks.end("first_prompt")
    times = []
    for _ in range(5):
        began = time.perf_counter()
        embeds = encode()
        times.append(time.perf_counter() - began)
    peaks.end("prompt")
    side = model.pixels
    with StreamFlow(pipe, cfg_type="none", width=side, height=side, noise="constant") as stream:
        if way.tiny:
            stream.vae = full_size_tiny_vae(model.size, device, dtype)
        stream.prepare(num_inference_steps=STEPS, **embeds)
        began = time.perf_counter()
        stream.accelerate(kind, **({} if kind == "none" else way.options))
        peaks.end("accelerate")
        accelerate_s = time.perf_counter() - began
        images = [camera(i, side, side) for i in range(4)]

        def tick() -> object:
            return stream(images[0]) if model.edit else stream.txt2img()

        for _ in range(2 * STEPS):
            tick()
        peaks.end("first_images")
        rates = [1 / timed(tick, 8, device).mean for _ in range(rounds)]
        peaks.end("draw")
        encode()  # a prompt that changes while it draws
        tick()
        peaks.end("prompt_and_draw")
        allocated = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
        used = process_gib(device)
    spread = Spread.of(rates)
    return {
        "model": name,
        "way": way_name,
        "peak_gib": max(peaks.found.values(), default=0.0),
        "peaks_gib": peaks.found,
        "allocated_gib": round(allocated, 3),
        "process_gib": used,
        "images_per_s": spread.median,
        "images_per_s_spread": [spread.least, spread.most],
        "prompt_s": sorted(times)[len(times) // 2],
        "place_s": place_s,
        "accelerate_s": accelerate_s,
    }


def process_gib(device: torch.device) -> float | None:
    """The memory that the driver has given to all processes on this GPU, CUDA's context included."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return round((total - free) / GIB, 3)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = "| model | way | peak, GiB | peak while drawing, GiB | with CUDA's own, GiB | images/s | a prompt, s |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['model']} | {row['way']} | failed: {row['failed']} | | | | |")
            continue
        drawing = row["peaks_gib"].get("draw", 0.0)
        cells = (
            *(row["model"], row["way"], f"{row['peak_gib']:.1f}", f"{drawing:.1f}", f"{row['process_gib'] or 0:.1f}"),
            *(f"{row['images_per_s']:.2f}", f"{row['prompt_s']:.3f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_new_process(a: argparse.Namespace, model: str, way: str) -> dict[str, Any]:
    """A row that was measured in a process of its own, or its error."""
    command = [sys.executable, __file__, "--one", model, way, "--device", a.device, "--accelerate", a.accelerate]
    done = subprocess.run([*command, "--rounds", str(a.rounds)], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        print(done.stderr[-4000:], file=sys.stderr)
        return {"model": model, "way": way, "failed": last[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=MODELS, default=["klein-4b", "flux-schnell"], help="default: all but tiny")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=DEFAULT, help=f"default: {' '.join(DEFAULT)}")
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--accelerate", default="auto", help="kind of acceleration (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    p.add_argument("--output", type=Path, help="also write the JSON here, after every row")
    p.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a JSON, and measure nothing")
    p.add_argument("--one", nargs=2, metavar=("MODEL", "WAY"), help="one row in this process; used by the command itself")
    a = p.parse_args(argv)
    if a.table:
        print(table(json.loads(a.table.read_text(encoding="utf-8"))["rows"]))
        return 0
    device = torch.device(a.device)
    if a.one:
        print(json.dumps(measure(*a.one, device, a.accelerate, a.rounds)))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        command = " ".join(["python examples/benchmark/memory.py", *(argv or sys.argv[1:])])
        result: dict[str, Any] = {"command": command, "machine": machine(device), "rows": []}
        for model in a.models:
            for way in a.ways:
                row = in_new_process(a, model, way)
                print(row, file=sys.stderr, flush=True)
                result["rows"].append(row)
                write_json(result, a.output)
    print(table(result["rows"]), json.dumps(result), sep="\n")
    return 1 if all("failed" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
