"""An engine as an nn.Module, and its comparison with the plain module, by PSNR, before it is used.

Polygraphy's TrtRunner is for debugging: it waits for the device in every call, on a CUDA stream of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from streamflow._decibels import decibels
from streamflow.acceleration import Part, bind_arguments
from streamflow.acceleration.errors import EngineError, EngineMismatch
from streamflow.acceleration.onnx_export import OUTPUT
from streamflow.acceleration.side_streams import side_stream
from streamflow.acceleration.tensorrt.library import RTX, Library
from streamflow.acceleration.tensorrt.options import Profile

CALLS = 8  # that are compared
ALIGNMENT = 256  # bytes: the alignment that TensorRT needs
_REBUILD = "pass rebuild=True to accelerate('tensorrt'): an engine is for one GPU and one version of TensorRT"


class EngineModule(nn.Module):
    """One engine with one execution context on one CUDA device. It reads the caller's tensors in place and runs in the order
    of torch's current CUDA stream. Not to be called by two threads at once.

    `forward` takes the part's inputs by position or name. Its output is a new tensor.

    Raises:
        EngineError: TensorRT cannot load or run the engine. OutsideProfile: shapes that it was not built for.
    """

    def __init__(self, data: bytes, profile: Profile, library: Library, device: torch.device):
        from polygraphy.backend.trt import engine_from_bytes  # type: ignore[attr-defined]  # made at run time
        from polygraphy.datatype import DataType
        from polygraphy.exception import PolygraphyException

        super().__init__()
        self.profile, self.library, self.device = profile, library, device
        with torch.cuda.device(device), library.quiet():
            try:
                self._engine = engine_from_bytes(data)
            except PolygraphyException as error:
                raise self._error("loading", "these bytes are not an engine for this GPU", _REBUILD) from error
            configs = []
            if library.kind == RTX:  # compile all kernels before the first call: a CUDA graph must capture the final ones
                configs = [self._engine.create_runtime_config()]
                strategy = library.trt.DynamicShapesKernelSpecializationStrategy.EAGER
                configs[0].dynamic_shapes_kernel_specialization_strategy = strategy
            self._context = self._engine.create_execution_context(*configs)
        if self._context is None:
            raise self._error("loading", "no execution context", "free memory on the GPU: it needs room for activations")
        self._side = side_stream(self, device)
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        self._reads = [name for name in profile.ranges if name in names]  # TensorRT drops unused inputs
        types = {name: DataType.from_dtype(self._engine.get_tensor_dtype(name)) for name in (*self._reads, OUTPUT)}
        self.dtypes = {name: DataType.to_dtype(dtype, "torch") for name, dtype in types.items()}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._output_shape: tuple[int, ...] = ()

    @torch.no_grad()
    def forward(self, *positional: Tensor, **keyword: Tensor | None) -> Tensor:
        inputs = bind_arguments(self.profile.ranges, positional, keyword)
        self.profile.check(inputs)
        with torch.cuda.device(self.device):
            tensors = {name: self._readable(name, inputs[name]) for name in self._reads}
            self._set_shapes({name: tuple(value.shape) for name, value in tensors.items()})
            tensors[OUTPUT] = torch.empty(self._output_shape, dtype=self.dtypes[OUTPUT], device=self.device)
            for name, value in tensors.items():
                self._context.set_tensor_address(name, value.data_ptr())
            current = torch.cuda.current_stream(self.device)
            # TensorRT would synchronise the whole device on the default stream
            stream = self._side if current == torch.cuda.default_stream(self.device) else current
            stream.wait_stream(current)
            done = self._context.execute_async_v3(stream.cuda_stream)
            current.wait_stream(stream)
        if not done:
            raise self._error("running", "TensorRT refused the call", "use accelerate('compile'), and report this")
        return tensors[OUTPUT]

    def _readable(self, name: str, value: Tensor) -> Tensor:
        """The tensor itself if the engine can read it, else a copy."""
        if value.device != self.device:
            raise self._error("running", f"{name} is on {value.device}, the engine on {self.device}", "move it there")
        value = value.to(self.dtypes[name]).contiguous()
        return value.clone() if value.data_ptr() % ALIGNMENT else value

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes == self._shapes:
            return
        for name, shape in shapes.items():
            self._context.set_input_shape(name, shape)
        if unset := self._context.infer_shapes():
            raise self._error("running", f"no shape for {', '.join(unset)}", _REBUILD)
        self._shapes, self._output_shape = shapes, tuple(self._context.get_tensor_shape(OUTPUT))

    def _error(self, stage: str, problem: str, remedy: str) -> EngineError:
        return EngineError(self.profile.part, stage, self.library.explain(problem), remedy)


# -- comparing -----------------------------------------------------------------------------------------------------------


class Trial:
    """A comparison by PSNR over `calls` calls. It does not wait for the device before `verdict`."""

    def __init__(self, part: str, tolerance_db: float, calls: int = CALLS):
        self.part, self.tolerance_db, self.calls = part, tolerance_db, calls
        self._powers: list[Tensor] = []

    @property
    def done(self) -> bool:
        """Whether enough calls have been compared."""
        return len(self._powers) >= self.calls

    def add(self, got: Tensor, expected: Tensor) -> None:
        """Compare one call: the mean square error over the squared range (largest minus smallest value) of `expected`.
        Infinite if the shapes differ or `got` is not finite."""
        if got.shape != expected.shape:
            self._powers.append(torch.tensor(math.inf))
            return
        got, expected = got.float(), expected.float()
        peak = (expected.max() - expected.min()).clamp(min=torch.finfo(torch.float32).tiny)
        self._powers.append(((got - expected) / peak).square().mean().nan_to_num(math.inf, math.inf))

    def verdict(self) -> float:
        """The lowest PSNR of the calls, in dB. EngineMismatch, with all of them, if it is below the tolerance."""
        found = [decibels(power.item()) for power in self._powers]
        if (worst := min(found)) < self.tolerance_db:
            listed = ", ".join(f"{db:.1f}" for db in found)
            problem = f"PSNR {worst:.1f} dB of {len(found)} calls ({listed}), {self.tolerance_db} wanted"
            remedy = "use accelerate('compile'), or pass a lower tolerance_db if the difference is acceptable"
            raise EngineMismatch(part=self.part, stage="comparing", problem=problem, remedy=remedy)
        return worst


def varied(part: Part, profile: Profile, k: int) -> dict[str, Tensor]:
    """The inputs of call k: the part's own for 0, else with another batch in the profile, other rows and added noise. One
    number per row (a time, a weight) is made smaller instead, so that it keeps its meaning."""
    inputs = dict(part.inputs)
    for i, (name, value) in enumerate(part.inputs.items()):
        if name in part.shared or k == 0:
            continue
        batch = (len(value), profile.ranges[name].smallest[0], profile.ranges[name].largest[0])[k % 3]
        inputs[name] = rows = value[(torch.arange(batch, device=value.device) + k) % len(value)]
        if value.dim() == 1 and value.is_floating_point():
            inputs[name] = rows * (1 - k % 8 / 16)
        elif value.is_floating_point():
            noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1000 * i + k)).to(rows.device)
            scale = rows.float().std().nan_to_num(0.0)
            inputs[name] = (rows.float() + noise * torch.where(scale > 0, scale / 4, 1.0)).to(rows.dtype)
    return inputs


@torch.no_grad()
def compare(part: Part, profile: Profile, engine: nn.Module, tolerance_db: float) -> float:
    """The lowest PSNR of `CALLS` varied calls. EngineMismatch if it is below the tolerance."""
    trial = Trial(part.name, tolerance_db)
    for k in range(CALLS):
        inputs = varied(part, profile, k)
        trial.add(engine(**inputs), part.module(**inputs))
    return trial.verdict()
