"""The one place that knows which TensorRT there is: TensorRT for RTX (`tensorrt_rtx_bindings`, whose libraries lie in
onnxruntime's execution provider wheel) or TensorRT (`tensorrt`). All is found and loaded at use, nothing at import."""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from streamflow.acceleration.tensorrt.errors import MissingTensorRT

logger = logging.getLogger(__name__)

RTX, TENSORRT = "tensorrt_rtx", "tensorrt"
RTX_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))  # what the RTX runtime executes on
BUILDING = ("polygraphy", "onnx", "onnxscript")
_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
_OPTION = {RTX: "tensorrt-rtx", TENSORRT: "tensorrt"}
_MODULES = {RTX: ("tensorrt_rtx_bindings", _LIBRARIES, *BUILDING), TENSORRT: ("tensorrt", *BUILDING)}
_LABEL = {RTX: "TensorRT for RTX", TENSORRT: "TensorRT"}


def command(kind: str) -> str:
    """The command that installs a kind."""
    return f'python env/install.py --{_OPTION[kind]}   (or: pip install "streamflow-rf[{_OPTION[kind]}]")'


def missing(kind: str) -> tuple[str, ...]:
    """The modules of a kind that are not installed."""
    return tuple(name for name in _MODULES[kind] if find_spec(name) is None)


def choose(capability: tuple[int, int] | None = None) -> str:
    """The kind for a GPU of this compute capability, None for a build without one: TensorRT for RTX where it runs and is
    installed, else TensorRT. MissingTensorRT names the command."""
    rtx_runs = capability is None or tuple(capability) in RTX_CAPABILITIES
    if rtx_runs and not missing(RTX):
        return RTX
    if not missing(TENSORRT):
        return TENSORRT
    wanted = RTX if rtx_runs else TENSORRT
    where = f" for compute capability {capability[0]}.{capability[1]}" if capability else ""
    unfit = "" if rtx_runs or missing(RTX) else "; TensorRT for RTX is installed and does not run on this GPU"
    raise MissingTensorRT(
        f"{_LABEL[wanted]}{where} is not installed (missing: {', '.join(missing(wanted))}){unfit}. Run {command(wanted)}"
    )


@dataclass(frozen=True, eq=False)
class Library:
    """A loaded TensorRT. `trt`: its Python module; `messages`: its logger."""

    kind: str
    trt: ModuleType
    messages: Any

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX."""
        return self.kind == RTX

    @property
    def version(self) -> str:
        """Its name and version, such as "TensorRT 10.13"."""
        return self.trt.__version__

    def __str__(self) -> str:
        return f"{_LABEL[self.kind]} {self.version}"


@functools.cache
def load(kind: str) -> Library:
    """Import a kind and let polygraphy use it. MissingTensorRT where it is not installed or does not load; RuntimeError
    where polygraphy serves the other kind in this process already."""
    if lacking := missing(kind):
        raise MissingTensorRT(f"{_LABEL[kind]} is not installed (missing: {', '.join(lacking)}). Run {command(kind)}")
    try:
        trt = _load_rtx() if kind == RTX else importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        raise MissingTensorRT(f"{_LABEL[kind]} is installed and does not load: {error}. Run {command(kind)}") from error
    _tell_polygraphy(kind, trt)
    library = Library(kind, trt, _messages(trt))
    trt.init_libnvinfer_plugins(library.messages, "")
    logger.info("loaded %s", library)
    return library


def _load_rtx() -> ModuleType:
    """The RTX bindings, once their two libraries are there for the linker to find."""
    folder = Path(next(iter(find_spec(_LIBRARIES).submodule_search_locations)))
    if sys.platform == "win32":
        with os.add_dll_directory(str(folder)), _on_path(folder):
            return importlib.import_module("tensorrt_rtx_bindings")
    for pattern in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):
        files = sorted(path for path in folder.glob(pattern))
        if not files:
            raise OSError(f"{folder} holds no {pattern}")
        ctypes.CDLL(str(files[-1]), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_rtx_bindings")


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The RTX bindings look for their libraries on PATH, on Windows."""
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _tell_polygraphy(kind: str, trt: ModuleType) -> None:
    from polygraphy import config

    wanted = kind == RTX
    if "polygraphy.backend.trt" in sys.modules and bool(config.USE_TENSORRT_RTX) != wanted:
        raise RuntimeError(
            f"polygraphy was imported for the other TensorRT in this process: start a new one with "
            f"POLYGRAPHY_USE_TENSORRT_RTX={int(wanted)}"
        )
    config.USE_TENSORRT_RTX = wanted
    if wanted:
        sys.modules.setdefault("tensorrt_rtx", trt)  # the name under which polygraphy imports it


def _messages(trt: ModuleType) -> Any:
    """TensorRT's logger: all goes to Python's logging, and errors are kept until `errors` is asked."""

    class Messages(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level >= logging.ERROR:
                self._errors.append(message)
            logger.log(level, "%s", message)

        def errors(self) -> list[str]:
            """The errors since the last time."""
            told, self._errors = self._errors, []
            return told

    severities = trt.ILogger.Severity
    levels = {
        severities.INTERNAL_ERROR: logging.ERROR,
        severities.ERROR: logging.ERROR,
        severities.WARNING: logging.WARNING,
    }
    return Messages()


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Polygraphy writes to stdout; its warnings and errors reach us as exceptions and through TensorRT's own logger."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # polygraphy sets what RTX no longer reads
        yield


def progress(library: Library, bar: Callable[..., Any]) -> Any:
    """TensorRT's progress as bars: `bar(desc=, total=)` makes one, as `tqdm` does. Only the outermost phase is shown."""
    trt = library.trt

    class Progress(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._bars: dict[str, Any] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._bars[name] = bar(desc=name, total=steps)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self._bars:
                self._bars[name].update(step + 1 - self._bars[name].n)
            return True

        def phase_finish(self, name: str) -> None:
            if name in self._bars:
                self._bars.pop(name).close()

    return Progress()
