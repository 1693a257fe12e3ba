"""`python -m streamflow.acceleration.tensorrt --self-test`: builds engines of the embedded model, or of pipelines in
diffusers' format, runs them, compares and times them on this machine's GPU. `--build-only` builds without a GPU (TensorRT
for RTX). The last line is JSON.

Exit codes: 0 success, 1 an engine failed or differs, 2 this machine cannot run it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from streamflow.acceleration import Part, Parts
from streamflow.acceleration.errors import MissingTensorRT, TensorRTError
from streamflow.acceleration.tensorrt.build import load_or_build
from streamflow.acceleration.tensorrt.engine import EngineModule, compare
from streamflow.acceleration.tensorrt.library import Library, Target
from streamflow.acceleration.tensorrt.options import Options, profile_of
from streamflow.conditioning.prompt import stack
from streamflow.models import adapter_for, load
from streamflow.models.protocols import Pipeline

PARTS = ("velocity", "decoder", "encoder")
ROWS = 2
COLUMNS = ("seconds", "megabytes", "psnr_db", "plain_ms", "engine_ms", "graph_ms", "error")


def main(argv: Sequence[str] | None = None) -> int:
    """Run it. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m streamflow.acceleration.tensorrt", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--self-test", action="store_true", help="build, run, compare and time on this GPU")
    mode.add_argument("--build-only", action="store_true", help="export and build; needs no GPU with TensorRT for RTX")
    parser.add_argument("--models", nargs="+", default=["embedded"], help="folders in diffusers' format (default: embedded)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU, else float32"
    )
    parser.add_argument("--capability", default="8.9", help="of the GPU to build for without one (default: %(default)s)")
    parser.add_argument("--engine-dir", type=Path, help="keep the engines there (default: a temporary folder)")
    parser.add_argument("--verbose", action="store_true", help="show the log")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.ERROR)
    cuda = torch.cuda.is_available() and torch.version.hip is None
    if arguments.self_test and not cuda:
        print("there is no CUDA device here: --self-test runs engines, --build-only builds without one", file=sys.stderr)
        return 2
    try:
        major, _, minor = arguments.capability.partition(".")
        target = Target.of(torch.device("cuda")) if cuda else Target(capability=(int(major), int(minor or 0)))
        loaded = target.library
    except (MissingTensorRT, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{loaded}, for {target}")
    dtype = arguments.dtype or ("float16" if cuda else "float32")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        options = Options(engine_dir=arguments.engine_dir or Path(folder))
        for model in arguments.models:
            parts = parts_of(load(model).to(target.device if cuda else "cpu", getattr(torch, dtype)))
            for part in (part for part in parts if part.name in arguments.parts):
                row = {"model": model, "part": part.name, "dtype": dtype}
                row |= _test(part, arguments.self_test, options, target, loaded)
                print("  ".join(f"{key} {value}" for key, value in row.items() if value is not None))
                rows.append(row)
    ok = all(row["error"] is None for row in rows)
    report = {"ok": ok, "executed": arguments.self_test, "tensorrt": str(loaded), "gpu": str(target), "parts": rows}
    print(json.dumps(report))
    return 0 if ok else 1


def parts_of(pipe: Pipeline, family: str | None = None, size: int | None = None) -> Parts:
    """The parts of a pipeline, with the inputs of a stream of `ROWS` rows.

    size: height and width of the images in pixels. None: the default of the pipeline.
    """
    adapter = adapter_for(pipe, family)
    size = adapter.default_size if size is None else size
    schedule, prompt = adapter.read({"prompt": "a red apple, 3d render"}, 4, size, size, guided=False)
    device, dtype, shape = pipe.device, adapter.net.dtype, adapter.latent_shape(size, size)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(ROWS, *shape, generator=generator).to(device, dtype)
    times = schedule.timesteps[torch.arange(ROWS) % len(schedule)].to(device, torch.float32)
    images = torch.rand(ROWS, 3, size, size, generator=generator).to(device) * 2 - 1
    inputs = {"x": latents, "t": times, **stack((prompt.cond,) * ROWS)}
    return Parts.of(adapter, adapter.codec(pipe.vae, size, size), inputs, latents, images)


def _test(part: Part, execute: bool, options: Options, target: Target, loaded: Library) -> dict[str, float | str | None]:
    """The results of one part by `COLUMNS`. An error of TensorRT is a result."""
    row: dict[str, float | str | None] = dict.fromkeys(COLUMNS)
    profile = profile_of(part, options)
    began = time.perf_counter()
    try:
        _, data = load_or_build(part, profile, options, target)
        row |= {"seconds": round(time.perf_counter() - began, 1), "megabytes": round(len(data) / 1e6, 1)}
        if execute:
            from streamflow.acceleration.cuda_graph import Graphed

            engine = EngineModule(data, profile, loaded, target.device)
            row["psnr_db"] = round(compare(part, profile, engine, options.tolerance_db), 1)
            for name, module in {"plain_ms": part.module, "engine_ms": engine, "graph_ms": Graphed(engine)}.items():
                timer = Timer("call(module)", globals={"call": part.call, "module": module})
                row[name] = round(1e3 * timer.blocked_autorange().median, 3)
    except TensorRTError as error:
        row["error"] = str(error)
    return row


if __name__ == "__main__":
    sys.exit(main())
