"""One rank streams, the others compute for it: decoding, and rows of the denoising batch, over processes and machines.

    pipe.to(local_device())                                     # every rank loads the same model
    with served({"decoder": stream.codec.decoder}) as remote:   # the other ranks stay in this line until rank 0 is done
        if remote is None:
            return
        stream.codec = Codec.of(remote.decoder, stream.codec.encoder)       # rows of a batch are shared
        for picture in remote.frames("decoder", latents): ...               # or one frame a rank, in order

Launched by torchrun (`torchrun --nproc-per-node 2 script.py`), or by whatever sets RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. Built on torch.distributed alone: gloo between CPUs and for everything that is not a tensor, NCCL between GPUs.

What happens when a rank dies:
- A server's process ends: rank 0 notices with the next message to it, a quarter of `timeout` later if there is none, warns
  with its number, and the others do its work; no picture is lost. A machine that falls silent is noticed after `timeout`.
- The same while tensors are under way by NCCL, a fraction of a millisecond a call: NCCL waits on the GPU for what never
  comes, and after `timeout` torch's watchdog ends the process of rank 0 with a message (its default,
  TORCH_NCCL_ASYNC_ERROR_HANDLING=3). At all other moments it is as with gloo, since NCCL is used only when both ranks have
  said over gloo that they are there.
- Rank 0 ends or falls silent: the servers raise `RankLost`, so their processes end with an error.
- torchrun itself stops every process of its machine when one of them fails. So a rank that dies is replaced by those of
  other machines (or of other torchruns); within one torchrun its death ends the run, with torchrun's report. A torchrun
  whose own processes have finished waits up to five minutes for one that was lost.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn

from streamflow.models.row_by_row import RowByRow
from streamflow.parallel.distributed.remote import Pending, Remote, SharedModule
from streamflow.parallel.distributed.server import serve
from streamflow.parallel.distributed.wire import Link, RankLost
from streamflow.parallel.distributed.workers import Peer

__all__ = ["Pending", "RankLost", "Remote", "SharedModule", "local_device", "served"]

BEATS = 4  # how often within a timeout an idle rank is asked whether it is there


def local_device() -> torch.device:
    """The GPU of this process's LOCAL_RANK, which torchrun sets; the CPU where there is no GPU.

    Raises:
        RuntimeError: there are fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise RuntimeError(f"process {local} of this machine has no GPU, there are {count}: use --nproc-per-node {count}")
    return torch.device("cuda", local)


@contextmanager
def served(
    modules: Mapping[str, nn.Module],
    *,
    shared: frozenset[str] | tuple[str, ...] = (),
    timeout: float = 60.0,
    joining: float = 600.0,
    in_flight: int = 2,
    device: torch.device | str | None = None,
) -> Iterator[Remote | None]:
    """On rank 0, modules whose work the other ranks share. On every other rank: compute for rank 0 until it leaves its
    block, then give None. All ranks come here with the same modules.

    Args:
        modules: by name; each takes tensors and gives one, the batch in the first dimension.
        shared: names of arguments without a batch dimension (an adapter's `shared_inputs`).
        timeout: seconds after which a silent rank counts as lost. Longer than the longest call, its first one, which may
            compile, included: run the modules once before.
        joining: seconds in which all ranks must have come here.
        in_flight: how many calls each of the other ranks has at most, by `submit` and `frames`.
        device: where the modules compute; by default where their weights are.

    The process group is made from the environment and destroyed at the end, unless there is one already. An exception in
    rank 0's block lets the other ranks go too.

    Raises:
        ValueError: a setting that cannot be, no launcher, or the ranks' modules differ in their names or weights.
        RankLost: on the other ranks, when rank 0 is gone without leaving the block.
    """
    _check(modules, timeout, joining, in_flight)
    own = not dist.is_initialized()
    if own:
        _join(joining)
    groups: list[dist.ProcessGroup] = []
    try:
        link = _links(groups, _Self.of(modules, device), timeout, joining)
        if dist.get_rank():
            serve(tuple(modules.values()), link[0])
            yield None
            return
        peers = [Peer(rank, link[rank], timeout / BEATS) for rank in sorted(link)]
        remote = Remote(modules, peers, frozenset(shared), in_flight)
        try:
            yield remote
        finally:
            remote.close()
    finally:
        for group in () if own else groups:
            dist.destroy_process_group(group)
        if own:
            dist.destroy_process_group()


