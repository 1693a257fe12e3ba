"""TensorRT: each part is exported to ONNX, built into an engine, compared with the plain module, and replaced by the engine.
Works with TensorRT for RTX and with TensorRT (`library`). Modules in, modules out: knows no family.

    stream.accelerate("tensorrt")
    accelerate_with_tensorrt(stream, "engines", max_batch_size=4)   # StreamDiffusion's own name
"""

from __future__ import annotations

import functools
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from streamflow._files import Json
from streamflow.acceleration import Accelerated, Part, Parts
from streamflow.acceleration.errors import (
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
from streamflow.acceleration.tensorrt import library
from streamflow.acceleration.tensorrt.adaptive import Adaptive
from streamflow.acceleration.tensorrt.build import Build, load_or_build
from streamflow.acceleration.tensorrt.cache import clear_engines, list_engines
from streamflow.acceleration.tensorrt.engine import EngineModule, compare
from streamflow.acceleration.tensorrt.options import Options, Profile, default_engine_dir, profile_of

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments
    from streamflow.pipeline import StreamFlow

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
    *_, height, width = next(iter(parts.encoder.inputs.values())).shape
    with ExitStack() as started:
        for part in parts:
            began = time.perf_counter()
            try:
                modules[part.name] = adaptive = _on_engine(part, options, height, width)
                started.callback(adaptive.close)
            except (TensorRTError, MissingTensorRT) as error:
                if options.fallback is None:
                    raise
                logger.warning("%s runs without an engine, since fallback='eager': %s", part.name, error)
                modules[part.name] = part.module
            seconds[part.name] = time.perf_counter() - began
        undo = started.pop_all().close
    return Accelerated(modules, undo, seconds)


def _on_engine(part: Part, options: Options, height: int, width: int) -> Adaptive:
    """The part on its first engine. height, width: of the images in pixels."""
    first = next(iter(part.inputs.values()))
    target = library.Target.of(first.device)
    units = (height // first.shape[-2], width // first.shape[-1]) if part.free_size else (1, 1)
    to_profile = functools.partial(profile_of, options=options, units=units)

    def load(data: bytes, profile: Profile) -> nn.Module:
        engine = EngineModule(data, profile, target.library, target.device)
        if not options.use_cuda_graph:
            return engine
        from streamflow.acceleration.cuda_graph import Graphed

        return Graphed(engine)

    start = functools.partial(Build, options=options, target=target, load=load)
    adaptive = Adaptive(part, to_profile, start if options.adaptive else None, options.tolerance_db, options.verify)
    profile = to_profile(part)
    _, data = load_or_build(part, profile, options, target)
    engine = load(data, profile)
    if options.verify:
        try:
            worst = compare(part, profile, engine, options.tolerance_db)
        except torch.cuda.OutOfMemoryError as error:
            remedy = "close what else uses the GPU, or pass a smaller max_batch, max_height, max_width, or verify=False"
            raise EngineError(part.name, "comparing", f"out of memory: {error}", remedy) from error
        logger.info("%s: the engine equals the plain module, PSNR %.1f dB or more", part.name, worst)
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

_RENAMED = {
    "opt_image_height": ("opt_height",),
    "opt_image_width": ("opt_width",),
    "force_engine_build": ("rebuild",),
    "min_image_resolution": ("min_height", "min_width"),
    "max_image_resolution": ("max_height", "max_width"),
    **{name: (name,) for name in Options.__dataclass_fields__},
}
_IGNORED = ("opt_batch_size", "onnx_opset", "build_static_batch", "build_dynamic_shape")
_MEANINGLESS = {
    "build_enable_refit": "engines are built anew when weights change",
    "build_all_tactics": "TensorRT chooses by itself",
    "force_onnx_export": "ONNX files are not kept",
    "force_onnx_optimize": "ONNX files are not kept",
}


def build_options(given: Arguments | None, max_batch: int, min_batch: int) -> Json:
    """StreamDiffusion's `engine_build_options` and batch sizes, or any fields of `Options`, as fields of `Options`.

    `opt_batch_size` and `onnx_opset` have no effect: an engine is tuned for the stream's own rows, and the exporter chooses
    the opset. NotImplementedError for options without a meaning here, unless they are off. TypeError for unknown names.
    """
    given = given or {}
    static, dynamic = given.get("build_static_batch"), given.get("build_dynamic_shape")
    options: Json = {} if static else {"max_batch": max_batch, "min_batch": min_batch}
    for name, value in given.items():
        if name in _MEANINGLESS:
            if value:
                raise NotImplementedError(f"engine_build_options has {name}: {_MEANINGLESS[name]}; leave it out")
        elif name in _RENAMED:
            if dynamic or not name.endswith("_image_resolution"):
                options |= dict.fromkeys(_RENAMED[name], value)
        elif name not in _IGNORED:
            raise TypeError(f"engine_build_options has no {name}; it may have {', '.join((*_RENAMED, *_IGNORED))}")
    return options


def accelerate_with_tensorrt(
    stream: StreamFlow,
    engine_dir: str | Path,
    max_batch_size: int = 2,
    min_batch_size: int = 1,
    use_cuda_graph: bool = False,
    engine_build_options: Arguments | None = None,
) -> StreamFlow:
    """StreamDiffusion's function: `stream.accelerate("tensorrt", ...)` with its names. Returns the stream.

    The range of batch sizes is widened to include the stream's own rows. Before `prepare` it takes effect there.
    `engine_build_options` is not changed. Raises what `stream.accelerate` raises.
    """
    options = build_options(engine_build_options, max_batch_size, min_batch_size)
    stream.accelerate("tensorrt", engine_dir=engine_dir, use_cuda_graph=use_cuda_graph, **options)
    return stream
