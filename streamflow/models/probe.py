"""Read off a pipeline what it would hand its network: run its own code, on a copy, up to the first scheduler step.

The copy has a deep-copied scheduler and a stand-in for the network that writes down its arguments and returns zeros,
so prompts, embeddings, masks, ids, shifts and custom sigmas are all the pipeline's own doing, and the pipeline, its
scheduler and the global random state stay as they were.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamflow.schedule import Schedule
from streamflow.wrap import base_network


class _Done(Exception):
    """Raised in place of the scheduler's first step; never leaves this module."""


@dataclass(frozen=True)
class Recording:
    """What the network was called with in the first step, one dict a call, and the scheduler after set_timesteps."""

    calls: tuple[dict[str, Any], ...]
    scheduler: Any

    @property
    def schedule(self) -> Schedule:
        """The pipeline's own schedule, float32 on the CPU."""
        timesteps, sigmas = self.scheduler.timesteps, self.scheduler.sigmas
        return Schedule(timesteps.detach().float().cpu(), sigmas.detach().float().cpu())


class _StandIn(nn.Module):
    """Looks like the network to a pipeline (config, dtype, device, cache_context, ...), and records its calls."""

    def __init__(self, network: nn.Module, sample: str):
        super().__init__()
        object.__setattr__(self, "_network", network)
        self._sample = sample
        self._signature = inspect.signature(base_network(network).forward)
        if sample not in self._signature.parameters:
            raise TypeError(
                f"{type(network).__name__} hides the arguments of its network, of which {sample!r} is one: pass the network "
                f"itself"
            )
        self.calls: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_network"), name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | list[Tensor]]:
        arguments = self._signature.bind(*args, **kwargs).arguments
        self.calls.append(arguments)
        x = arguments[self._sample]
        return ([torch.zeros_like(one) for one in x] if isinstance(x, list) else torch.zeros_like(x),)


@torch.no_grad()
def record(pipe: Any, network: str, sample: str, scheduler: Any = None, **arguments: Any) -> Recording:
    """Call a copy of `pipe` with `arguments` up to its first scheduler step, and return what its network was given.

    network: the pipe's attribute that holds the network. sample: the network's first argument by name. scheduler: in the
        place of the pipe's own.
    Whatever the pipeline raises about its arguments is passed on as it is.
    """
    twin = copy.copy(pipe)
    scheduler = copy.deepcopy(pipe.scheduler if scheduler is None else scheduler)
    stand_in = _StandIn(getattr(pipe, network), sample)
    scheduler.step = _stop
    vars(twin).update({network: stand_in, "scheduler": scheduler, "_progress_bar_config": {"disable": True}})
    try:
        twin(**arguments, output_type="latent")
    except _Done:
        return Recording(tuple(stand_in.calls), scheduler)
    raise RuntimeError(f"{type(pipe).__name__} ended without a scheduler step: its schedule cannot be read off")


def _stop(*args: Any, **kwargs: Any) -> None:
    raise _Done
