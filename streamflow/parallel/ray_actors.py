"""A module on Ray actors, on the GPUs or CPU cores of one machine or of a cluster: `pip install 'streamflow-rf[ray]'`.

    ray.init()                                            # or ray.init(address="auto") in a cluster
    stream.codec = Codec.of(RayModule(stream.codec.decoder, actors=4), stream.codec.encoder)

Failover is Ray's alone: it starts an ended actor again, on another machine where necessary, and repeats its calls.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamflow.parallel.plan import shares
from streamflow.parallel.replicas import check_not_offloaded, copy_to
from streamflow.parallel.trees import batch_size, join_rows, map_tensors, rows_of_call

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments, Call


class _Actor:
    """A copy of the module, on the GPU that Ray assigned to this process, or on the CPU."""

    def __init__(self, module: nn.Module):
        import ray

        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self.module = module.to(self.device)

    @torch.no_grad()
    def call(self, args: tuple, kwargs: Call) -> object:
        args, kwargs = map_tensors(lambda t: t.to(self.device), (args, kwargs))
        return map_tensors(lambda t: t.cpu(), self.module(*args, **kwargs))


class RayModule(nn.Module):
    """Used in the place of a module. A call computes a share of its rows on each actor; the result is whole and in order.
    The actors end when nothing refers to the module any more.

    Args:
        module: what every actor copies. Pickle must be able to copy it, so it is not compiled.
        num_gpus: GPUs of each actor: 1, a fraction, or 0 to compute on the CPU.
        restarts: how often Ray restarts an actor, and repeats a call; -1: without limit.
        shared: names of arguments without a batch dimension.

    Raises:
        ValueError: the cluster has too few GPUs or CPU cores, or the module is offloaded. ImportError: Ray is not installed.
    """

    def __init__(
        self, module: nn.Module, actors: int, *, num_gpus: float = 1, restarts: int = 3, shared: Collection[str] = ()
    ):
        super().__init__()
        try:
            import ray
        except ImportError as error:
            raise ImportError("RayModule needs Ray: pip install 'streamflow-rf[ray]'") from error
        check_not_offloaded(module)
        gpus, cores = (ray.cluster_resources().get(name, 0) for name in ("GPU", "CPU"))
        if not 1 <= actors <= cores or actors * num_gpus > gpus:
            raise ValueError(
                f"{actors} actors with 1 CPU core and {num_gpus:g} GPUs each do not fit: Ray has {cores:g} cores and "
                f"{gpus:g} GPUs. Pass fewer actors, or num_gpus=0 to compute on the CPU"
            )
        actor = ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=restarts, max_task_retries=restarts)(_Actor)
        self._module = ray.put(copy_to(module, torch.device("cpu")))  # kept: an actor that starts again reads it
        self._actors = [actor.remote(self._module) for _ in range(actors)]
        self._next, self._shared = cycle(self._actors), shared
        ray.get([one.__ray_ready__.remote() for one in self._actors])

    @property
    def lanes(self) -> int:
        """How many calls are computed at once, one for each actor."""
        return len(self._actors)

    def forward(self, *args: Tensor, **kwargs: object) -> object:
        parts = zip(self._actors, shares(batch_size(args), self.lanes), strict=True)
        pending = [_start(actor, *rows_of_call(args, kwargs, rows, self._shared)) for actor, rows in parts if rows]
        return map_tensors(lambda t: t.to(args[0].device), join_rows([one.result() for one in pending]))

    def submit(self, *args: object, **kwargs: object) -> Future[object]:
        """Give a whole call to the next actor in turn, and return at once. The result is on the CPU. It raises the module's
        error, or `ray.exceptions.ActorDiedError` after more restarts than `restarts`."""
        return _start(next(self._next), args, kwargs)


def _start(actor: Any, args: tuple, kwargs: Arguments) -> Future[object]:
    return actor.call.remote(*map_tensors(lambda t: t.cpu(), (args, kwargs))).future()
