"""ONNX to the bytes of an engine, through polygraphy. For RTX this needs no GPU. Knows files and profiles, no module."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamflow.acceleration.tensorrt.errors import BuildError
from streamflow.acceleration.tensorrt.library import Library, progress, quiet_polygraphy
from streamflow.acceleration.tensorrt.options import Options
from streamflow.acceleration.tensorrt.profile import Profile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """The GPU that an engine is for. `index`: of the CUDA device, None: built without one."""

    name: str
    capability: tuple[int, int]
    index: int | None = None

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """The target that a CUDA device is."""
        index = torch.cuda.current_device() if device.index is None else device.index
        return cls(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), index)

    @classmethod
    def without(cls, capability: tuple[int, int] = (8, 9)) -> Target:
        """A build without a GPU, for this compute capability."""
        return cls("none", tuple(capability))

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}"

    @property
    def current(self) -> contextlib.AbstractContextManager:
        """Makes the target's device the current one."""
        return contextlib.nullcontext() if self.index is None else torch.cuda.device(self.index)


def build(onnx: Path, profile: Profile, options: Options, library: Library, target: Target) -> bytes:
    """The serialized engine of an ONNX file, strongly typed, with one profile.

    Raises:
        BuildError: with the stage, and the node where TensorRT names one; out of memory with the remedy.
    """
    began = time.perf_counter()
    library.messages.errors()
    with target.current, quiet_polygraphy():
        builder, network, parser = _parse(onnx, profile.part, library)
        logger.info("%s: %d layers read, building with %s for %s", profile.part, network.num_layers, library, target)
        engine = _built(builder, network, profile, options, library, target)
        del parser  # it owns the weights that the network points at
    took = time.perf_counter() - began
    logger.info("%s: engine of %.1f MB built in %.1f s", profile.part, len(engine) / 1e6, took)
    return engine


def _parse(onnx: Path, part: str, library: Library) -> tuple[Any, Any, Any]:
    trt = library.trt
    try:
        builder = trt.Builder(library.messages)
    except (RuntimeError, TypeError) as error:  # pybind says either where the library gives no builder
        raise _failure(part, "starting the builder", str(error), library) from error
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, library.messages)
    if not parser.parse_from_file(str(onnx)):
        first = parser.get_error(0) if parser.num_errors else None
        node = first and f"{first.node_operator()} {first.node_name()}".strip()
        raise _failure(part, "reading ONNX", first.desc() if first else f"{onnx} is not readable", library, node)
    return builder, network, parser


def _built(builder: Any, network: Any, profile: Profile, options: Options, library: Library, target: Target) -> bytes:
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.exception import PolygraphyException

    try:
        with _bars() as bar:
            config = _config(profile, options, library, target, progress(library, bar))
            return bytes(EngineBytesFromNetwork((builder, network), config)())
    except PolygraphyException as error:
        raise _failure(profile.part, "building the engine", str(error), library) from error


def _config(profile: Profile, options: Options, library: Library, target: Target, monitor: Any) -> Any:
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig
    from polygraphy.backend.trt import Profile as Ranges

    ranges = Ranges()
    for name, r in profile.ranges.items():
        ranges.add(name, min=r.smallest, opt=r.best, max=r.largest)
    arguments: dict[str, Any] = {"profiles": [ranges], "progress_monitor": monitor}
    if options.workspace_gb is not None:
        pool = library.trt.MemoryPoolType.WORKSPACE
        arguments["memory_pool_limits"] = {pool: int(options.workspace_gb * 2**30)}
    if options.optimization_level is not None:
        arguments["builder_optimization_level"] = options.optimization_level
    if not library.is_rtx:
        return CreateConfig(tf32=options.tf32, **arguments)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    def set_tf32(builder: Any, network: Any, config: Any) -> None:
        (config.set_flag if options.tf32 else config.clear_flag)(library.trt.BuilderFlag.TF32)

    return PostprocessConfig(CreateConfigRTX(compute_capabilities=[target.capability], **arguments), set_tf32)


@contextlib.contextmanager
def _bars() -> Iterator[Any]:
    from tqdm import tqdm

    yield functools.partial(tqdm, disable=None, leave=False)


_REMEDIES = {
    "memory": "close what else uses the GPU, or set a smaller workspace_gb, max_batch, max_height, max_width",
    "reading ONNX": "use accelerate('compile') for this model, or fallback='eager' to run this part plainly",
    "starting the builder": "see `streamflow doctor`; TensorRT needs a GPU to build, TensorRT for RTX does not",
    "building the engine": "set optimization_level=0 or a narrower profile, or use accelerate('compile') for this model",
}


def _failure(part: str, stage: str, what: str, library: Library, node: str | None = None) -> BuildError:
    """The error, with all that TensorRT's own logger said, and the remedy for its kind."""
    said = "; ".join([what, *library.messages.errors()])
    memory = any(word in said.lower() for word in ("out of memory", "outofmemory", "insufficient memory", "bad_alloc"))
    return BuildError(part, stage, said[:1500], _REMEDIES["memory" if memory else stage], node)
