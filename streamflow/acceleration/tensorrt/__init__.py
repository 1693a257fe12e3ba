"""TensorRT: a part is exported to ONNX, built into an engine, compared with the plain module and run in its place. For
TensorRT for RTX and TensorRT, by one path (`library`). Acts from outside: module in, module out; knows no family.

    stream.accelerate("tensorrt")
    accelerate_with_tensorrt(stream, "engines", max_batch_size=4)   # StreamDiffusion's own name
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from streamflow.acceleration import Accelerated, Part, Parts
from streamflow.acceleration.tensorrt import engines, library
from streamflow.acceleration.tensorrt.adaptive import Adaptive
from streamflow.acceleration.tensorrt.background import Build
from streamflow.acceleration.tensorrt.build import Target
from streamflow.acceleration.tensorrt.cache import clear_engines, list_engines
from streamflow.acceleration.tensorrt.check import compare
from streamflow.acceleration.tensorrt.engine import EngineModule
from streamflow.acceleration.tensorrt.errors import (
    BuildError,
    EngineError,
    EngineMismatch,
    ExportError,
    MissingTensorRT,
    NoDevice,
    NotExportable,
    OutsideProfile,
    TensorRTError,
)
from streamflow.acceleration.tensorrt.options import Options, default_engine_dir
from streamflow.acceleration.tensorrt.profile import Profile, profile_of

__all__ = [
    "BuildError",
    "EngineError",
    "EngineMismatch",
    "ExportError",
    "MissingTensorRT",
    "NoDevice",
    "NotExportable",
    "Options",
    "OutsideProfile",
    "TensorRTError",
    "accelerate",
    "accelerate_with_tensorrt",
    "clear_engines",
    "default_engine_dir",
    "list_engines",
]

logger = logging.getLogger(__name__)

# Where a report of an executed engine is committed; None: engines have been built and parsed by us, never executed.
EXECUTION_REPORT: str | None = None
_said: set[str] = set()


def accelerate(parts: Parts, options: Options) -> Accelerated:
    """Each part on an engine, built or taken from the cache, compared with the plain module first.

    Raises:
        TensorRTError, MissingTensorRT: the first part that fails, unless `fallback="eager"`, which runs that part plainly
            and warns with the cause. ValueError: sizes in the options that a part cannot have.
    """
    _say_status()
    modules: dict[str, nn.Module] = {}
    seconds: dict[str, float] = {}
    picture = sides(parts.encoder)

    def undo() -> None:
        for module in modules.values():
            if isinstance(module, Adaptive):
                module.close()

    try:
        for part in parts:
            began = time.perf_counter()
            modules[part.name] = _on_engine_or_plain(part, options, picture)
            seconds[part.name] = time.perf_counter() - began
    except BaseException:
        undo()
        raise
    return Accelerated(modules, undo, seconds)


def sides(part: Part) -> tuple[int, int]:
    """The last two dimensions of a part's first input: height and width, where it has them."""
    height, width = next(iter(part.inputs.values())).shape[-2:]
    return height, width


def _on_engine_or_plain(part: Part, options: Options, picture: tuple[int, int]) -> nn.Module:
    try:
        return _on_engine(part, options, picture)
    except (TensorRTError, MissingTensorRT) as error:
        if options.fallback is None:
            raise
        logger.warning("%s runs plainly, since fallback='eager': %s", part.name, error)
        return part.module