def _check(modules: Mapping[str, nn.Module], timeout: float, joining: float, in_flight: int) -> None:
    if not modules:
        raise ValueError('no modules to serve: give one at least, such as {"decoder": stream.codec.decoder}')
    paired = [name for name, module in modules.items() if isinstance(module, RowByRow) and module.pairs]
    if paired:
        raise ValueError(f"{paired[0]} calls its network by pairs of rows, which shares would part: serve its `velocity`")
    for name, seconds in (("timeout", timeout), ("joining", joining)):
        if not 0 < seconds < float("inf"):
            raise ValueError(f"{name} must be a positive number of seconds, not {seconds!r}")
    if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 1:
        raise ValueError(f"in_flight must be an integer of 1 or more, not {in_flight!r}")


def _join(joining: float) -> None:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is not set, so nothing launched several ranks: "
            f"run this with `torchrun --nproc-per-node 2 ...`"
        )
    dist.init_process_group("gloo", timeout=timedelta(seconds=joining))


@dataclass(frozen=True)
class _Self:
    """What a rank tells of itself. `gpu`: the machine and the GPU's own name, None on a CPU."""

    device: str
    gpu: tuple[str, str] | None
    modules: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], device: torch.device | str | None) -> _Self:
        found = {str(tensor.device) for module in modules.values() for tensor in module.parameters()}
        if device is None and len(found) > 1:
            raise ValueError(f"the modules lie on {', '.join(sorted(found))}: put them on one device, or name it")
        device = torch.device(device or next(iter(found), local_device()))
        gpu = None
        if device.type == "cuda":
            gpu = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
        return cls(str(device), gpu, tuple((name, _fingerprint(module)) for name, module in modules.items()))


def _fingerprint(module: nn.Module) -> str:
    """Of every weight its shape, its dtype and its first values: other weights, other fingerprint."""
    digest = hashlib.sha256()
    for tensor in chain(module.parameters(), module.buffers()):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().reshape(-1)[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _links(groups: list[dist.ProcessGroup], mine: _Self, timeout: float, joining: float) -> dict[int, Link]:
    """This rank's links by the other's rank: rank 0 has one to each, the others one to rank 0. Appends new groups."""
    groups.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=joining)))
    told: list[_Self | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine, group=groups[0])
    for rank, its in enumerate(told):
        if its.modules != told[0].modules:
            raise ValueError(_difference(rank, dict(its.modules), dict(told[0].modules)))
    links, me = {}, dist.get_rank()
    for rank in range(1, len(told)):
        by_nccl = None not in (told[0].gpu, told[rank].gpu) and told[0].gpu != told[rank].gpu
        backend = "cpu:gloo,cuda:nccl" if by_nccl else "gloo"
        group = dist.new_group([0, rank], backend=backend, timeout=timedelta(seconds=timeout))  # all ranks call it
        if me in (0, rank):
            groups.append(group)
            device = torch.device(mine.device)
            other = rank if me == 0 else 0
            links[other] = Link(group, other, device if by_nccl else torch.device("cpu"), device)
    return links


def _difference(rank: int, its: Mapping[str, str], first: Mapping[str, str]) -> str:
    if list(its) != list(first):
        return f"rank {rank} serves {', '.join(its)}, rank 0 {', '.join(first)}: the same modules in the same order, please"
    other = next(name for name in its if its[name] != first[name])
    return f"the weights of {other!r} on rank {rank} are not those of rank 0: load the same model in the same dtype"
