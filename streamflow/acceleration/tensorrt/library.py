"""Finds and loads TensorRT for RTX (`tensorrt_rtx_bindings`, with the shared libraries in onnxruntime's execution provider)
or TensorRT (`tensorrt`), for use through polygraphy. Nothing is imported before `load`."""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from streamflow.acceleration.errors import MissingTensorRT, NoDevice

logger = logging.getLogger(__name__)

RTX, TENSORRT = "tensorrt_rtx", "tensorrt"
RTX_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))  # the compute capabilities that the RTX runtime supports
_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
_COMMON = ("polygraphy", "onnx", "onnxscript")
_MODULES = {RTX: ("tensorrt_rtx_bindings", _LIBRARIES, *_COMMON), TENSORRT: ("tensorrt", *_COMMON)}
_LABEL = {RTX: "TensorRT for RTX", TENSORRT: "TensorRT"}


def command(kind: str) -> str:
    """The command that installs a kind."""
    extra = kind.replace("_", "-")
    return f'python env/install.py --{extra}   (or: pip install "streamflow-rf[{extra}]")'


def missing(kind: str) -> tuple[str, ...]:
    """The modules of a kind that are not installed."""
    return tuple(name for name in _MODULES[kind] if find_spec(name) is None)


def choose(capability: tuple[int, int] | None = None) -> str:
    """TensorRT for RTX if it is installed and supports this compute capability, else TensorRT.

    capability: None for a build without a GPU. MissingTensorRT, with the command, if the suitable kind is not installed.
    """
    suitable = (RTX, TENSORRT) if capability is None or tuple(capability) in RTX_CAPABILITIES else (TENSORRT,)
    if installed := [kind for kind in suitable if not missing(kind)]:
        return installed[0]
    kind = suitable[0]
    where = f" for compute capability {capability[0]}.{capability[1]}" if capability else ""
    unfit = "" if missing(RTX) else "; TensorRT for RTX is installed and does not run on this GPU"
    raise MissingTensorRT(
        f"{_LABEL[kind]}{where} is not installed (missing: {', '.join(missing(kind))}){unfit}. Run {command(kind)}"
    )


@dataclass(frozen=True)
class Target:
    """The GPU that an engine is built for. index: of the CUDA device. None: no device, a build for a compute capability."""

    name: str = "none"
    capability: tuple[int, int] = (8, 9)
    index: int | None = None

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """A CUDA device of this machine. NoDevice if it cannot run engines."""
        if device.type != "cuda" or torch.version.hip is not None:
            problem = f"engines run on NVIDIA GPUs and this pipe is on {device}"
            remedy = "move it with pipe.to('cuda') on such a machine, or use accelerate('auto') or fallback='eager'"
            build_only = "`python -m streamflow.acceleration.tensorrt --build-only` builds without a GPU"
            raise NoDevice("all parts", "before export", problem, f"{remedy}; {build_only}")
        index = torch.cuda.current_device() if device.index is None else device.index
        return cls(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), index)

    @property
    def device(self) -> torch.device:
        """The CUDA device. Without an index, torch's current one."""
        return torch.device("cuda") if self.index is None else torch.device("cuda", self.index)

    @property
    def library(self) -> Library:
        """The TensorRT for this GPU, loaded. MissingTensorRT: see `choose` and `load`."""
        return load(choose(self.capability))

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}"


@dataclass(frozen=True, eq=False)
class Library:
    """A loaded TensorRT. `trt`: its Python module. `errors`: what its logger has reported lately."""

    kind: str
    trt: ModuleType
    errors: list[str]

    def __str__(self) -> str:
        return f"{_LABEL[self.kind]} {self.trt.__version__}"

    def explain(self, problem: object) -> str:
        """The problem, followed by `errors`, which are cleared: at most 1500 characters."""
        text = "; ".join([str(problem), *self.errors])
        self.errors.clear()
        return text[:1500]

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep polygraphy from writing to the terminal. Its errors are exceptions, and TensorRT's go to `errors`."""
        from polygraphy.logger import G_LOGGER

        self.errors.clear()
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # polygraphy sets what TensorRT for RTX no longer reads
            yield


@functools.cache
def load(kind: str) -> Library:
    """Import an installed kind and make polygraphy use it, with its log in Python's logging.

    Raises:
        MissingTensorRT: it cannot be loaded. RuntimeError: polygraphy uses the other kind already.
    """
    try:
        trt = _import_rtx() if kind == RTX else importlib.import_module("tensorrt")
        from polygraphy import config
    except (ImportError, OSError) as error:  # OSError: a shared library cannot be loaded
        raise MissingTensorRT(f"{_LABEL[kind]} cannot be loaded: {error}. Run {command(kind)}") from error
    if "polygraphy.backend.trt" in sys.modules and bool(config.USE_TENSORRT_RTX) != (kind == RTX):
        raise RuntimeError(
            f"polygraphy uses the other TensorRT in this process: start a new one with "
            f"POLYGRAPHY_USE_TENSORRT_RTX={int(kind == RTX)}"
        )
    config.USE_TENSORRT_RTX = kind == RTX
    sys.modules.setdefault(kind, trt)  # polygraphy imports TensorRT for RTX under this name
    from polygraphy.backend.trt import util

    library = Library(kind, trt, [])
    util.TRT_LOGGER = _logger(library)  # type: ignore[attr-defined]  # polygraphy makes it at run time
    logger.info("loaded %s", library)
    return library


def _import_rtx() -> ModuleType:
    """The RTX bindings. They do not find the shared libraries by themselves."""
    spec = find_spec(_LIBRARIES)
    if spec is None or spec.origin is None:
        raise ImportError(f"{_LIBRARIES}, its libraries, is not installed")
    folder = Path(spec.origin).parent
    if sys.platform == "win32":
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        os.add_dll_directory(str(folder))
    for pattern in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):
        for file in sorted(folder.glob(pattern))[-1:]:
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_rtx_bindings")


def _logger(library: Library) -> object:
    """A logger of TensorRT that writes to Python's, and errors to the library's `errors` too."""
    severity = library.trt.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR, severity.WARNING: logging.WARNING}

    class Logger(library.trt.ILogger):
        def __init__(self) -> None:
            library.trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                library.errors.append(message)
            logger.log(level, "%s", message)

    return Logger()
