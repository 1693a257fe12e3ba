"""The denoising batch on several devices: each has a copy of the network and computes its share of the rows in every step.
Rows do not depend on one another within a step, so the result is that of one device, and only latents cross.

    shard_denoiser(stream, ["cuda:0", "cuda:1"])

Everything is launched from the caller's thread, in this order: copies of the inputs, the networks of the other devices, the
network of the home device, copies of the results. To launch a network takes about as long as to run it, unless it is a CUDA
graph, so on GPUs use it with `stream.accelerate`. Knows modules, rows and devices; of a stream, what `shard_denoiser` uses.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from streamflow.acceleration.watch import Watch, version_of
from streamflow.parallel.plan import row_shares
from streamflow.parallel.replicas import Devices, check_memory, check_not_offloaded, copy_to, current, resolve_devices

if TYPE_CHECKING:
    from streamflow.pipeline import StreamFlow

Copies = TypeVar("Copies", bound="NetworkCopies")
Rows = tuple[range, ...]
CACHED_INPUTS = 16  # inputs that a device keeps: timesteps and prompt embeddings


class NetworkCopies(nn.Module):
    """A velocity module, `forward(x, t, **cond)`, and its copies on several devices.

    Weights of `source` that are written in place are copied to the replicas before the next step, except by writes through
    `.data`, which torch does not count. After a change of its adapters (LoRA), a call raises RuntimeError.

    made_by: the call of this package that makes it.

    Args:
        source: the module that was copied. It is also the replica of the first device that equals its own.
        replicas: one for each device.
        devices: of the replicas.
    """

    made_by: ClassVar[str]

    def __init__(self, source: nn.Module, replicas: Sequence[nn.Module], devices: Sequence[torch.device]):
        super().__init__()
        self.source, self.replicas, self.devices = source, nn.ModuleList(replicas), tuple(devices)
        self._weights = WeightSync(source, [one for one in replicas if one is not source], self.made_by)

    def with_replicas(self: Copies, modules: Sequence[nn.Module]) -> Copies:
        """The same, with these modules in the place of the replicas, such as accelerated ones."""
        other = copy.copy(self)
        other._modules = {"source": self.source, "replicas": nn.ModuleList(modules)}
        return other

    def inputs_of(self, index: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of one replica, on its device, for a call with these inputs, x first."""
        raise NotImplementedError


