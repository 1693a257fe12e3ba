"""What an IP-Adapter adds to a tick of Stable Diffusion 1.5's UNet at its true size, with random weights and the VAE. The
ways are measured in turns in one run, so that their ratios hold.

python examples/benchmark/image_prompt.py --output image_prompt.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamflow import StreamFlow
from streamflow.benchmark.full_size import full_size, prompt_arguments
from streamflow.benchmark.machine import machine
from streamflow.benchmark.report import write_json
from streamflow.benchmark.timing import Call, Spread, ticks_within, timed
from streamflow.conditioning.image_prompt import ImageEmbeds
from streamflow.models.loading import default_device

MODEL = "sd15"
WIDTH = 1024  # of the image embeddings of the published adapter for Stable Diffusion 1.5
TOKENS = 4  # that it makes of an image
IMAGES = 16  # styles that change from frame to frame

Prepare = Callable[[StreamFlow], Callable[[], dict[str, Any]]]


def adapter(unet: Any) -> dict[str, dict[str, Tensor]]:
    """A random adapter in the published one's file format and size."""
    out = unet.config.cross_attention_dim
    crossed = [name.removesuffix(".processor") for name in unet.attn_processors if not name.endswith("attn1.processor")]
    layers = {}
    for i, name in enumerate(crossed):
        inner = unet.get_submodule(name).inner_dim
        for key in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{key}.weight"] = nn.Linear(out, inner, bias=False).weight.detach()
    projection = nn.Linear(WIDTH, TOKENS * out)
    image_proj = {f"proj.{name}": value.detach() for name, value in projection.state_dict().items()}
    image_proj |= {"norm.weight": torch.ones(out), "norm.bias": torch.zeros(out)}
    return {"image_proj": image_proj, "ip_adapter": layers}


def embeds(image: int) -> ImageEmbeds:
    """What an image encoder would make of an image."""
    return ImageEmbeds(torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(image)))


def without(stream: StreamFlow) -> Callable[[], dict[str, Any]]:
    return dict


def fixed(stream: StreamFlow) -> Callable[[], dict[str, Any]]:
    stream.image_prompts.load(adapter(stream.unet), "style", image_encoder=None, scale=0.7)
    stream.image_prompts.set(embeds(0))
    return dict


def per_frame(stream: StreamFlow) -> Callable[[], dict[str, Any]]:
    stream.image_prompts.load(adapter(stream.unet), "style", image_encoder=None, scale=0.7)
    images, ids = [embeds(i) for i in range(IMAGES)], count()
    return lambda: {"image_prompt": images[next(ids) % IMAGES]}


WAYS: dict[str, Prepare] = {"no adapter": without, "one style for all frames": fixed, "a style for each frame": per_frame}


def ticking(stream: StreamFlow, prepare: Prepare, kind: str, steps: int) -> Call:
    """A call that draws with a warm stream."""
    pipe = stream.pipe
    arguments = prepare(stream)
    stream.prepare(num_inference_steps=steps, **prompt_arguments(MODEL, pipe.device, pipe.dtype))
    stream.accelerate(kind)

    def tick() -> object:
        return stream.txt2img(**arguments())

    for _ in range(2 * steps):
        tick()
    return tick


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--accelerate", default="auto", help="kind of acceleration (default: %(default)s)")
    p.add_argument("--size", type=int, default=512, help="pixels of a side (default: %(default)s)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    p.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("image_prompt.json"), metavar="FILE", help="default: %(default)s")
    a = p.parse_args()
    device = torch.device(a.device)
    with ExitStack() as opened:
        ticks: dict[str, Call] = {}
        for name, prepare in WAYS.items():
            pipe = full_size(MODEL, device, torch.float32 if device.type == "cpu" else None)
            stream = StreamFlow(pipe, family="instaflow", width=a.size, height=a.size, cfg_type="none")
            ticks[name] = ticking(opened.enter_context(stream), prepare, a.accelerate, a.steps)
        times: dict[str, list[float]] = {name: [] for name in ticks}
        for _ in range(a.rounds):
            for name, tick in ticks.items():
                times[name].append(1e3 * timed(tick, ticks_within(a.seconds, tick, 1000, device), device).mean)
    rows, first = [], next(iter(times.values()))
    for name, own in times.items():
        ratio = Spread.of([one / base for one, base in zip(own, first, strict=True)])
        rows.append({"way": name, "ms_per_tick": own, "ratio_to_first": [ratio.least, ratio.median, ratio.most]})
        print(
            f"{name}: {Spread.of(own).median:.2f} ms a tick, {ratio.median:.3f} times the first "
            f"({ratio.least:.3f} to {ratio.most:.3f})"
        )
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(device),
        "size": a.size,
        "steps": a.steps,
        "ways": rows,
    }
    write_json(result, a.output)
    print(f"wrote {a.output}")


if __name__ == "__main__":
    main()
