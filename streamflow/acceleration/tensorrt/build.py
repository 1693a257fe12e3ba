"""Builds engines through polygraphy, in this process or, while a stream runs, in a child process."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamflow._files import Json
from streamflow._threads import Thread
from streamflow.acceleration import Part
from streamflow.acceleration.errors import BuildError, MissingTensorRT, TensorRTError
from streamflow.acceleration.onnx_export import check_exportable, export, size_of
from streamflow.acceleration.tensorrt import cache
from streamflow.acceleration.tensorrt.library import RTX, Library, Target
from streamflow.acceleration.tensorrt.options import Options, Profile

logger = logging.getLogger(__name__)

ROOM = 3  # times the bytes of the weights: module, ONNX file and engine on the disk, and as much memory of the child
_NODE = re.compile(r"Node name: (\S+)")
_MEMORY = re.compile(r"out of memory|outofmemory|insufficient memory|bad_alloc", re.IGNORECASE)
_IN_CHILD = "the stream runs without this engine; call accelerate('tensorrt') again to build it in this process"
_REMEDIES = {
    "memory": "close what else uses the GPU, or pass a smaller workspace_gb, max_batch, max_height, max_width",
    "starting the builder": "see `streamflow doctor`: TensorRT needs a GPU to build, TensorRT for RTX does not",
    "reading ONNX": "use accelerate('compile') for this model, or fallback='eager' to run this part without an engine",
    "building the engine": "pass optimization_level=0 or a narrower range, or use accelerate('compile') for this model",
}


def load_or_build(part: Part, profile: Profile, options: Options, target: Target) -> tuple[cache.Entry, bytes]:
    """The engine of a part, out of the cache or new. Raises what export, build and cache raise."""
    check_exportable(part)
    library = target.library
    facts = cache.facts(part, profile, options, target, str(library))
    entry = cache.entry_for(options.engine_dir, part.name, facts)

    def build_in(folder: Path) -> bytes:
        return build(export(part, folder, profile.ranges), profile, options, library, target)

    return entry, cache.get_or_build(entry, facts, build_in, options.rebuild)


def build(onnx: Path, profile: Profile, options: Options, library: Library, target: Target) -> bytes:
    """The serialized engine of an ONNX file, strongly typed, with one optimization profile.

    Raises:
        BuildError: with the stage, TensorRT's messages, the node if TensorRT names one, and the remedy.
    """
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path  # type: ignore[attr-defined]  # made at run time

    began = time.perf_counter()
    typed = hasattr(library.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # later versions have no other networks
    with contextlib.nullcontext() if target.index is None else torch.cuda.device(target.index):
        with _stage(profile.part, "reading ONNX", library):
            network = network_from_onnx_path(str(onnx), strongly_typed=typed)
        logger.info("%s: %d layers, building with %s for %s", profile.part, network[1].num_layers, library, target)
        with _stage(profile.part, "building the engine", library):
            engine = bytes(engine_bytes_from_network(network, _config(profile, options, library, target)))
    took = time.perf_counter() - began
    logger.info("%s: engine of %.1f MB built in %.1f s", profile.part, len(engine) / 1e6, took)
    return engine


@contextlib.contextmanager
def _stage(part: str, stage: str, library: Library) -> Iterator[None]:
    """Turn the errors of a stage into a BuildError with all that TensorRT logged."""
    from polygraphy.exception import PolygraphyException

    try:
        with library.quiet():
            yield
    except (PolygraphyException, RuntimeError, TypeError) as error:
        if stage == "reading ONNX" and not isinstance(error, PolygraphyException):
            stage = "starting the builder"  # pybind's error if there is no builder
        problem = library.explain(error)
        node = _NODE.search(problem)
        remedy = _REMEDIES["memory" if _MEMORY.search(problem) else stage]
        raise BuildError(part, stage, problem, remedy, node and node.group(1)) from error


def _config(profile: Profile, options: Options, library: Library, target: Target) -> object:
    """Polygraphy's builder configuration."""
    from polygraphy.backend import trt

    ranges = trt.Profile()
    for name, r in profile.ranges.items():
        ranges.add(name, min=r.smallest, opt=r.best, max=r.largest)
    arguments: Json = {"profiles": [ranges], "builder_optimization_level": options.optimization_level}
    if options.workspace_gb is not None:
        pool = library.trt.MemoryPoolType.WORKSPACE
        arguments["memory_pool_limits"] = {pool: int(options.workspace_gb * 2**30)}
    if library.kind != RTX:
        return trt.CreateConfig(tf32=options.tf32, **arguments)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    def set_tf32(builder: object, network: object, config: Any) -> None:
        (config.set_flag if options.tf32 else config.clear_flag)(library.trt.BuilderFlag.TF32)

    return trt.PostprocessConfig(CreateConfigRTX(compute_capabilities=[target.capability], **arguments), set_tf32)


