"""Rank 0 streams, and every rank computes a share of the rows: processes of torchrun, on one machine or several.

    with served({"velocity": stream.velocity}) as remote:  # every rank has loaded the same model
        if remote is None:                                 # the other ranks, after rank 0 has left its block
            return
        stream.velocity = remote.velocity

There is no failover: a lost rank ends the run with an error that names it. `streamflow.parallel.ray_actors` has failover.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from streamflow.parallel.plan import shares
from streamflow.parallel.replicas import current
from streamflow.parallel.trees import batch_size, join_rows, list_tensors, map_tensors, rows_of_call

if TYPE_CHECKING:
    from streamflow.models.protocols import Function


class RankLost(RuntimeError):
    """Another rank has ended, or did not answer within the timeout."""


def local_device() -> torch.device:
    """The GPU of torchrun's LOCAL_RANK, or the CPU where there is no GPU. RuntimeError: fewer GPUs than processes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise RuntimeError(f"process {local} of this machine has no GPU, there are {count}: use --nproc-per-node {count}")
    return torch.device("cuda", local)


@dataclass(frozen=True)
class _Link:
    """Carries values between ranks: tensors by `data`, which is NCCL between GPUs, and all else by `control`, gloo."""

    control: dist.ProcessGroup
    data: dist.ProcessGroup
    device: torch.device

    def send(self, value: object, rank: int) -> None:
        """Send tensors, in any tuples and dicts, to a rank."""
        layout = map_tensors(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), value)
        _transfer(dist.send_object_list, [layout], rank, self.control)
        for tensor in list_tensors(value):
            _transfer(dist.send, tensor.to(self.device).contiguous(), rank, self.data)

    def receive(self, rank: int) -> Any:
        """Wait for the next value from a rank."""
        received: list[object] = [None]
        _transfer(dist.recv_object_list, received, rank, self.control)
        value = map_tensors(lambda t: torch.empty(t.shape, dtype=t.dtype, device=self.device), received[0])
        for tensor in list_tensors(value):
            _transfer(dist.recv, tensor, rank, self.data)
        return value


def _transfer(act: Function, payload: object, rank: int, group: dist.ProcessGroup) -> None:
    if isinstance(payload, Tensor):
        if not payload.numel():
            return
        payload = payload.view(-1).view(torch.uint8)  # the dtype that every backend carries
    try:
        act(payload, rank, group=group)
    except RuntimeError as error:  # gloo raises it itself, and it is the base class of torch.distributed's errors
        message = f"rank {rank} is lost: it has ended, or did not answer in time. Read its output and start all ranks again"
        raise RankLost(message) from error


class SharedModule(nn.Module):
    """Used on rank 0 in the place of `local`: each rank computes a share of the rows; the result is whole and in order."""

    def __init__(self, name: str, local: nn.Module, link: _Link, shared: Collection[str]):
        super().__init__()
        self.name, self.local, self._link, self._shared = name, local, link, shared

    @torch.no_grad()
    def forward(self, *args: object, **kwargs: object) -> Any:
        own, *others = shares(batch_size(args), dist.get_world_size())
        ranks = [rank for rank, rows in enumerate(others, 1) if rows]
        for rank in ranks:
            self._link.send((self.name, *rows_of_call(args, kwargs, others[rank - 1], self._shared)), rank)
        args, kwargs = rows_of_call(args, kwargs, own, self._shared)
        return join_rows([self.local(*args, **kwargs), *(self._link.receive(rank) for rank in ranks)])


@contextmanager
def served(
    modules: Mapping[str, nn.Module], *, shared: Collection[str] = (), timeout: float = 600.0
) -> Iterator[nn.ModuleDict | None]:
    """On rank 0, a `SharedModule` for each module, such as `remote.decoder`. Every other rank computes for rank 0 until rank
    0 leaves the block, then gets None. The process group is made from the environment unless there is one.

    Args:
        modules: the same on all ranks, by name. They take tensors whose first dimension is the batch.
        shared: names of arguments without a batch dimension, such as an adapter's `shared_inputs`.
        timeout: seconds after which a silent rank is lost. Calls, and the time between two calls, must be shorter.

    Raises:
        ValueError: a bad setting, no launcher, or modules that differ between the ranks.
        RankLost: another rank has ended or is silent. An exception on one rank ends the run on all of them.
    """
    _check(modules, timeout)
    limit, own = timedelta(seconds=timeout), not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=limit)
    device = next((p.device for module in modules.values() for p in module.parameters()), torch.device("cpu"))
    control = _new_group("gloo", limit)
    data = _new_group("nccl", limit) if device.type == "cuda" else control
    link = _Link(control, data, device)
    try:
        _check_same(modules, control)
        if dist.get_rank():
            with torch.no_grad(), current(device):
                while (call := link.receive(0)) is not None:
                    name, args, kwargs = call
                    link.send(modules[name](*args, **kwargs), 0)
            yield None
            return
        yield nn.ModuleDict({name: SharedModule(name, module, link, shared) for name, module in modules.items()})
        for rank in range(1, dist.get_world_size()):
            link.send(None, rank)
    finally:
        for group in dict.fromkeys((data, control)):
            dist.destroy_process_group(group)
        if own:
            dist.destroy_process_group()


def _new_group(backend: str, timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "a group of all ranks has this one"
    return group


def _check(modules: Mapping[str, nn.Module], timeout: float) -> None:
    if not modules or not 0 < timeout < float("inf"):
        raise ValueError(f"pass one module or more and a timeout above 0 s, not {list(modules)} and {timeout!r}")
    if paired := [name for name, module in modules.items() if getattr(module, "pairs", False)]:
        raise ValueError(f"{paired[0]} computes rows in pairs, which shares would separate: serve its `velocity`")
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and not dist.is_initialized():
        raise ValueError(f"{', '.join(missing)} is not set: start this script with `torchrun --nproc-per-node 2 ...`")


def _check_same(modules: Mapping[str, nn.Module], group: dist.ProcessGroup) -> None:
    """ValueError where the modules of a rank, or the first values of their weights, are not those of rank 0."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, {name: _first_values(module) for name, module in modules.items()}, group=group)
    for rank, found in enumerate(every):
        if other := [name for name in {**every[0], **found} if found.get(name) != every[0].get(name)]:
            raise ValueError(f"{other[0]} on rank {rank} is not as on rank 0: serve the same names, weights and dtype")


def _first_values(module: nn.Module) -> str:
    return str([(t.shape, t.dtype, t.reshape(-1)[:16].float().tolist()) for t in module.state_dict().values()])
