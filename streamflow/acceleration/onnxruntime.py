"""Runs parts by onnxruntime on a CPU: a part is exported to ONNX in the first call with new sizes. The modules are not
changed. Knows modules, tensors and onnxruntime's CPU provider; no family."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from streamflow._validation import whole_number
from streamflow.acceleration import Accelerated, Part, Parts, bind_arguments
from streamflow.acceleration.onnx_export import check_exportable, export
from streamflow.acceleration.watch import WeightWatch

logger = logging.getLogger(__name__)
NEEDS = ("onnx", "onnxscript", "onnxruntime")
Run = Callable[[Mapping[str, Tensor]], Tensor]  # a session: inputs by name to the output


@dataclass(frozen=True)
class Options:
    """The options of `accelerate("onnxruntime", ...)`.

    threads: of one call. None: as many as torch has.
    limit: the number of sizes of a part that keep a session; the least recently used is dropped. All numbers of rows share a
        session.
    """

    threads: int | None = None
    limit: int = 8

    def __post_init__(self) -> None:
        whole_number("threads", 1 if self.threads is None else self.threads, 1)
        whole_number("limit", self.limit, 1)

    def for_device(self, device: torch.device) -> Options:
        """These options with a number of `threads`. RuntimeError: the device is no CPU. ImportError: no onnxruntime."""
        if device.type != "cpu":
            raise RuntimeError(f"onnxruntime is for CPUs and this pipe is on {device}: use accelerate('auto') there")
        if missing := [name for name in NEEDS if find_spec(name) is None]:
            raise ImportError(
                f"accelerate('onnxruntime') needs {', '.join(missing)}: pip install 'streamflow-rf[onnxruntime]'"
            )
        return dataclasses.replace(self, threads=self.threads or torch.get_num_threads())


def accelerate(parts: Parts, options: Options) -> Accelerated:
    """Each part as a `Sessions` module. NotExportable: the network takes more than tensors. ValueError: the dtype of a part
    is not float32."""
    for part in parts:
        check_exportable(part)
        check_float32(part, "onnxruntime")
    return Accelerated({part.name: Sessions(part, options) for part in parts})


def check_float32(part: Part, kind: str) -> None:
    """ValueError for a part of another dtype."""
    dtype = next(iter(part.inputs.values())).dtype
    if dtype != torch.float32:
        raise ValueError(
            f"accelerate({kind!r}) is for float32 and the {part.name} takes {dtype}: "
            f"pipe.to(dtype=torch.float32), or use accelerate('compile')"
        )


class Sessions(nn.Module):
    """A part run by onnxruntime. It is exported in the first call with other sizes (the number of rows does not count), and
    again, which takes seconds, after weights or adapters have changed. The output is a new tensor.

    Raises:
        ExportError: the module cannot be written as ONNX.
    """

    def __init__(self, part: Part, options: Any):
        super().__init__()
        self._part, self._options = part, options
        self._watch = WeightWatch(part.module)
        self._sessions: OrderedDict[tuple, Run] = OrderedDict()

    @property
    def kept(self) -> int:
        """The number of sizes that have a session."""
        return len(self._sessions)

    @torch.no_grad()
    def forward(self, *positional: Tensor, **given: Tensor | None) -> Tensor:
        inputs = bind_arguments(self._part.inputs, positional, given)
        if self._watch.changed():
            logger.info("%s: weights or adapters changed, exporting again", self._part.name)
            self._sessions.clear()
            self._watch.renew()
        key = self._sizes(inputs)
        session = self._sessions.get(key)
        if session is None:
            session = self._start(key, inputs)
        self._sessions.move_to_end(key)
        return session(inputs)

    def _sizes(self, inputs: Mapping[str, Tensor]) -> tuple:
        shared = self._part.shared
        return tuple((name, t.dtype, tuple(t.shape if name in shared else t.shape[1:])) for name, t in inputs.items())

    def _session(self, path: Path, inputs: Mapping[str, Tensor]) -> Run:
        """The session of an ONNX file for these inputs."""
        return Session(path, self._options)

    def _start(self, key: tuple, inputs: Mapping[str, Tensor]) -> Run:
        while self.kept >= self._options.limit:
            self._sessions.popitem(last=False)
        began = time.perf_counter()
        part = dataclasses.replace(self._part, inputs=dict(inputs))
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self._sessions[key] = session = self._session(export(part, Path(folder)), inputs)
        logger.info("%s: session of %s in %.1f s", part.name, key, time.perf_counter() - began)
        return session


class Session:
    """A session of one ONNX file. Its threads wait for work by spinning during a call only, since torch and the sessions of
    the other parts need the cores between calls."""

    def __init__(self, path: Path, options: Options):
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        settings.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        self._reads = [value.name for value in self._session.get_inputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        (output,) = self._session.run(None, {name: inputs[name].numpy() for name in self._reads})
        return torch.from_numpy(output)
