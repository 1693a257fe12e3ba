"""From a loaded model to its first accelerated image, each start a process of its own: with an empty compile cache (cold),
with the cache that this left (warm), and with an empty cache into which the exported file was imported (imported).

    python examples/benchmark/startup.py --output static/benchmarks/startup.json
    python examples/benchmark/startup.py --models sd15 --options regional=true --starts 2

The import itself is a process too (`streamflow engines import`), whose seconds are given apart: it is done once a machine.
Networks of true size with random weights, 512x512 images in 4 steps. The last line is JSON. Of each start: seconds of
`imports`, `make_model`, `import_cache` (0: done before) and `first_image`, which ends with the image on the host, and what
inductor's cache says, hits and misses.
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

STEPS = 4
Start = dict[str, Any]


def option(text: str) -> tuple[str, object]:
    """`name=value` of an acceleration's option; the value as JSON, or a text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def start(model: str, kind: str, options: dict[str, object], device: str, size: int, exported: str | None) -> Start:
    """One start in this process. exported: the file to write afterwards."""
    began = time.perf_counter()
    from torch._dynamo.utils import counters

    from streamflow import StreamFlow, models
    from streamflow.acceleration import compile_cache
    from streamflow.benchmark.full_size import full_size, prompt_arguments, size_of

    imported = time.perf_counter()
    embedded = model == "embedded"
    pipe = models.load(device=device) if embedded else full_size(model, device)
    loaded = time.perf_counter()
    family = None if embedded else size_of(model).family
    stream = StreamFlow(pipe, range(STEPS), width=size, height=size, cfg_type="none", family=family)
    prompt: dict[str, Any] = {"prompt": "a fox, 3d render", "max_sequence_length": 0}
    if not embedded:
        prompt = prompt_arguments(model, pipe.device, pipe.dtype, guided=False)
    stream.prepare(num_inference_steps=STEPS, **prompt)
    stream.accelerate(kind, **options)
    stream.txt2img().cpu()
    done = time.perf_counter()
    found = {name: counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")}
    if exported:
        found["exported_bytes"] = compile_cache.save(exported, device).bytes
    return {"imports": imported - began, "make_model": loaded - imported, "first_image": done - loaded, **found}


def in_new_process(arguments: list[str], cache: Path) -> str:
    """What a process of its own prints last, and its seconds. CalledProcessError, with its message above, if it fails."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    done = subprocess.run([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def measure(a: argparse.Namespace, model: str, folder: Path) -> dict[str, Any]:
    """All starts of a model."""
    one = [__file__, "--one", model, "--accelerate", a.accelerate, "--device", a.device, "--size", str(a.size)]
    one += ["--options", *a.options] if a.options else []
    exported = folder / f"{model}.cache"
    run = "import sys; from streamflow.app.cli import main; sys.exit(main(sys.argv[1:]))"
    move = ["-c", run, "engines", "import", str(exported), "--device", a.device, "--json"]
    found: dict[str, Any] = {"cold": [], "warm": [], "imported": [], "import_s": []}

    def add(name: str, arguments: list[str], cache: Path) -> None:
        found[name].append(json.loads(in_new_process(arguments, cache)))
        print(model, name, found[name][-1], file=sys.stderr, flush=True)

    for number in range(a.starts):
        here, there = folder / f"{model}-here-{number}", folder / f"{model}-there-{number}"
        add("cold", [*one, "--export", str(exported)], here)
        add("warm", one, here)
        began = time.perf_counter()
        in_new_process(move, there)
        found["import_s"].append(time.perf_counter() - began)
        add("imported", one, there)
    return found


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["sd15", "flux-schnell"], help="default: sd15 flux-schnell")
    p.add_argument("--accelerate", default="compile", help="kind of acceleration (default: %(default)s)")
    p.add_argument("--options", nargs="+", default=[], metavar="NAME=VALUE", help="of the acceleration")
    p.add_argument("--starts", type=int, default=1, help="of each sort (default: %(default)s)")
    p.add_argument("--size", type=int, default=512, help="pixels (default: %(default)s)")
    p.add_argument("--device", default="cuda", help="default: %(default)s")
    p.add_argument("--output", type=Path, help="also write the JSON here, after every model")
    p.add_argument("--one", metavar="MODEL", help="a single start in this process; used by the command itself")
    p.add_argument("--export", metavar="FILE", help="with --one: write the compiled code to this file")
    a = p.parse_args(argv)
    options = dict(map(option, a.options))
    if a.one:
        print(json.dumps(start(a.one, a.accelerate, options, a.device, a.size, a.export)))
        return 0
    import torch

    from streamflow.benchmark.machine import machine
    from streamflow.benchmark.report import write_json

    command = " ".join(["python examples/benchmark/startup.py", *(argv or sys.argv[1:])])
    result: dict[str, Any] = {
        "command": command,
        "options": options,
        "machine": machine(torch.device(a.device)),
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for model in a.models:
            result["models"][model] = measure(a, model, Path(folder))
            write_json(result, a.output)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
