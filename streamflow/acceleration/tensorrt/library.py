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
from typing import Protocol

import torch

from streamflow.acceleration.tensorrt.errors import MissingTensorRT

logger = logging.getLogger(__name__)

RTX, TENSORRT = "tensorrt_rtx", "tensorrt"
RTX_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))  # the compute capabilities that the RTX runtime supports
_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
_COMMON = ("polygraphy", "onnx", "onnxscript")
_MODULES = {RTX: ("tensorrt_rtx_bindings", _LIBRARIES, *_COMMON), TENSORRT: ("tensorrt", *_COMMON)}
_EXTRA = {RTX: "tensorrt-rtx", TENSORRT: "tensorrt"}
_LABEL = {RTX: "TensorRT for RTX", TENSORRT: "TensorRT"}


def command(kind: str) -> str:
    """The command that installs a kind."""
    return f'python env/install.py --{_EXTRA[kind]}   (or: pip install "streamflow-rf[{_EXTRA[kind]}]")'


def missing(kind: str) -> tuple[str, ...]:
    """The modules of a kind that are not installed."""
    return tuple(name for name in _MODULES[kind] if find_spec(name) is None)


def choose(capability: tuple[int, int] | None = None) -> str:
    """TensorRT for RTX if it is installed and supports this compute capability, else TensorRT.

    capability: None for a build without a GPU. MissingTensorRT, with the command, if the suitable kind is not installed.
    """
    supported = capability is None or tuple(capability) in RTX_CAPABILITIES
    if supported and not missing(RTX):
        return RTX
    if not missing(TENSORRT):
        return TENSORRT
    kind = RTX if supported else TENSORRT
    where = f" for compute capability {capability[0]}.{capability[1]}" if capability else ""
    unfit = "" if supported or missing(RTX) else "; TensorRT for RTX is installed and does not run on this GPU"
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
        """A CUDA device of this machine."""
        index = torch.cuda.current_device() if device.index is None else device.index
        return cls(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), index)

    @property
    def device(self) -> torch.device:
        """The CUDA device. Without an index, torch's current one."""
        return torch.device("cuda") if self.index is None else torch.device("cuda", self.index)

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}"


class Messages(Protocol):
    """TensorRT's logger."""

    def errors(self) -> list[str]:
        """The errors since the last call."""
        ...


@dataclass(frozen=True, eq=False)
class Library:
    """A loaded TensorRT. `trt`: its Python module. `messages`: its logger, whose `errors()` returns and clears them."""

    kind: str
    trt: ModuleType
    messages: Messages

    def __str__(self) -> str:
        return f"{_LABEL[self.kind]} {self.trt.__version__}"


@functools.cache
def load(kind: str) -> Library:
    """Import a kind and make polygraphy use it, with its log in Python's logging.

    Raises:
        MissingTensorRT: it is not installed or cannot be loaded. RuntimeError: polygraphy uses the other kind already.
    """
    if absent := missing(kind):
        raise MissingTensorRT(f"{_LABEL[kind]} is not installed (missing: {', '.join(absent)}). Run {command(kind)}")
    try:
        trt = _import_rtx() if kind == RTX else importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: a shared library cannot be loaded
        raise MissingTensorRT(f"{_LABEL[kind]} is installed but cannot be loaded: {error}. Run {command(kind)}") from error
    from polygraphy import config

    if "polygraphy.backend.trt" in sys.modules and bool(config.USE_TENSORRT_RTX) != (kind == RTX):
        raise RuntimeError(
            f"polygraphy uses the other TensorRT in this process: start a new one with "
            f"POLYGRAPHY_USE_TENSORRT_RTX={int(kind == RTX)}"
        )
    config.USE_TENSORRT_RTX = kind == RTX
    sys.modules.setdefault(kind, trt)  # polygraphy imports TensorRT for RTX under this name
    from polygraphy.backend.trt import util

    messages = _messages(trt)
    util.TRT_LOGGER = messages  # type: ignore[attr-defined]  # polygraphy makes it at run time
    library = Library(kind, trt, messages)
    logger.info("loaded %s", library)
    return library


def _import_rtx() -> ModuleType:
    """The RTX bindings. They do not find the shared libraries by themselves."""
    spec = find_spec(_LIBRARIES)
    if spec is None or not spec.submodule_search_locations:
        raise MissingTensorRT(f"{_LIBRARIES}, the libraries of {_LABEL[RTX]}, is not installed. Run {command(RTX)}")
    folder = Path(spec.submodule_search_locations[0])
    if sys.platform != "win32":
        for pattern in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):
            files = sorted(folder.glob(pattern))
            if not files:
                raise OSError(f"{folder} holds no {pattern}")
            ctypes.CDLL(str(files[-1]), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module("tensorrt_rtx_bindings")
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
    try:
        with os.add_dll_directory(str(folder)):
            return importlib.import_module("tensorrt_rtx_bindings")
    finally:
        os.environ["PATH"] = path


def _messages(trt: ModuleType) -> Messages:
    severity = trt.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR, severity.WARNING: logging.WARNING}

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self._errors.append(message)
            logger.log(level, "%s", message)

        def errors(self) -> list[str]:
            found, self._errors = self._errors, []
            return found

    return Logger()


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep polygraphy from writing to the terminal. Its errors are exceptions, and TensorRT's go to `Library.messages`."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # polygraphy sets what TensorRT for RTX no longer reads
        yield
