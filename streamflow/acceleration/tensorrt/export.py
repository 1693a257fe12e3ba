"""A part to ONNX. Two stages, traced by torch.export and translated by torch.onnx, in the module's own dtype, with the
batch free, and height and width where the profile says so. Knows no TensorRT and no family."""

from __future__ import annotations

import gc
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamflow.acceleration import Part
from streamflow.acceleration.tensorrt.errors import ExportError, MissingTensorRT, NotExportable
from streamflow.acceleration.tensorrt.library import RTX, command
from streamflow.acceleration.tensorrt.profile import Profile

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when what is exported changes: engines made before are then built anew
OUTPUT = "output"
ROWS = 3  # rows of the example: 1 would be taken for a constant, and few other sizes are 3
EXTERNAL = 2**30  # bytes of weights above which they go beside the file: a protobuf holds 2 GiB

_NODE = re.compile(r"(%\w+|target=\S+|aten[.:]+[\w.]+)")


def check_exportable(part: Part) -> None:
    """NotExportable, by name, for a module that takes more than tensors."""
    if not part.exportable:
        raise NotExportable(
            *(part.name, "before export", f"{type(part.module).__name__} takes Python lists or has no ONNX form"),
            "use accelerate('cuda-graph') or accelerate('compile')",
        )


@torch.no_grad()
def export(part: Part, profile: Profile, folder: Path) -> Path:
    """Write `folder/<part>.onnx`, weights beside it where they are large. Inputs keep their names, the output is "output".

    Raises:
        NotExportable, ExportError: with the stage, and the node where torch names one. MissingTensorRT: no onnx.
    """
    check_exportable(part)
    _require_onnx()
    inputs = example(part, profile)
    path = folder / f"{part.name}.onnx"
    began = time.perf_counter()
    with progress(f"{part.name} to ONNX", 3) as step, _without_collector():
        with _stage(part, "tracing", "this module cannot be traced with tensors of free sizes"):
            program = torch.export.export(part.module, (), dict(inputs), dynamic_shapes=_free(part, profile), strict=False)
        step()
        with _stage(part, "translating to ONNX", "an operation of it has no ONNX form"):
            onnx = torch.onnx.export(
                *(program, (), None),
                **{"kwargs": dict(inputs), "dynamo": True, "verbose": False},
                **{"input_names": list(inputs), "output_names": [OUTPUT]},
            )
        step()
        with _stage(part, "writing ONNX", f"{path} could not be written"):
            onnx.save(path, external_data=size_of(part.module) > EXTERNAL)
        step()
    logger.info("%s: ONNX written in %.1f s, %s", part.name, time.perf_counter() - began, described(profile))
    return path


def example(part: Part, profile: Profile) -> dict[str, Tensor]:
    """The part's inputs with `ROWS` rows and the profile's best sizes: what is traced."""
    inputs = {}
    for name, value in part.inputs.items():
        value = value if name in part.shared else value[torch.arange(ROWS) % len(value)]
        best = profile.ranges[name].best
        inputs[name] = value if value.shape[1:] == best[1:] else value.new_zeros((len(value), *best[1:]))
    return inputs


def size_of(module: torch.nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(t.numel() * t.element_size() for t in module.state_dict().values() if isinstance(t, Tensor))


def described(profile: Profile) -> str:
    """A profile in a line of the log."""
    return ", ".join(f"{name} {list(r.smallest)}..{list(r.largest)}" for name, r in profile.ranges.items())


@contextmanager
def progress(title: str, steps: int) -> Iterator[Any]:
    """A bar on a terminal, nothing elsewhere; yields what moves it on."""
    from tqdm import tqdm

    with tqdm(desc=title, total=steps, disable=None, leave=False) as bar:
        yield bar.update


@contextmanager
def _without_collector() -> Iterator[None]:
    """Tracing makes objects by the million and few of them are garbage: looking for it takes a fifth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _free(part: Part, profile: Profile) -> Mapping[str, Mapping[int, Any] | None]:
    free = {}
    for name, r in profile.ranges.items():
        batch = () if name in part.shared else (0,)
        free[name] = {axis: torch.export.Dim.DYNAMIC for axis in sorted({*batch, *r.free})} or None
    return free


@contextmanager
def _stage(part: Part, stage: str, what: str) -> Iterator[None]:
    """Turn whatever fails in a stage into an ExportError that says where. Chatter of the exporter is kept out."""
    chatter = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [noisy.level for noisy in chatter]
    try:
        for noisy in chatter:
            noisy.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the exporter raises exceptions of many kinds; each is told on
        text = " ".join(str(error).split())
        found = _NODE.search(text)
        raise ExportError(
            *(part.name, stage, f"{what}: {type(error).__name__}: {text[:600]}"),
            "use accelerate('compile') for this model, or fallback='eager' to run this part plainly; torch's own words "
            "on it are above (it is the cause of this error)",
            found and found.group(0),
        ) from error
    finally:
        for noisy, level in zip(chatter, levels, strict=True):
            noisy.setLevel(level)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingTensorRT(f"export needs onnx and onnxscript: {error}. Run {command(RTX)}") from error
