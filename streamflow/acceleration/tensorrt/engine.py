"""A finished engine as an nn.Module: tensors in, a tensor out, on torch's current stream, without copies where the caller's
tensors lie as the engine reads them. Needs a GPU; what it computes is not its business (`check` compares)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamflow.acceleration.tensorrt.errors import EngineError
from streamflow.acceleration.tensorrt.export import OUTPUT
from streamflow.acceleration.tensorrt.library import Library
from streamflow.acceleration.tensorrt.profile import Profile

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
ALIGNMENT = 256  # bytes, of addresses that TensorRT takes
_REBUILD = "give rebuild=True to accelerate('tensorrt'): an engine is for one GPU and one version of TensorRT"


def named(names: Iterable[str], positional: tuple[Tensor, ...], given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Arguments by name. Those given as None count as not given."""
    inputs = dict(zip(names, positional, strict=False))
    return {**inputs, **{name: value for name, value in given.items() if value is not None}}


class EngineModule(nn.Module):
    """One engine with one execution context, bound to one device; not to be called by two threads at once.

    `forward` takes the part's inputs by position or name and returns a new tensor, the caller's to keep.

    Raises:
        EngineError: TensorRT does not load these bytes, or did not run. OutsideProfile: shapes it was not built for.
    """

    def __init__(self, data: bytes, profile: Profile, library: Library, device: torch.device):
        super().__init__()
        self.profile, self.library, self.device = profile, library, device
        library.messages.errors()
        with torch.cuda.device(device):
            self._runtime = library.trt.Runtime(library.messages)
            self._engine = self._runtime.deserialize_cuda_engine(data)
            if self._engine is None:
                raise self._error("loading", "these bytes are not an engine for this GPU", _REBUILD)
            self._context = self._make_context()
            if self._context is None:
                raise self._error("loading", "no execution context", "free memory on the GPU: it needs room for activations")
            self._side = torch.cuda.Stream(device)
        there = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        self._reads = [name for name in profile.ranges if name in there]  # TensorRT drops inputs that nothing depends on
        self.dtypes = {name: self._dtype(name) for name in (*self._reads, OUTPUT)}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._out: tuple[int, ...] = ()

    def _make_context(self) -> Any:
        """With all kernels made before the first call, so that a CUDA graph captures the final ones."""
        if not self.library.is_rtx:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        strategies = self.library.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return self._engine.create_execution_context(config)

    @torch.no_grad()
    def forward(self, *positional: Tensor, **given: Tensor | None) -> Tensor:
        inputs = named(self.profile.ranges, positional, given)
        self.profile.check(inputs)
        with torch.cuda.device(self.device):
            held = {name: self._readable(name, inputs[name]) for name in self._reads}
            self._set_shapes(held)
            out = torch.empty(self._out, dtype=self.dtypes[OUTPUT], device=self.device)
            for name, value in (*held.items(), (OUTPUT, out)):
                self._context.set_tensor_address(name, value.data_ptr())
            with self._stream() as stream:
                done = self._context.execute_async_v3(stream.cuda_stream)
        if not done:
            raise self._error("running", "TensorRT refused the call", "use accelerate('compile'), and report this")
        return out

    def _readable(self, name: str, value: Tensor) -> Tensor:
        """The caller's own tensor where the engine can read it, else a copy."""
        if value.device != self.device:
            raise self._error("running", f"{name} is on {value.device}, the engine on {self.device}", "move it there")
        value = value.to(self.dtypes[name]).contiguous()
        return value.clone() if value.data_ptr() % ALIGNMENT else value

    def _set_shapes(self, inputs: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        if shapes == self._shapes:
            return
        for name, shape in shapes.items():
            self._context.set_input_shape(name, shape)
        if unset := self._context.infer_shapes():
            raise self._error("running", f"no shape for {', '.join(unset)}", _REBUILD)
        self._shapes, self._out = shapes, tuple(self._context.get_tensor_shape(OUTPUT))

    @contextmanager
    def _stream(self) -> Iterator[torch.cuda.Stream]:
        """Torch's current stream; in place of the default one, on which TensorRT would wait for the whole device, one
        beside it that comes after all before and before all after."""
        current = torch.cuda.current_stream(self.device)
        if current != torch.cuda.default_stream(self.device):
            yield current
            return
        self._side.wait_stream(current)
        yield self._side
        current.wait_stream(self._side)

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise self._error("loading", f"{name} is {dtype}, which torch does not have", _REBUILD)
        return _DTYPES[dtype]

    def _error(self, stage: str, what: str, remedy: str) -> EngineError:
        said = "; ".join([what, *self.library.messages.errors()])
        return EngineError(self.profile.part, stage, said[:1500], remedy)
