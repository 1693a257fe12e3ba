"""Runs parts by OpenVINO on a CPU, by default in bfloat16, which recent processors multiply in hardware (AVX512-BF16, AMX).
A part is exported to ONNX in the first call with new shapes. The modules are not changed. Knows modules, tensors and
OpenVINO's CPU device; no family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from streamflow._validation import whole_number
from streamflow.acceleration import Accelerated, Parts
from streamflow.acceleration.onnx_export import check_exportable
from streamflow.acceleration.onnxruntime import Sessions, check_float32

NEEDS = ("onnx", "onnxscript", "openvino")
PRECISIONS = {"bf16": "BF16", "f32": "FP32"}  # and OpenVINO's names of what a processor can do


@dataclass(frozen=True)
class Options:
    """The options of `accelerate("openvino", ...)`.

    precision: "bf16", whose images differ as those of a network in bfloat16 do, or "f32".
    threads: of one call. None: as many as torch has.
    limit: the number of shapes of a part that keep a session; the least recently used is dropped.
    """

    precision: str = "bf16"
    threads: int | None = None
    limit: int = 8

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        whole_number("threads", 1 if self.threads is None else self.threads, 1)
        whole_number("limit", self.limit, 1)

    def for_device(self, device: torch.device) -> Options:
        """These options with a number of `threads`. RuntimeError: the device is no CPU, or it does not compute in this
        precision. ImportError: no OpenVINO."""
        if device.type != "cpu":
            raise RuntimeError(f"openvino is for CPUs here and this pipe is on {device}: use accelerate('auto') there")
        if missing := [name for name in NEEDS if find_spec(name) is None]:
            raise ImportError(f"accelerate('openvino') needs {', '.join(missing)}: pip install 'streamflow-rf[openvino]'")
        able = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if PRECISIONS[self.precision] not in able:
            raise RuntimeError(
                f"this processor does not compute in {self.precision} (OpenVINO names {', '.join(able)}): pass "
                f"precision='f32', or use accelerate('onnxruntime')"
            )
        return dataclasses.replace(self, threads=self.threads or torch.get_num_threads())


def accelerate(parts: Parts, options: Options) -> Accelerated:
    """Each part as an `OpenVinoSessions` module. NotExportable: the network takes more than tensors. ValueError: the dtype
    of a part is not float32."""
    for part in parts:
        check_exportable(part)
        check_float32(part, "openvino")
    return Accelerated({part.name: OpenVinoSessions(part, options) for part in parts})


class OpenVinoSessions(Sessions):
    """As `Sessions`, by OpenVINO. Every number of rows has a session of its own, since fixed shapes are faster."""

    def _sizes(self, inputs: Mapping[str, Tensor]) -> tuple:
        return tuple((name, t.dtype, tuple(t.shape)) for name, t in inputs.items())

    def _session(self, path: Path, inputs: Mapping[str, Tensor]) -> Session:
        return Session(path, inputs, self._options)


def _core() -> Any:
    return import_module("openvino").Core()  # beside a file of this name, tools take an import for the file


class Session:
    """One ONNX file, compiled for the shapes of these inputs. Calls wait for each other."""

    def __init__(self, path: Path, inputs: Mapping[str, Tensor], options: Options):
        core = _core()
        model = core.read_model(path)
        self._reads = [one.get_any_name() for one in model.inputs]
        model.reshape({name: list(inputs[name].shape) for name in self._reads})
        settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": options.threads}
        settings["INFERENCE_PRECISION_HINT"] = options.precision
        self._request, self._lock = core.compile_model(model, "CPU", settings).create_infer_request(), Lock()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        given = {name: inputs[name].contiguous().numpy() for name in self._reads}
        with self._lock:
            return torch.from_numpy(self._request.infer(given, share_inputs=True)[0])
