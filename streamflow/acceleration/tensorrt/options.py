"""The settings of `accelerate("tensorrt")`, checked where they are made. Knows no TensorRT."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from streamflow.acceleration.tensorrt import library
from streamflow.acceleration.tensorrt.errors import NoDevice

FALLBACKS = (None, "eager")
_RISING = (
    ("min_batch", "max_batch"),
    ("min_height", "opt_height", "max_height"),
    ("min_width", "opt_width", "max_width"),
)


def default_engine_dir() -> Path:
    """Where engines are kept: `streamflow/engines` in the user's cache folder, `XDG_CACHE_HOME` honoured."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        base = Path(given)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "streamflow" / "engines"


@dataclass(frozen=True)
class Options:
    """What `accelerate("tensorrt", ...)` takes.

    engine_dir: where engines are kept between runs.
    min_batch, max_batch: rows that one engine takes. None: just the stream's. The stream's own rows are always within and
        are what the engine is tuned for.
    min_height .. opt_width: pixels, for parts that are free in size (UNets and VAEs). None: just the stream's size.
    use_cuda_graph: replay each engine's launches as a CUDA graph.
    fallback: "eager" runs a part plainly where TensorRT fails, with a warning that has the cause. None raises.
    tolerance_db: the least PSNR against the plain module below which an engine is refused.
    verify: compare before an engine is used.
    adaptive: build another engine in a child process where shapes or weights change.
    tf32: let float32 parts round their factors to TF32.
    workspace_gb, optimization_level: TensorRT's memory limit while it builds, and how hard it looks (0 to 5).
    rebuild: do not take engines from the cache.
    """

    engine_dir: Path = field(default_factory=default_engine_dir)
    min_batch: int | None = None
    max_batch: int | None = None
    min_height: int | None = None
    opt_height: int | None = None
    max_height: int | None = None
    min_width: int | None = None
    opt_width: int | None = None
    max_width: int | None = None
    use_cuda_graph: bool = False
    fallback: str | None = None
    tolerance_db: float = 40.0
    verify: bool = True
    adaptive: bool = True
    tf32: bool = False
    workspace_gb: float | None = None
    optimization_level: int | None = None
    rebuild: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine_dir", Path(self.engine_dir).expanduser())
        for names in _RISING:
            self._check_rising(names)
        if self.fallback not in FALLBACKS:
            raise ValueError(f"unknown fallback {self.fallback!r}: choose None (raise) or 'eager'")
        if not self.tolerance_db > 0:
            raise ValueError(f"tolerance_db must be above 0, not {self.tolerance_db!r}")
        if self.workspace_gb is not None and not self.workspace_gb > 0:
            raise ValueError(f"workspace_gb must be above 0, not {self.workspace_gb!r}")
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise ValueError(f"optimization_level must be 0 to 5, not {self.optimization_level!r}")

    def _check_rising(self, names: tuple[str, ...]) -> None:
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of 1 or more, not {value!r}")
        if list(given.values()) != sorted(given.values()):
            raise ValueError(f"these must rise: {', '.join(f'{name}={value}' for name, value in given.items())}")

    def for_device(self, device: torch.device) -> Options:
        """These options; what `require` raises, unless there is a `fallback`."""
        if self.fallback is None:
            self.require(device)
        return self

    def require(self, device: torch.device) -> None:
        """NoDevice without a GPU that engines run on, MissingTensorRT without a TensorRT for it."""
        if device.type != "cuda" or torch.version.hip is not None:
            raise NoDevice(
                *("all parts", "before export", f"engines run on NVIDIA GPUs and this pipe is on {device}"),
                "move it with pipe.to('cuda') on such a machine, or use accelerate('auto'), or pass fallback='eager'; "
                "`python -m streamflow.acceleration.tensorrt --build-only` builds without a GPU",
            )
        library.choose(torch.cuda.get_device_capability(device))
