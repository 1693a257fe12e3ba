"""CUDA graphs: the kernel launches of a module are recorded once and replayed as one. On a fast GPU the launches limit the
eager network at batch 1 to 4. A capture takes seconds. A replay equals the module bit for bit.

`torch.backends.cudnn.benchmark` is not changed. On an H200 the algorithms that it selects for the UNet and the VAEs of
Stable Diffusion 1.5 were no faster (within 1 %; the tiny VAE up to 5 % slower) and changed images in half precision by up
to 0.008, differently in each run.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamflow._validation import whole_number
from streamflow.acceleration import Accelerated, Parts
from streamflow.acceleration.attention import choose_attention
from streamflow.acceleration.side_streams import side_stream
from streamflow.acceleration.watch import Watch

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

logger = logging.getLogger(__name__)
# Torch captures one graph at a time in a process. One thread captures for all, since CUDA's libraries never free some of
# the memory that they allocate for a thread (7 MB on an H200).
CAPTURING = ThreadPoolExecutor(1, thread_name_prefix="streamflow capture")
WARM_UP = 3  # calls before a capture: libraries select kernels and allocate workspaces in the first calls


def require_cuda(device: torch.device) -> None:
    """Raise RuntimeError if the device is not a CUDA device."""
    if device.type != "cuda":
        raise RuntimeError(f"CUDA graphs need a CUDA device and this pipe is on {device}: move it with pipe.to('cuda')")


@dataclass(frozen=True)
class Options:
    """The options of `accelerate("cuda-graph", ...)`.

    limit: the number of shapes that keep a graph; the least recently used is dropped.
    attention: a backend of diffusers for the network (`attention.choose_attention`).
    """

    limit: int = 8
    attention: str | None = None

    def __post_init__(self) -> None:
        whole_number("limit", self.limit, 1)

    def for_device(self, device: torch.device) -> Options:
        """These options. RuntimeError: the device has no CUDA graphs."""
        require_cuda(device)
        return self


def accelerate(parts: Parts, options: Options) -> Accelerated:
    """Each part's module as a `Graphed`. The modules are not changed, except by the option `attention`."""
    for part in parts:
        if not part.capturable:
            raise RuntimeError(
                f"{part.name}: this {type(part.module).__name__} synchronises with its device in every call, so no CUDA "
                f"graph can capture it: use accelerate('compile')"
            )
    modules = {part.name: Graphed(part.module, options.limit) for part in parts}
    if options.attention is None or "velocity" not in modules:
        return Accelerated(modules)
    return Accelerated(modules, choose_attention(parts.velocity.module, options.attention))


Signature = tuple


def signature(inputs: Mapping[str, Tensor | None]) -> Signature:
    """The key of a graph: names, shapes, dtypes and devices of the inputs. TypeError: an input is no tensor and not None."""
    described = []
    for name, value in inputs.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"a CUDA graph takes tensors only, and {name} is a {type(value).__name__}")
        described.append((name, value if value is None else (tuple(value.shape), value.dtype, value.device)))
    return tuple(described)


class Capture:
    """One graph with its own input and output tensors. Each call copies its inputs in and the output out.

    current: the CUDA stream on which the inputs were computed and the graph is replayed. side: the one for the capture.
    """

    @torch.no_grad()
    def __init__(
        self,
        module: Callable[..., Tensor],
        inputs: Mapping[str, Tensor | None],
        pool: _POOL_HANDLE,
        current: torch.cuda.Stream,
        side: torch.cuda.Stream,
    ):
        self._given: dict[str, tuple[Tensor, int]] = {}
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(side.device):
            with torch.cuda.stream(current):
                self.inputs = {name: value if value is None else value.detach().clone() for name, value in inputs.items()}
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    module(**self.inputs)
            current.wait_stream(side)
            # torch's default capture stream is on the first device that was used; this one is on the module's device
            with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.output = module(**self.inputs)

    def replay(self, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """The module's output for these inputs, as a new tensor."""
        for name, value in inputs.items():
            held = self.inputs[name]
            if value is not None and held is not None and not self._holds(name, value):
                held.copy_(value)
        self.graph.replay()
        return self.output.clone()

    def _holds(self, name: str, value: Tensor) -> bool:
        """Whether the last call copied this same tensor, and it has not been written since. A reference to it is kept, so
        that its address is not reused."""
        if value.is_inference():
            return False  # torch does not count the writes to such tensors
        last, self._given[name] = self._given.get(name), (value, value._version)
        return last is not None and last[0] is value and last[1] == value._version


class Graphed(nn.Module):
    """A module whose calls replay a CUDA graph, which is captured in the first call with each `signature`.

    The output is a new tensor. All graphs of one module share a memory pool, so it must not be called on two CUDA streams at
    once. After the module's weights have moved or its adapters have changed (`Watch`), all graphs are captured again. Raises
    what the module raises; torch raises where a module synchronises with the device.
    """

    def __init__(self, module: nn.Module, limit: int = 8):
        super().__init__()
        self.module, self.limit = module, limit
        self._watch = Watch(module)
        self._captures: OrderedDict[Signature, Capture] = OrderedDict()
        self._pool: _POOL_HANDLE | None = None
        self._sides: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def captured(self) -> int:
        """The number of signatures that have a graph."""
        return len(self._captures)

    def forget(self) -> None:
        """Drop all graphs. The next call captures again."""
        self._captures.clear()
        self._pool = None

    def replay_last(self) -> None:
        """Replay the graph of the last call without copies of inputs or output. RuntimeError before the first call."""
        if not self._captures:
            raise RuntimeError("no graph is captured yet: call the module first")
        next(reversed(self._captures.values())).graph.replay()

    @torch.no_grad()
    def forward(self, *positional: Tensor, **named: Tensor | None) -> Tensor:
        inputs = {**{f"{i}": value for i, value in enumerate(positional)}, **named}
        if self._watch.changed():
            logger.info("%s: weights or adapters changed, capturing again", type(self.module).__name__)
            self.forget()
            self._watch.renew()
        key = signature(inputs)
        capture = self._captures.get(key)
        if capture is None:
            capture = self._capture(key, inputs)
        self._captures.move_to_end(key)
        return capture.replay(inputs)

    def _capture(self, key: Signature, inputs: Mapping[str, Tensor | None]) -> Capture:
        while len(self._captures) >= self.limit:
            self._captures.popitem(last=False)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        device = next(value for value in inputs.values() if value is not None).device
        if device not in self._sides:
            self._sides[device] = side_stream(self, device)
        streams = torch.cuda.current_stream(device), self._sides[device]
        capture = CAPTURING.submit(Capture, partial(_call_numbered, self.module), inputs, self._pool, *streams).result()
        self._captures[key] = capture
        logger.info("%s: CUDA graph captured, %d of %d kept", type(self.module).__name__, self.captured, self.limit)
        return capture


def _call_numbered(module: nn.Module, /, **inputs: Tensor | None) -> Tensor:
    """Call a module with the arguments named "0", "1", ... by position and the others by keyword."""
    positional = [value for name, value in inputs.items() if name.isdigit()]
    return module(*positional, **{name: value for name, value in inputs.items() if not name.isdigit()})
