"""The denoising batch over devices: each has a copy of the network and takes its share of the rows in every tick. Rows do
not depend on one another within a tick, so the result is that of one device; only latents cross.

    shard_denoiser(stream, ["cuda:0", "cuda:1"])

All is launched from the caller's thread, in this order: inputs cross, the other devices' work, the home device's own,
results come back. Launching a network takes about as long as running it unless it is a CUDA graph, so on GPUs this pays
behind `stream.accelerate`. Knows modules, rows and devices; no family. What it knows of a stream is in `shard_denoiser`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from streamflow.acceleration.watch import Watch, version_of
from streamflow.parallel.plan import row_shares
from streamflow.parallel.replicas import Devices, check_memory, check_whole, copied, resolve_devices

Rows = tuple[range, ...]
RESIDENT = 16  # inputs that a device keeps: times, and what the prompts became


class ShardedVelocity(nn.Module):
    """A velocity module, `forward(x, t, **cond)`, on several devices; x and the result lie on the stream's own.

    source: the module that is copied. It is itself the copy of the first device that it lies on. Where its weights are
    written in place the copies are given the new values before the next tick; where its adapters (LoRA) come, go or change,
    RuntimeError asks to shard anew. Writes through `.data` are not seen.
    replicas: one a device. shared: inputs without a batch dimension. pairs: the first half of the rows are the negative
    twins of the second, and a twin stays with its row. Made by `shard_denoiser`.
    """

    def __init__(
        self,
        source: nn.Module,
        replicas: Sequence[nn.Module],
        devices: Sequence[torch.device],
        shared: frozenset[str] = frozenset(),
        pairs: bool = False,
    ):
        super().__init__()
        self.source = source
        self.replicas = nn.ModuleList(replicas)
        self.devices, self.shared, self.pairs = tuple(devices), shared, pairs
        self._resident = [Resident(device) for device in self.devices]
        self._follow = Follow(source, [one for one in replicas if one is not source])

    def over(self, modules: Sequence[nn.Module]) -> nn.Module:
        """The same with these modules called in the copies' place, such as accelerated ones."""
        return _Over(self, modules)

    def inputs_of(self, index: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What one device is given when the whole is called with these inputs, x first; where it would get no row, what the
        first gets, so that every copy can be started."""
        shares = self._shares(len(next(iter(inputs.values()))))
        rows = shares[index] or shares[0]
        return {name: self._there(index, value, name, rows) for name, value in inputs.items()}

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.call(self.replicas, x, t, cond)

    @torch.no_grad()
    def call(self, modules: Sequence[nn.Module], x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The velocity of all rows, each device's share by its module of these."""
        self._follow.update()
        shares = self._shares(len(x))
        busy = [i for i, rows in enumerate(shares) if rows]
        busy.sort(key=lambda i: self.devices[i] == x.device)  # the home device last: its stream carries the others' inputs
        given = {i: _cut(x, shares[i]).to(self.devices[i]) for i in busy}
        parts = {}
        for i in busy:
            resident = {name: self._there(i, value, name, shares[i]) for name, value in cond.items()}
            with _current(self.devices[i]):
                parts[i] = modules[i](given[i], self._there(i, t, "t", shares[i]), **resident)
        v = torch.empty_like(x, dtype=parts[busy[0]].dtype)
        for i in reversed(busy):
            _put(v, shares[i], parts[i])
        return v

    def _shares(self, n: int) -> tuple[Rows, ...]:
        twins = self.pairs and n % 2 == 0  # prompts of several lengths make calls of some of the rows
        return row_shares(n, len(self.devices), twins)

    def _there(self, index: int, value: Tensor, name: str, rows: Rows) -> Tensor:
        return self._resident[index].of(value, None if name in self.shared else rows)


class _Over(nn.Module):
    """A `ShardedVelocity` with other modules in its copies' place."""

    def __init__(self, sharded: ShardedVelocity, modules: Sequence[nn.Module]):
        super().__init__()
        self.sharded, self.replicas = sharded, nn.ModuleList(modules)

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.sharded.call(self.replicas, x, t, cond)


class Resident:
    """Inputs as they lie on one device: a tensor that was sent before, unwritten since, is not sent again."""

    def __init__(self, device: torch.device):
        self.device = device
        self._kept: OrderedDict[tuple, tuple[Tensor, int, Tensor]] = OrderedDict()

    def of(self, value: Tensor, rows: Rows | None) -> Tensor:
        """These rows of a tensor, or all of it, on the device. The tensor is kept with its copy, so that no other one can
        come to have its identity."""
        if value.is_inference():
            return self._sent(value, rows)  # such tensors do not count their changes
        key = id(value), rows
        _, version, sent = self._kept.pop(key, (value, None, None))
        if version != value._version:
            version, sent = value._version, self._sent(value, rows)
        self._kept[key] = value, version, sent
        if len(self._kept) > RESIDENT:
            self._kept.popitem(last=False)
        return sent

    def _sent(self, value: Tensor, rows: Rows | None) -> Tensor:
        return (value if rows is None else _cut(value, rows)).to(self.device)


class Follow:
    """Keeps copies of a module equal to it. Asked before every tick: two list comparisons."""

    def __init__(self, source: nn.Module, copies: Sequence[nn.Module]):
        self._source, self._copies = source, copies
        self._watch = Watch(source)
        self._adapters = self._watch.adapters()
        self._tensors = list(chain(source.parameters(), source.buffers()))
        self._versions = self._now()

    def _now(self) -> list[int | None]:
        return [version_of(t) for t in self._tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Give the copies the values that were written since. RuntimeError where it is not the module that was copied."""
        if self._watch.adapters() != self._adapters:
            raise RuntimeError(
                f"the adapters (LoRA) of this {type(self._source).__name__} have changed since it was copied to other "
                f"devices: call shard_denoiser(stream, devices) again"
            )
        now = self._now()
        if now == self._versions:
            return
        written = [i for i, (a, b) in enumerate(zip(now, self._versions, strict=True)) if a != b]
        for copy in self._copies:
            theirs = list(chain(copy.parameters(), copy.buffers()))
            for i in written:
                theirs[i].copy_(self._tensors[i])
        self._versions = now


def shard_denoiser(stream: Any, devices: Devices = "all") -> ShardedVelocity:
    """Spread a stream's denoising batch over devices, in place; called again, over others. `stream.velocity =
    sharded.source` ends it, and so does assigning `stream.unet`. What accelerates the stream accelerates every copy.

    stream: a `StreamFlow`. devices: "all" (every GPU, or the stream's own device where there is none), or a list such as
        `["cuda:0", "cuda:1"]`, in which a device may come several times.

    Raises:
        TypeError, ValueError: a device that cannot be, an offloaded network. MemoryError: a device has no room, with the
        numbers; the stream is as it was.
    """
    stream.adapter.check_offers("shard_denoiser")
    plain = stream.adapter.velocity
    source = plain.source if isinstance(plain, ShardedVelocity) else plain
    chosen = resolve_devices(devices, stream.device)
    check_whole(source)
    first = chosen.index(stream.device) if stream.device in chosen else None
    check_memory(source, [device for i, device in enumerate(chosen) if i != first])
    replicas = [source if i == first else copied(source, device) for i, device in enumerate(chosen)]
    shared = frozenset(stream.adapter.shared_inputs)
    stream.velocity = sharded = ShardedVelocity(source, replicas, chosen, shared, pairs=stream.cfg_type == "full")
    return sharded


def _cut(value: Tensor, rows: Rows) -> Tensor:
    parts = [value[one.start : one.stop] for one in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _put(v: Tensor, rows: Rows, part: Tensor) -> None:
    start = 0
    for one in rows:
        v[one.start : one.stop].copy_(part[start : start + len(one)])
        start += len(one)


def _current(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