# -- in a child process ---------------------------------------------------------------------------------------------------


class Build(Future[nn.Module]):
    """The build of an engine in a child process, which is then loaded by `load(bytes, profile)` in a thread. `result` raises
    what stopped it: BuildError, with its message, for the child, or if there is no room; CancelledError after `cancel`.

    The child gets a copy of the module in a file, and is a new interpreter: CUDA forbids a fork, and multiprocessing's spawn
    would import the user's script again.
    """

    def __init__(
        self,
        part: Part,
        profile: Profile,
        options: Options,
        target: Target,
        load: Callable[[bytes, Profile], nn.Module],
    ):
        super().__init__()
        self.profile, self.began = profile, time.perf_counter()
        self._load = load
        self._child: subprocess.Popen | None = None
        self._stopped = False
        job = {"part": part, "profile": profile, "options": replace(options, rebuild=False), "target": target}
        Thread(self._run, f"tensorrt-{part.name}", args=(job,)).start()

    def cancel(self) -> bool:
        """Stop the child and drop its engine, without waiting for either."""
        self._stopped = True
        if self._child is not None:
            self._child.kill()
        return True

    def _run(self, job: Json) -> None:
        try:
            check_room(job["part"], job["options"], job["target"])
            with tempfile.TemporaryDirectory(prefix="streamflow-snapshot-", dir=job["options"].engine_dir) as snapshot:
                data = self._in_child(job, Path(snapshot) / "job.pt")
            job.clear()
            if self._stopped:
                raise CancelledError(f"the engine of the {self.profile.part} was cancelled")
            self.set_result(self._load(data, self.profile))
        except Exception as error:  # raised again by `result`, in the thread of the stream
            self.set_exception(error)

    def _in_child(self, job: Json, path: Path) -> bytes:
        if (index := job["target"].index) is not None:
            torch.cuda.synchronize(index)  # another CUDA stream may still write the weights
        try:
            torch.save(job, path)
        except (AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:  # what pickling and writing raise
            problem = f"{type(error).__name__}: {error}"
            raise BuildError(self.profile.part, "writing the weight snapshot", problem, _IN_CHILD) from error
        command = [sys.executable, "-c", f"import sys, {__name__} as b; sys.exit(b.main(sys.argv[1]))", str(path)]
        python_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": python_path, "PYTHONUTF8": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
        self._child = subprocess.Popen(command, env=environment, **pipes)
        if self._stopped:  # before there was a child to stop
            self._child.kill()
        output, errors = self._child.communicate()
        if code := self._child.returncode:
            problem = f"exit code {code}: {errors.strip()[-800:] or 'no message'}"
            raise BuildError(self.profile.part, "building in a child process", problem, _IN_CHILD)
        return Path(output.splitlines()[-1]).read_bytes()


def check_room(part: Part, options: Options, target: Target) -> None:
    """Raise BuildError, with the numbers, if disk, memory or GPU have no room for another engine."""
    import psutil

    weights = size_of(part.module)
    needs = [
        ("disk", ROOM * weights, shutil.disk_usage(cache.own_folder(options.engine_dir)).free),
        ("memory", ROOM * weights, psutil.virtual_memory().available),
    ]
    if target.index is not None:
        needs.append(("GPU memory", 2 * weights, torch.cuda.mem_get_info(target.index)[0]))
    for what, need, free in needs:
        if need > free:
            problem = f"{what}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
            raise BuildError(part.name, "before a build in a child process", problem, _IN_CHILD)


def main(path: str) -> int:
    """Do a job in the child: build, and print the path of the engine, or the error on stderr and return 1. The job's file,
    which only this package may have written, since unpickling executes it, is deleted."""
    job = torch.load(path, map_location="cpu", weights_only=False)
    Path(path).unlink()
    try:
        entry, _ = load_or_build(**job)
    except (TensorRTError, MissingTensorRT) as error:
        print(error, file=sys.stderr)
        return 1
    print(entry.engine)
    return 0
