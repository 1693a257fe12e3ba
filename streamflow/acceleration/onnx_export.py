"""A part to ONNX: traced by torch.export and translated by torch.onnx in the module's own dtype. The batch is dynamic, and
so is every dimension with a range of sizes. Knows no TensorRT, no onnxruntime and no family."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamflow.acceleration import Part
from streamflow.acceleration.errors import ExportError, NotExportable

logger = logging.getLogger(__name__)

OUTPUT = "output"
EXAMPLE_ROWS = 3  # torch.export takes a size of 1 for a constant, and 3 is rarely the size of another dimension
EXTERNAL = 2**30  # bytes of weights above which they are written beside the file: a protobuf holds 2 GiB
Shape = tuple[int, ...]
_NODE = re.compile(r"(%\w+|target=\S+|aten[.:]+[\w.]+)")
_NOISY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Range:
    """The shapes of one input: every dimension lies between `smallest` and `largest`, and `best` is what is tuned for."""

    smallest: Shape
    best: Shape
    largest: Shape

    @property
    def free(self) -> tuple[int, ...]:
        """The dimensions that vary."""
        return tuple(i for i, (low, high) in enumerate(zip(self.smallest, self.largest, strict=True)) if low != high)

    def holds(self, shape: Shape) -> bool:
        """Whether every dimension of a shape is in the range."""
        limits = zip(self.smallest, shape, self.largest, strict=False)
        return len(shape) == len(self.best) and all(low <= n <= high for low, n, high in limits)


def check_exportable(part: Part) -> None:
    """Raise NotExportable if the module takes or returns more than tensors."""
    if not part.exportable:
        problem = f"{type(part.module).__name__} takes Python lists or has no ONNX form"
        remedy = "use accelerate('cuda-graph') or accelerate('compile')"
        raise NotExportable(part=part.name, stage="before export", problem=problem, remedy=remedy)


@torch.no_grad()
def export(part: Part, folder: Path, ranges: Mapping[str, Range] | None = None) -> Path:
    """Write `folder/<part>.onnx`, with large weights beside it. Inputs keep their names, and the output is "output".

    ranges: of every input. None: the part's own shapes. The batch is dynamic in any case.

    Raises:
        NotExportable, ExportError: with the stage, and the node if torch names one.
    """
    check_exportable(part)
    ranges = ranges or {name: Range(*(tuple(value.shape),) * 3) for name, value in part.inputs.items()}
    inputs: dict[str, Tensor] = {}
    dynamic: dict[str, dict[int, object] | None] = {}
    for name, value in part.inputs.items():
        r, batch = ranges[name], () if name in part.shared else (0,)
        rows = value if name in part.shared else value[torch.arange(EXAMPLE_ROWS) % len(value)]
        inputs[name] = rows if rows.shape[1:] == r.best[1:] else rows.new_zeros((len(rows), *r.best[1:]))
        dynamic[name] = {axis: torch.export.Dim.DYNAMIC for axis in {*batch, *r.free}} or None
    path, began = folder / f"{part.name}.onnx", time.perf_counter()
    with _stage(part, "tracing", "this module cannot be traced with tensors of dynamic shape"):
        program = torch.export.export(part.module, (), inputs, dynamic_shapes=dynamic, strict=False)
    with _stage(part, "translating to ONNX", "an operation of it has no ONNX form"):
        onnx = torch.onnx.export(
            program, (), kwargs=inputs, dynamo=True, verbose=False, input_names=list(inputs), output_names=[OUTPUT]
        )
    assert onnx is not None, "torch.onnx.export returns the program where no file is given"
    with _stage(part, "writing ONNX", f"{path} could not be written"):
        onnx.save(path, external_data=size_of(part.module) > EXTERNAL)
    shapes = ", ".join(f"{name} {list(r.smallest)}..{list(r.largest)}" for name, r in ranges.items())
    logger.info("%s: ONNX written in %.1f s, %s", part.name, time.perf_counter() - began, shapes)
    return path


def size_of(module: torch.nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(t.nbytes for t in module.state_dict().values() if isinstance(t, Tensor))


@contextmanager
def _stage(part: Part, stage: str, problem: str) -> Iterator[None]:
    """Turn any error of a stage into an ExportError, and silence the exporter."""
    try:
        with ExitStack() as levels, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for noisy in map(logging.getLogger, _NOISY):
                levels.callback(noisy.setLevel, noisy.level)
                noisy.setLevel(logging.ERROR)
            yield
    except Exception as error:  # the exporter has no common base class of errors
        text = " ".join(str(error).split())
        node = _NODE.search(text)
        remedy = "use accelerate('compile') for this model, or fallback='eager' to run this part without an engine"
        found = f"{problem}: {type(error).__name__}: {text[:600]}"
        raise ExportError(part.name, stage, found, remedy, node and node.group(0)) from error
