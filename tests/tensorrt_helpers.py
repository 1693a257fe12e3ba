"""Shared by the tests of TensorRT: onnxruntime in an engine's place, and whether TensorRT for RTX is there to build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from streamflow.acceleration import bind_arguments
from streamflow.acceleration.tensorrt import library

needs_rtx = pytest.mark.skipif(
    bool(library.missing(library.RTX)),
    reason=f"TensorRT for RTX is not installed: {library.command(library.RTX)}",
)


class Onnx(nn.Module):
    """An ONNX file, run by onnxruntime on the CPU: the same calls as an engine."""

    def __init__(self, path: Path):
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]

    def forward(self, *positional: Tensor, **given: Tensor | None) -> Tensor:
        inputs = bind_arguments(self.names, positional, given)
        (out,) = self.session.run(None, {name: inputs[name].numpy() for name in self.names})
        return torch.from_numpy(out)


def resized(inputs: dict[str, Tensor], shared: frozenset[str], rows: int, size: tuple[int, int] | None) -> dict[str, Tensor]:
    """A part's inputs with other rows, and the first one with another height and width, all random but the shared."""
    draw = torch.Generator().manual_seed(rows)
    made = {}
    for i, (name, value) in enumerate(inputs.items()):
        if name in shared:
            made[name] = value
            continue
        shape = (rows, *value.shape[1:]) if i or size is None else (rows, *value.shape[1:-2], *size)
        made[name] = value[torch.arange(rows) % len(value)] if value.dim() == 1 else torch.randn(shape, generator=draw)
    return made
