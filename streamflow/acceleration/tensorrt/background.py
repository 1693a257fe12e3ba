"""An engine built beside a running stream: the weights go to a file, a child process exports and builds, a thread loads
what it made. The stream only asks, between ticks, whether it is there. The child is a fresh interpreter, not a fork."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamflow._threads import Thread
from streamflow.acceleration import Part
from streamflow.acceleration.tensorrt.build import Target
from streamflow.acceleration.tensorrt.cache import own_folder
from streamflow.acceleration.tensorrt.errors import BuildError
from streamflow.acceleration.tensorrt.export import size_of
from streamflow.acceleration.tensorrt.options import Options
from streamflow.acceleration.tensorrt.profile import Profile

logger = logging.getLogger(__name__)

Load = Callable[[bytes, Profile], nn.Module]
ROOM = 3  # times the weights: the snapshot, the ONNX file and the engine on disk; as much in the child's memory


class Build:
    """One engine on its way. `ready` once it is there or has failed; then `result` gives it or raises."""

    def __init__(self, part: Part, profile: Profile, options: Options, target: Target, kind: str, load: Load):
        self.profile = profile
        kept = replace(options, rebuild=False)
        self._job = {"part": part, "profile": profile, "options": kept, "target": target, "kind": kind}
        self._load = load
        self._child: subprocess.Popen | None = None
        self._cancelled = False
        self._made: nn.Module | None = None
        self._error: Exception | None = None
        self._began = time.perf_counter()
        check_room(part, options, target)
        self._thread = Thread(self._run, f"tensorrt-{part.name}")
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._began

    def result(self) -> nn.Module:
        """The engine, loaded. Raises what stopped it: BuildError for the child, with its last words."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._made

    def cancel(self) -> None:
        """Stop the child and forget what it makes; does not wait for either."""
        self._cancelled = True
        if self._child is not None and self._child.poll() is None:
            self._child.kill()

    def _run(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="streamflow-snapshot-", dir=_folder(self._job["options"])) as folder:
                data = self._in_child(Path(folder))
            self._job.clear()
            if not self._cancelled:
                self._made = self._load(data, self.profile)
        except Exception as error:  # told by `result`, in the stream's own thread
            self._error = error

    def _in_child(self, folder: Path) -> bytes:
        job, made = folder / "job.pt", folder / "made.txt"
        if (index := self._job["target"].index) is not None:
            torch.cuda.synchronize(index)  # weights may just be being written, on another stream
        write_job(job, self._job)
        if self._cancelled:
            raise self._failed("cancelled")
        command = [sys.executable, "-m", "streamflow.acceleration.tensorrt.child", str(job), str(made)]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path}
        words = folder / "words.txt"
        with words.open("wb") as said:
            self._child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        if self._cancelled:
            self._child.kill()
        if (code := self._child.wait()) != 0:
            last = words.read_text(encoding="utf-8", errors="replace").strip()[-800:]
            raise self._failed(f"exit code {code}: {last or 'no words'}")
        return Path(made.read_text(encoding="utf-8")).read_bytes()

    def _failed(self, what: str) -> BuildError:
        remedy = "the stream goes on plainly; call accelerate('tensorrt') again to build in this process"
        return BuildError(self.profile.part, "building in a child process", what, remedy)


def check_room(part: Part, options: Options, target: Target) -> None:
    """BuildError, with the numbers, where disk, memory or the GPU have no room for another engine."""
    import psutil

    weights = size_of(part.module)
    needs = [
        ("disk", ROOM * weights, shutil.disk_usage(_folder(options)).free),
        ("memory", ROOM * weights, psutil.virtual_memory().available),
    ]
    if target.index is not None:
        needs.append(("GPU memory", 2 * weights, torch.cuda.mem_get_info(target.index)[0]))
    for what, need, free in needs:
        if need > free:
            told = f"{what}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
            remedy = "the stream goes on plainly; free some, and call accelerate('tensorrt') again"
            raise BuildError(part.name, "before a build in a child process", told, remedy)


def _folder(options: Options) -> Path:
    return own_folder(options.engine_dir)


def write_job(path: Path, job: dict[str, Any]) -> None:
    """Pickle a job. BuildError where the module cannot be pickled: it then cannot be handed to another process."""
    try:
        torch.save(job, path)
    except (AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:  # what pickling and writing say
        raise BuildError(
            *(job["part"].name, "writing the weight snapshot", f"{type(error).__name__}: {error}"),
            "the stream goes on plainly; call accelerate('tensorrt') again to build in this process",
        ) from error


def read_job(path: Path) -> dict[str, Any]:
    """A job from `write_job`, on the CPU; the file is deleted. Only for files that this package has just written itself:
    unpickling runs what is in them."""
    job = torch.load(path, map_location="cpu", weights_only=False)
    path.unlink()
    return job
