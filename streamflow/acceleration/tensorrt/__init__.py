"""TensorRT: each part is exported to ONNX, built into an engine, compared with the plain module, and replaced by the engine.
Works with TensorRT for RTX and with TensorRT (`library`). Modules in, modules out: knows no family.

    stream.accelerate("tensorrt")
    accelerate_with_tensorrt(stream, "engines", max_batch_size=4)   # StreamDiffusion's own name
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from streamflow.acceleration import Accelerated, Part, Parts
from streamflow.acceleration.tensorrt import library
from streamflow.acceleration.tensorrt.adaptive import Adaptive
from streamflow.acceleration.tensorrt.build import Build, load_or_build
from streamflow.acceleration.tensorrt.cache import clear_engines, list_engines
from streamflow.acceleration.tensorrt.engine import EngineModule, compare
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
from streamflow.acceleration.tensorrt.options import Options, Profile, default_engine_dir, profile_of

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


def accelerate(parts: Parts, options: Options) -> Accelerated:
    """Each part on an engine, out of the cache or new, compared with the plain module first.

    Raises:
        TensorRTError, MissingTensorRT: from the first part that fails. With `fallback="eager"` that part runs as the plain
            module, and a warning has the cause. ValueError: sizes in the options that a part cannot have.
    """
    _warn_not_executed()
    modules: dict[str, nn.Module] = {}
    seconds: dict[str, float] = {}

    def undo() -> None:
        for module in modules.values():
            if isinstance(module, Adaptive):
                module.close()

    try:
        for part in parts:
            began = time.perf_counter()
            try:
                modules[part.name] = _on_engine(part, options, _sides(parts.encoder))
            except (TensorRTError, MissingTensorRT) as error:
                if options.fallback is None:
                    raise
                logger.warning("%s runs without an engine, since fallback='eager': %s", part.name, error)
                modules[part.name] = part.module
            seconds[part.name] = time.perf_counter() - began
    except BaseException:
        undo()
        raise
    return Accelerated(modules, undo, seconds)


def _sides(part: Part) -> tuple[int, int]:
    """The last two dimensions of a part's first input."""
    height, width = next(iter(part.inputs.values())).shape[-2:]
    return height, width


def _on_engine(part: Part, options: Options, image: tuple[int, int]) -> Adaptive:
    """The part on its first engine. image: height and width in pixels."""
    device = next(iter(part.inputs.values())).device
    options.require(device)
    target = library.Target.of(device)
    kind = library.choose(target.capability)
    height, width = _sides(part)
    units = (image[0] // height, image[1] // width) if part.free_size else (1, 1)
    profile = profile_of(part, options, units)

    def load(data: bytes, profile: Profile) -> nn.Module:
        engine = EngineModule(data, profile, library.load(kind), torch.device("cuda", target.index))
        if not options.use_cuda_graph:
            return engine
        from streamflow.acceleration.cuda_graph import Graphed

        return Graphed(engine)

    def start(part: Part, profile: Profile) -> Build:
        return Build(part, profile, options, target, kind, load)

    _, data = load_or_build(part, profile, options, target, kind)
    engine = load(data, profile)
    if options.verify:
        try:
            worst = compare(part, profile, engine, options.tolerance_db)
        except torch.cuda.OutOfMemoryError as error:
            remedy = "close what else uses the GPU, or pass a smaller max_batch, max_height, max_width, or verify=False"
            raise EngineError(part.name, "comparing", f"out of memory: {error}", remedy) from error
        logger.info("%s: the engine equals the plain module, PSNR %.1f dB or more", part.name, worst)
    to_profile = functools.partial(profile_of, options=options, units=units)
    adaptive = Adaptive(part, to_profile, start if options.adaptive else None, options.tolerance_db, options.verify)
    adaptive.add(profile, engine)
    return adaptive


@functools.cache
def _warn_not_executed() -> None:
    """Once per process."""
    logger.warning(
        "TensorRT engines: built and parsed in CI, not executed by us. Each is compared with the plain module before "
        "it is used; `python -m streamflow.acceleration.tensorrt --self-test` checks and times them on your GPU"
    )


# -- StreamDiffusion's own function -------------------------------------------------------------------------------------

_RENAMED = {"opt_image_height": "opt_height", "opt_image_width": "opt_width", "force_engine_build": "rebuild"}
_RESOLUTION = ("min_image_resolution", "max_image_resolution")
_MEANINGLESS = {
    "build_enable_refit": "engines are built anew when weights change",
    "build_all_tactics": "TensorRT chooses by itself",
    "force_onnx_export": "ONNX files are not kept",
    "force_onnx_optimize": "ONNX files are not kept",
}


def build_options(given: Mapping[str, Any] | None, max_batch: int, min_batch: int) -> dict[str, Any]:
    """StreamDiffusion's `engine_build_options` and batch sizes, or any fields of `Options`, as fields of `Options`.

    `opt_batch_size` and `onnx_opset` have no effect: an engine is tuned for the stream's own rows, and the exporter chooses
    the opset. NotImplementedError for options without a meaning here, unless they are off. TypeError for unknown names.
    """
    options: dict[str, Any] = {"max_batch": max_batch, "min_batch": min_batch}
    given = {name: value for name, value in (given or {}).items() if name not in ("opt_batch_size", "onnx_opset")}
    for name, why in _MEANINGLESS.items():
        if given.pop(name, None):
            raise NotImplementedError(f"engine_build_options has {name}: {why}; leave it out")
    if given.pop("build_static_batch", False):
        options = {}
    dynamic = given.pop("build_dynamic_shape", False)
    for name in _RESOLUTION:
        size = given.pop(name, None)
        if dynamic and size is not None:
            options |= {f"{name[:3]}_height": size, f"{name[:3]}_width": size}
    options |= {_RENAMED.get(name, name): value for name, value in given.items()}
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
    """StreamDiffusion's function: `stream.accelerate("tensorrt", ...)` with its names. Returns the stream.

    The range of batch sizes is widened to include the stream's own rows. Before `prepare` it takes effect there.
    `engine_build_options` is not changed. Raises what `stream.accelerate` raises.
    """
    options = build_options(engine_build_options, max_batch_size, min_batch_size)
    stream.accelerate("tensorrt", engine_dir=engine_dir, use_cuda_graph=use_cuda_graph, **options)
    return stream
