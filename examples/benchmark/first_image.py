"""From a loaded model to its first streamed image: with a CUDA graph, and compiled with an empty and a full cache.

    python examples/benchmark/first_image.py --output static/benchmarks/first_image.json

Every start is a process of its own, so that nothing is warm that would not be; all of them share one compile cache, which is
empty at first. 512x512 images in 4 steps, by a network of true size with random weights. The last line is JSON: seconds
that each part of a start took, in the order of the starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="sd15", help="sd15, sd3-medium or flux-schnell; default %(default)s")
    p.add_argument("--kinds", nargs="+", default=["cuda-graph", "compile"], help="default: %(default)s")
    p.add_argument("--starts", type=int, default=3, help="processes a kind; default %(default)s")
    p.add_argument("--device", default="cuda", help="default: %(default)s")
    p.add_argument("--output", type=Path, help="also write the JSON here")
    p.add_argument("--one", metavar="KIND", help="a single start in this process; used by the command itself")
    a = p.parse_args(argv)
    if a.one:
        print(json.dumps(start(a.model, a.one, a.device)))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        found = {kind: [in_new_process(a, kind, cache) for _ in range(a.starts)] for kind in a.kinds}
    command = " ".join(["python examples/benchmark/first_image.py", *(argv or sys.argv[1:])])
    result = {"command": command, "model": a.model, "machine": about(a.device), "starts": found}
    from streamflow.benchmark.report import write_json

    write_json(result, a.output)
    print(json.dumps(result))
    return 0


def in_new_process(a: argparse.Namespace, kind: str, cache: str) -> dict[str, float]:
    """The seconds of one start. CalledProcessError, with the process's own message above it, where it fails."""
    command = [sys.executable, __file__, "--one", kind, "--model", a.model, "--device", a.device]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds = json.loads(printed.splitlines()[-1])
    print(f"{kind}: {seconds}", file=sys.stderr)
    return seconds


def start(model: str, kind: str, device: str) -> dict[str, float]:
    """Seconds of the imports, of making the model, and from there to the first image on the host."""
    began = time.perf_counter()
    from streamflow import StreamFlow
    from streamflow.benchmark.full_size import full_size, prompt_arguments, size_of

    imported = time.perf_counter()
    pipe = full_size(model, device)
    loaded = time.perf_counter()
    stream = StreamFlow(pipe, range(4), width=512, height=512, cfg_type="none", family=size_of(model).family)
    stream.prepare(num_inference_steps=4, **prompt_arguments(model, pipe.device, pipe.dtype, guided=False))
    stream.accelerate(kind)
    stream.txt2img().cpu()
    done = time.perf_counter()
    return {"imports": imported - began, "make_model": loaded - imported, "first_image": done - loaded}


def about(device: str) -> dict[str, Any]:
    """The machine, as the benchmark tells it."""
    import torch

    from streamflow.benchmark.machine import machine

    return machine(torch.device(device))


if __name__ == "__main__":
    raise SystemExit(main())