class ShardedVelocity(NetworkCopies):
    """A network whose rows are shared by the devices. Made by `shard_denoiser`. x and the result are on the stream's device.

    Args:
        source, replicas, devices: as `NetworkCopies`.
        shared: names of inputs without a batch dimension.
        pairs: the first half of the rows are the negative prompts of the second half. Such a pair stays on one device.
    """

    made_by = "shard_denoiser(stream, devices)"

    def __init__(
        self,
        source: nn.Module,
        replicas: Sequence[nn.Module],
        devices: Sequence[torch.device],
        shared: frozenset[str] = frozenset(),
        pairs: bool = False,
    ):
        super().__init__(source, replicas, devices)
        self.shared, self.pairs = shared, pairs
        self._inputs = [InputCache(device) for device in self.devices]

    def inputs_of(self, index: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of one device, on it, for a call with these inputs, x first. A device without rows gets those of the
        first one, so that every copy can be compiled."""
        shares = self._shares(len(next(iter(inputs.values()))))
        rows = shares[index] or shares[0]
        return {name: self._input(index, value, name, rows) for name, value in inputs.items()}

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self._weights.update()
        shares = self._shares(len(x))
        busy = [i for i, rows in enumerate(shares) if rows]
        busy.sort(key=lambda i: self.devices[i] == x.device)  # the home device last: its stream copies the others' inputs
        latents = {i: _cut(x, shares[i]).to(self.devices[i]) for i in busy}
        parts = {}
        for i in busy:
            inputs = {name: self._input(i, value, name, shares[i]) for name, value in cond.items()}
            with current(self.devices[i]):
                parts[i] = self.replicas[i](latents[i], self._input(i, t, "t", shares[i]), **inputs)
        v = torch.empty_like(x, dtype=parts[busy[0]].dtype)
        for i in reversed(busy):
            _put(v, shares[i], parts[i])
        return v

    def _shares(self, n: int) -> tuple[Rows, ...]:
        pairs = self.pairs and n % 2 == 0  # with prompts of several lengths, a call has some of the rows only
        return row_shares(n, len(self.devices), pairs)

    def _input(self, index: int, value: Tensor, name: str, rows: Rows) -> Tensor:
        return self._inputs[index].get(value, None if name in self.shared else rows)


class InputCache:
    """Inputs on one device. A tensor that was copied there before, and not written to since, is not copied again."""

    def __init__(self, device: torch.device):
        self.device = device
        self._kept: OrderedDict[tuple, tuple[Tensor, int, Tensor]] = OrderedDict()

    def get(self, value: Tensor, rows: Rows | None) -> Tensor:
        """These rows of a tensor, or all of it, on the device. The tensor is kept with its copy, so that its `id` stays its
        own."""
        if value.is_inference():
            return self._copy(value, rows)  # such tensors have no version
        key = id(value), rows
        kept = self._kept.pop(key, None)
        if kept is None or kept[1] != value._version:
            kept = value, value._version, self._copy(value, rows)
        self._kept[key] = kept
        if len(self._kept) > CACHED_INPUTS:
            self._kept.popitem(last=False)
        return kept[2]

    def _copy(self, value: Tensor, rows: Rows | None) -> Tensor:
        return (value if rows is None else _cut(value, rows)).to(self.device)


class WeightSync:
    """Keeps copies of a module equal to it. It runs before every step, and costs two list comparisons."""

    def __init__(self, source: nn.Module, copies: Sequence[nn.Module], made_by: str):
        self._source, self._copies, self._made_by = source, copies, made_by
        self._watch = Watch(source)
        self._adapters = self._watch.adapters()
        self._tensors = list(chain(source.parameters(), source.buffers()))
        self._versions = [version_of(t) for t in self._tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Copy the weights that were written to. RuntimeError where the adapters of the module have changed."""
        if self._watch.adapters() != self._adapters:
            raise RuntimeError(
                f"the adapters (LoRA) of this {type(self._source).__name__} have changed since it was copied to other "
                f"devices: call {self._made_by} again"
            )
        now = [version_of(t) for t in self._tensors]
        if now == self._versions:
            return
        self._wait()  # no copy may be in use
        written = [i for i, (a, b) in enumerate(zip(now, self._versions, strict=True)) if a != b]
        for one in self._copies:
            theirs = list(chain(one.parameters(), one.buffers()))
            for i in written:
                theirs[i].copy_(self._tensors[i])
        self._wait()
        self._versions = now

    def _wait(self) -> None:
        """Wait for all GPUs that have a copy."""
        for device in {t.device for one in (self._source, *self._copies) for t in one.parameters()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


def shard_denoiser(stream: StreamFlow, devices: Devices = "all") -> ShardedVelocity:
    """Share the rows of a stream's denoising batch between devices, in place. `stream.accelerate` then accelerates every
    copy. Call it again for other devices; `stream.velocity = sharded.source`, or assigning `stream.unet`, ends it.

    Args:
        stream: a `StreamFlow`.
        devices: "all" (every GPU, or the stream's own device where there is none), or a list such as `["cuda:0", "cuda:1"]`.
            A device may occur several times.

    Raises:
        TypeError, ValueError: a device is unknown or missing, or the network is offloaded.
        MemoryError: a device has too little free memory, with the numbers. The stream stays as it was.
    """
    stream.adapter.check_offers("shard_denoiser")
    shared = frozenset(stream.adapter.shared_inputs)
    sharded = ShardedVelocity(*copy_network(stream, devices), shared, pairs=stream.cfg_type == "full")
    stream.velocity = sharded
    return sharded


def copy_network(stream: StreamFlow, devices: Devices) -> tuple[nn.Module, list[nn.Module], tuple[torch.device, ...]]:
    """A stream's network, a replica of it for each of these devices, and the devices: the arguments of `NetworkCopies`. The
    network itself is the replica of the first device that is the stream's. Raises as `shard_denoiser`."""
    plain = stream.adapter.velocity
    source = plain.source if isinstance(plain, NetworkCopies) else plain
    chosen = resolve_devices(devices, stream.device)
    check_not_offloaded(source)
    first = chosen.index(stream.device) if stream.device in chosen else None
    check_memory(source, [device for i, device in enumerate(chosen) if i != first])
    return source, [source if i == first else copy_to(source, device) for i, device in enumerate(chosen)], chosen


def _cut(value: Tensor, rows: Rows) -> Tensor:
    parts = [value[one.start : one.stop] for one in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _put(v: Tensor, rows: Rows, part: Tensor) -> None:
    for one, values in zip(rows, part.split([len(one) for one in rows]), strict=True):
        v[one.start : one.stop].copy_(values)