def _on_engine(part: Part, options: Options, picture: tuple[int, int]) -> Adaptive:
    device = next(iter(part.inputs.values())).device
    options.require(device)
    target = Target.of(device)
    kind = library.choose(target.capability)
    loaded = library.load(kind)
    height, width = sides(part)
    units = (picture[0] // height, picture[1] // width) if part.free_size else (1, 1)

    def wanted(now: Part) -> Profile:
        return profile_of(now, options, units)

    def load(data: bytes, profile: Profile) -> nn.Module:
        return _graphed(EngineModule(data, profile, loaded, torch.device("cuda", target.index)), options)

    def start(now: Part, profile: Profile) -> Build:
        return Build(now, profile, options, target, kind, load)

    profile = wanted(part)
    _, data = engines.make(part, profile, options, target, kind)
    engine = load(data, profile)
    if options.verify:
        _verify(part, profile, engine, options)
    adaptive = Adaptive(part, wanted, start if options.adaptive else None, options.tolerance_db, options.verify)
    adaptive.add(profile, engine)
    return adaptive


def _verify(part: Part, profile: Profile, engine: nn.Module, options: Options) -> None:
    try:
        worst = compare(part, profile, engine, options.tolerance_db)
    except torch.cuda.OutOfMemoryError as error:
        remedy = "close what else uses the GPU, or give a smaller max_batch, max_height, max_width, or verify=False"
        raise EngineError(part.name, "comparing", f"out of memory: {error}", remedy) from error
    logger.info("%s: engine equals the plain module, PSNR %.1f dB or more", part.name, worst)


def _graphed(engine: nn.Module, options: Options) -> nn.Module:
    if not options.use_cuda_graph:
        return engine
    from streamflow.acceleration.cuda_graph import Graphed

    return Graphed(engine)


def _say_status() -> None:
    if EXECUTION_REPORT is None and "status" not in _said:
        _said.add("status")
        logger.warning(
            "TensorRT engines: built and parsed in CI, not executed by us. Each is compared with the plain module before "
            "it is used; `python -m streamflow.acceleration.tensorrt --self-test` checks and times them on your GPU"
        )


# -- StreamDiffusion's own function -------------------------------------------------------------------------------------

_RENAMED = {"opt_image_height": "opt_height", "opt_image_width": "opt_width", "force_engine_build": "rebuild"}
_MEANINGLESS = {
    "build_enable_refit": "engines are built anew when weights change",
    "build_all_tactics": "TensorRT chooses by itself",
    "onnx_opset": "the exporter chooses by itself",
    "force_onnx_export": "ONNX files are not kept",
    "force_onnx_optimize": "ONNX files are not kept",
}
_RESOLUTION = ("min_image_resolution", "max_image_resolution")


def build_options(given: Mapping[str, Any] | None, max_batch: int, min_batch: int) -> dict[str, Any]:
    """StreamDiffusion's `engine_build_options` and batch sizes, and any fields of `Options`, as fields of `Options`.

    `opt_batch_size` is read and left: an engine is tuned for the stream's own rows. NotImplementedError for what has no
    meaning here, unless it is off; TypeError for a name that is neither's.
    """
    given = dict(given or {})
    options: dict[str, Any] = {"max_batch": max_batch, "min_batch": min_batch}
    given.pop("opt_batch_size", None)
    for name, why in _MEANINGLESS.items():
        if given.pop(name, None) and name != "onnx_opset":
            raise NotImplementedError(f"engine_build_options has {name}: {why}; leave it out")
    if given.pop("build_static_batch", False):
        del options["max_batch"], options["min_batch"]
    dynamic = given.pop("build_dynamic_shape", False)
    for name in _RESOLUTION:
        size = given.pop(name, None)
        if dynamic and size is not None:
            options.update({f"{name[:3]}_height": size, f"{name[:3]}_width": size})
    for name, value in given.items():
        options[_RENAMED.get(name, name)] = value
    if unknown := sorted(set(options) - set(Options.__dataclass_fields__)):
        known = [*_RENAMED, *_RESOLUTION, "build_dynamic_shape", "build_static_batch", *Options.__dataclass_fields__]
        raise TypeError(f"engine_build_options has no {', '.join(unknown)}; it may have {', '.join(known)}")
    return options


def accelerate_with_tensorrt(
    stream: Any,
    engine_dir: Any,
    max_batch_size: int = 2,
    min_batch_size: int = 1,
    use_cuda_graph: bool = False,
    engine_build_options: Mapping[str, Any] | None = None,
) -> Any:
    """StreamDiffusion's function: `stream.accelerate("tensorrt", ...)` under its names; returns the stream.

    The batch sizes are widened to hold the stream's own rows. Before `prepare` it takes effect there. `engine_build_options`
    is not changed. Raises what `stream.accelerate` raises.
    """
    options = build_options(engine_build_options, max_batch_size, min_batch_size)
    stream.accelerate("tensorrt", engine_dir=engine_dir, use_cuda_graph=use_cuda_graph, **options)
    return stream
