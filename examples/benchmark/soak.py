"""Hours on stage in short: thousands of frames through the wrapper and through the server, with prompts, guidance, steps,
masks and sizes of images changing all the while, and both ended and started again in between.

    python examples/benchmark/soak.py --frames 10000 --output static/benchmarks/soak-cpu.json
    python examples/benchmark/soak.py --device cuda --model embedded --acceleration cuda-graph

What it promises: every frame is answered once and in order, and memory stays within 2 % of what it was after the first 500
frames. Each part is a process of its own, both at once, by a small network with random weights unless another model is
named. Of the C library, which may keep what is freed, it asks for one arena (every new thread may take another) and for
blocks of 128 KiB and more to be given back (after the first large one is freed, those of up to 32 MiB are kept):
MALLOC_ARENA_MAX=1 and MALLOC_MMAP_THRESHOLD_=131072, unless set. A figure of the memory goes beside the JSON, which is the
last line too; the exit code is 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from streamflow._command_line import at_least
from streamflow.benchmark.machine import machine
from streamflow.benchmark.report import rounded

PARTS = ("wrapper", "server")
WARM = 500  # frames after which memory is to be flat
SHORT = 4  # sessions that they are split into: each way of asking and each mode of guidance comes up in one
BAND = 0.02


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--frames", type=at_least(1), default=10_000, help="of each part (default %(default)s)")
    p.add_argument(
        "--sessions",
        type=at_least(1),
        default=8,
        help="wrappers and servers one after another, after the first 500 frames (default 8)",
    )
    p.add_argument("--model", default="embedded", help="embedded, a folder or a hub id (default %(default)s)")
    p.add_argument("--device", default="cpu", help="default %(default)s")
    p.add_argument("--acceleration", default="none", help="default %(default)s")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    p.add_argument("--output", type=Path, help="write the JSON here, and a figure beside it")
    p.add_argument("--one", choices=PARTS, help="a single part in this process; used by the command itself")
    a = p.parse_args(argv)
    if a.one:
        print(json.dumps(play(a)))
        return 0
    with ThreadPoolExecutor() as pool:
        parts = dict(zip(a.parts, pool.map(lambda part: in_new_process(a, part), a.parts), strict=True))
    result = {
        "command": " ".join(["python examples/benchmark/soak.py", *(sys.argv[1:] if argv is None else argv)]),
        "model": a.model,
        "machine": machine(torch.device(a.device)),
        "kept": all(part["kept"] for part in parts.values()),
        "parts": parts,
    }
    if a.output:
        a.output.parent.mkdir(parents=True, exist_ok=True)
        a.output.write_text(json.dumps(rounded(result)) + "\n", encoding="utf-8")
        draw(result, a.output.with_suffix(".png"))
    short = {name: {key: value for key, value in part.items() if key != "samples"} for name, part in parts.items()}
    print(json.dumps(rounded({**result, "parts": short})))
    return 0 if result["kept"] else 1


def in_new_process(a: argparse.Namespace, part: str) -> dict[str, Any]:
    """What one part found. For a part that failed, the end of its output."""
    command = [sys.executable, __file__, "--one", part, "--model", a.model, "--device", a.device]
    command += ["--frames", str(a.frames), "--sessions", str(a.sessions), "--acceleration", a.acceleration]
    environment = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"kept": False, "broken": done.stderr.strip().splitlines()[-1], "samples": []}
    return json.loads(done.stdout.splitlines()[-1])


def play(a: argparse.Namespace) -> dict[str, Any]:
    """One part, here: how long it took, and how flat its memory was."""
    torch.set_num_threads(1)
    sessions = split(range(min(WARM, a.frames)), SHORT) + split(range(WARM, a.frames), a.sessions)
    began = time.perf_counter()
    samples = import_module(f"soak_{a.one}").play(a.model, a.device, a.acceleration, sessions).samples
    seconds = time.perf_counter() - began
    flat = {"process": flatness(samples, 1), **({"gpu": flatness(samples, 2)} if a.device != "cpu" else {})}
    kept = all(one is None or abs(one) <= BAND for pair in flat.values() for one in pair)
    figures = {"frames": a.frames, "sessions": len(sessions), "seconds": seconds, "frames_per_s": a.frames / seconds}
    return {"kept": kept, **figures, "memory_least_and_most": flat, "samples": samples}


def split(numbers: range, parts: int) -> list[range]:
    """The numbers in so many ranges of about the same length; none is empty."""
    bounds = [len(numbers) * k // parts for k in range(parts + 1)]
    return [numbers[first:end] for first, end in pairwise(bounds) if end > first]


def flatness(samples: list[tuple[int, int, int]], column: int) -> tuple[float | None, float | None]:
    """The least and the most that memory was off, as a share, from the first sample that is warm; None before one is."""
    warm = [one[column] for one in samples if one[0] >= WARM]
    return (min(warm) / warm[0] - 1, max(warm) / warm[0] - 1) if warm else (None, None)


def draw(result: dict[str, Any], file: Path) -> None:
    """Memory over frames, one panel a part, with the band that it is to stay in."""
    from matplotlib.figure import Figure

    parts = {name: part for name, part in result["parts"].items() if part["samples"]}
    figure = Figure((8, 2.8 * max(1, len(parts))), layout="constrained")
    for axes, (name, part) in zip(figure.subplots(max(1, len(parts)), squeeze=False)[:, 0], parts.items(), strict=False):
        frames, *columns = zip(*part["samples"], strict=True)
        for values, label, colour in zip(columns, ("process", "tensors on the GPU"), ("#1f5fa8", "#c44e00"), strict=True):
            if warm := [value for k, value in zip(frames, values, strict=True) if k >= WARM and value]:
                axes.plot(frames, [100 * (value / warm[0] - 1) for value in values], color=colour, label=label)
        axes.axhspan(-100 * BAND, 100 * BAND, color="#dfe9f3")
        axes.axvline(WARM, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="frames", ylabel=f"memory, % off from\nframe {WARM}", ylim=(-5, 5))
        axes.set_title(f"{name}: {part['frames']} frames, {part['sessions']} sessions", fontsize=10)
        axes.legend(loc="lower right")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
