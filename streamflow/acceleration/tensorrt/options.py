"""The options of `accelerate("tensorrt")`, and the shapes that an engine accepts according to them. Knows no TensorRT."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from streamflow._validation import whole_number
from streamflow.acceleration import Part
from streamflow.acceleration.errors import OutsideProfile
from streamflow.acceleration.onnx_export import Range
from streamflow.acceleration.tensorrt import library

_ASCENDING = (
    ("min_batch", "max_batch"),
    ("min_height", "opt_height", "max_height"),
    ("min_width", "opt_width", "max_width"),
)


def default_engine_dir() -> Path:
    """The default cache of engines: `streamflow/engines` in the user's cache folder (`XDG_CACHE_HOME` is respected)."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "streamflow" / "engines"
    default = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    local = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
    return Path(local or Path.home() / default) / "streamflow" / "engines"


@dataclass(frozen=True)
class Options:
    """The options of `accelerate("tensorrt", ...)`. ValueError for values out of range.

    engine_dir: the folder of the engine cache.
    min_batch, max_batch: the range of rows for one engine. None: only the stream's rows. The stream's own rows are always
        in the range, and the engine is tuned for them.
    min_height .. opt_width: pixels, for parts with a free size (UNets and VAEs). None: only the stream's size.
    use_cuda_graph: replay the launches of each engine as a CUDA graph.
    fallback: "eager" runs the plain module where TensorRT fails, and logs a warning with the cause. None raises.
    tolerance_db: an engine with a lower PSNR against the plain module is refused.
    verify: compare an engine with the plain module before it is used.
    adaptive: build another engine in a child process after shapes or weights have changed.
    tf32: allow TF32 in float32 parts.
    workspace_gb, optimization_level: TensorRT's memory limit during a build, and its effort (0 to 5).
    rebuild: do not load engines from the cache.
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
        for names in _ASCENDING:
            given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
            for name, value in given.items():
                object.__setattr__(self, name, whole_number(name, value, 1))
            if list(given.values()) != sorted(given.values()):
                raise ValueError(f"values must ascend: {', '.join(f'{name}={value}' for name, value in given.items())}")
        if self.fallback not in (None, "eager"):
            raise ValueError(f"unknown fallback {self.fallback!r}: choose None (raise) or 'eager'")
        for name in ("tolerance_db", "workspace_gb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value!r}")
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise ValueError(f"optimization_level must be 0 to 5, not {self.optimization_level!r}")

    def for_device(self, device: torch.device) -> Options:
        """These options. Without a `fallback`: NoDevice if the device cannot run engines, MissingTensorRT if there is no
        TensorRT for it."""
        if self.fallback is None:
            library.choose(library.Target.of(device).capability)
        return self


@dataclass(frozen=True)
class Profile:
    """The range of each input of a part, in the part's order."""

    part: str
    ranges: Mapping[str, Range]

    def fits(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether an engine of this profile accepts these inputs."""
        return inputs.keys() == self.ranges.keys() and all(self.ranges[n].holds(tuple(t.shape)) for n, t in inputs.items())

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise OutsideProfile, with the numbers, if an engine of this profile does not accept these inputs."""
        if self.fits(inputs):
            return
        problem = f"inputs {', '.join(inputs)} given, {', '.join(self.ranges)} built for"
        if inputs.keys() == self.ranges.keys():
            name, r = next((n, r) for n, r in self.ranges.items() if not r.holds(tuple(inputs[n].shape)))
            problem = f"{name} is {list(inputs[name].shape)}, built for {list(r.smallest)} to {list(r.largest)}"
        remedy = "pass min_batch, max_batch, min_height, ... that include these shapes to accelerate('tensorrt')"
        raise OutsideProfile(part=self.part, stage="running", problem=problem, remedy=remedy)


def profile_of(part: Part, options: Options, units: tuple[int, int] = (1, 1)) -> Profile:
    """The profile of a part under these options. It always includes the shapes of the part's own inputs.

    units: pixels per row and per column of the part's first input (8 for most latents), since the options count pixels.
        ValueError for a size that is not a multiple of them.
    """
    ranges = {}
    for i, (name, value) in enumerate(part.inputs.items()):
        axes = {} if name in part.shared else {0: ("batch", 1)}
        if i == 0 and part.free_size:
            axes |= {-2: ("height", units[0]), -1: ("width", units[1])}
        smallest, best, largest = list(value.shape), list(value.shape), list(value.shape)
        for axis, (side, unit) in axes.items():
            own = value.shape[axis] * unit
            given = [getattr(options, f"{kind}_{side}", None) for kind in ("min", "opt", "max")]
            if wrong := [size for size in given if size and size % unit]:
                raise ValueError(f"sizes of the {part.name} must be multiples of {unit} pixels, not {wrong[0]}")
            low, tuned, high = given
            smallest[axis] = min(own, low or tuned or own) // unit
            best[axis] = (tuned or own) // unit
            largest[axis] = max(own, high or tuned or own) // unit
        ranges[name] = Range(tuple(smallest), tuple(best), tuple(largest))
    return Profile(part.name, ranges)
