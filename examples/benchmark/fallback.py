"""Speed of a family's adapter, of the fallback for any pipeline, and of plain diffusers.

    python examples/benchmark/fallback.py --model sd3-medium --output static/benchmarks/fallback-sd3.json

The same pipeline draws in three ways, in turns within one run: its own call, one image after another; the fallback, whose
frames are calls of the pipeline that share the network; and the family's adapter, without acceleration, which the fallback
does not have. `accelerated` is the adapter under `accelerate("auto")`. Networks have their published size and random
weights, or are the embedded model's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from streamflow import StreamFlow
from streamflow._command_line import at_least
from streamflow.benchmark.machine import clocks, machine
from streamflow.benchmark.measure import warm
from streamflow.benchmark.report import ratio, rounded, write_json
from streamflow.benchmark.settings import Settings
from streamflow.benchmark.subject import Subject, load
from streamflow.benchmark.timing import Spread, timed
from streamflow.benchmark.ways import Way, plain, streamed
from streamflow.image_utils import denormalize
from streamflow.models.loading import default_device

SIZES = {"sd3-medium": 512, "flux-schnell": 512, "sana": 1024, "sd15": 512, "embedded": 128}


def next_image(stream: StreamFlow) -> torch.Tensor:
    """The next image, [0, 1]."""
    return denormalize(stream.txt2img())


def set_embeddings(pipe: Any, texts: Mapping[str, Any]) -> None:
    """Make a pipeline without text encoders encode every prompt as these embeddings: the fallback also calls it with an
    empty prompt, to find the shape of its latents."""
    own = pipe.encode_prompt
    known = {name: x for name, x in texts.items() if name in signature(own).parameters}
    pipe.encode_prompt = lambda *args, **given: own(*args, **given | known)


def measure(subject: Subject) -> dict[str, Any]:
    """Images a second by each way, and each way's share of the pipeline's own."""
    s, fallback = subject.settings, replace(subject, family="fallback")
    rates: dict[str, list[float]] = {}
    with ExitStack() as opened:
        ways = {
            "plain": opened.enter_context(plain(subject, False)),
            "fallback": Way(partial(next_image, opened.enter_context(fallback.stream(False)))),
            "adapter": opened.enter_context(streamed(subject, "none", False, True)),
        }
        counts = {name: warm(subject, way) for name, way in ways.items()}
        for _ in range(s.rounds):
            for name, way in ways.items():
                rates.setdefault(name, []).append(way.frames / timed(way.tick, counts[name], subject.device).mean)
    with streamed(subject, "auto", False, True) as way:
        count = warm(subject, way)
        rates["accelerated"] = [way.frames / timed(way.tick, count, subject.device).mean for _ in range(s.rounds)]
    found = {name: vars(Spread.of(each)) for name, each in rates.items()}
    times = {f"{a} over {b}": ratio(found[a], found[b]) for a, b in PAIRS}
    return {"images_per_s": found, "times": times, "clocks": clocks(subject.device)}


PAIRS = (("fallback", "plain"), ("adapter", "fallback"), ("accelerated", "fallback"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=SIZES, default="embedded", help="default: %(default)s")
    p.add_argument("--steps", type=at_least(1), default=4, help="default 4")
    p.add_argument("--size", type=at_least(1), help="pixels (default: the model's)")
    p.add_argument("--rounds", type=at_least(1), default=5, help="default 5")
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--output", type=Path, help="also write the JSON here")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    size = a.size or SIZES[a.model]
    settings = Settings(
        model=a.model,
        random_weights=a.model != "embedded",
        steps=a.steps,
        width=size,
        height=size,
        rounds=a.rounds,
        frames=20,
        round_seconds=1.0,
        device=a.device,
    )
    subject = load(settings)
    if settings.random_weights:
        set_embeddings(subject.pipe, subject.arguments)
    about = {"command": " ".join(["python", *sys.argv]), "model": a.model, "size": size, "steps": a.steps}
    result = rounded({**about, "machine": machine(subject.device), **measure(subject)})
    write_json(result, a.output)
    print(json.dumps(result, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
