"""`python -m streamflow.acceleration.tensorrt --self-test`: builds engines of tiny models, runs, compares and times them on
this machine's GPU. `--build-only` builds without a GPU (TensorRT for RTX). The last line is JSON.

Exit codes: 0 all well, 1 an engine failed or differs, 2 this machine cannot do it.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamflow.acceleration import Part
from streamflow.acceleration.tensorrt import engines, library
from streamflow.acceleration.tensorrt.build import Target
from streamflow.acceleration.tensorrt.check import compare
from streamflow.acceleration.tensorrt.engine import EngineModule
from streamflow.acceleration.tensorrt.errors import MissingTensorRT, NoDevice, TensorRTError
from streamflow.acceleration.tensorrt.options import Options
from streamflow.acceleration.tensorrt.profile import profile_of
from streamflow.acceleration.tensorrt.samples import parts_of

TIMED = 30
PARTS = ("velocity", "decoder", "encoder")


def embedded() -> tuple[Any, None]:
    """The embedded model."""
    from streamflow.models import load
    from streamflow.pretrained import embedded as folder

    return load(folder()), None


MODELS: dict[str, Callable[[], tuple[Any, str | None]]] = {"embedded": embedded}


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(prog="python -m streamflow.acceleration.tensorrt", description=__doc__)
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--self-test", action="store_true", help="build, run, compare and time on this GPU")
    what.add_argument("--build-only", action="store_true", help="export and build; needs no GPU with TensorRT for RTX")
    made.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    made.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU, else float32")
    made.add_argument("--capability", default="8.9", help="of the GPU to build for without one (default: %(default)s)")
    made.add_argument("--engine-dir", type=Path, help="keep the engines there (default: a temporary folder)")
    made.add_argument("--verbose", action="store_true", help="show the log")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.ERROR)
    try:
        target = _target(arguments)
        kind = library.choose(None if target.index is None else target.capability)
        loaded = library.load(kind)
    except (NoDevice, MissingTensorRT, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{loaded}, for {target}")
    with tempfile.TemporaryDirectory() as folder:
        options = Options(engine_dir=arguments.engine_dir or folder)
        rows = [row for name in arguments.models for row in _model(name, arguments, options, target, loaded)]
    ok = all(row["error"] is None for row in rows)
    run = arguments.self_test
    print(json.dumps({"ok": ok, "executed": run, "tensorrt": str(loaded), "gpu": str(target), "parts": rows}))
    return 0 if ok else 1


def _target(arguments: argparse.Namespace) -> Target:
    if torch.cuda.is_available() and torch.version.hip is None:
        return Target.of(torch.device("cuda"))
    if arguments.self_test:
        raise NoDevice(
            *("self-test", "start", "there is no CUDA device here, and a self-test runs engines"),
            "run it on a machine with an NVIDIA GPU; --build-only builds without one",
        )
    major, _, minor = arguments.capability.partition(".")
    return Target.without((int(major), int(minor or 0)))


def _model(
    name: str, arguments: argparse.Namespace, options: Options, target: Target, loaded: library.Library
) -> list[dict[str, Any]]:
    pipe, family = MODELS[name]()
    device = torch.device("cpu") if target.index is None else torch.device("cuda", target.index)
    dtype = arguments.dtype or ("float32" if target.index is None else "float16")
    pipe = pipe.to(device, getattr(torch, dtype))
    rows = []
    for part in (part for part in parts_of(pipe, family) if part.name in arguments.parts):
        row = {"model": name, "part": part.name, "dtype": dtype, **_part(part, arguments.self_test, options, target, loaded)}
        print("  ".join(f"{key} {value}" for key, value in row.items() if value is not None))
        rows.append(row)
    return rows


def _part(part: Part, run: bool, options: Options, target: Target, loaded: library.Library) -> dict[str, Any]:
    """What came of one part. An error of TensorRT's is a result, not an end."""
    row: dict[str, Any] = dict.fromkeys(("seconds", "megabytes", "psnr_db", "plain_ms", "engine_ms", "graph_ms", "error"))
    profile = profile_of(part, options)
    began = time.perf_counter()
    try:
        _, data = engines.make(part, profile, options, target, loaded.kind)
        row.update(seconds=round(time.perf_counter() - began, 1), megabytes=round(len(data) / 1e6, 1))
        if run:
            engine = EngineModule(data, profile, loaded, torch.device("cuda", target.index))
            row["psnr_db"] = round(compare(part, profile, engine, options.tolerance_db), 1)
            row.update(_times(part, engine))
    except TensorRTError as error:
        row["error"] = str(error)
    return row


def _times(part: Part, engine: nn.Module) -> dict[str, float]:
    from streamflow.acceleration.cuda_graph import Graphed

    modules = {"plain_ms": part.module, "engine_ms": engine, "graph_ms": Graphed(engine)}
    return {name: round(_milliseconds(part, module), 3) for name, module in modules.items()}


def _milliseconds(part: Part, module: nn.Module) -> float:
    """The median of `TIMED` calls, by device events, after as many to warm up."""
    taken = []
    for _ in range(2 * TIMED):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        part.call(module)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken[TIMED:])


if __name__ == "__main__":
    sys.exit(main())
