"""Records what a pipeline passes to its network, by running a copy of the pipeline up to its first scheduler step.

The copy has a deep-copied scheduler and a stand-in for the network that records its arguments and returns zeros. So the
pipeline itself makes prompts, embeddings, masks, ids, shifts and custom sigmas, and the pipeline, its scheduler and the
global random state do not change.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_map_only

from streamflow.conditioning.blending import Cache
from streamflow.flow.schedule import Schedule
from streamflow.models.pipe_parts import base_network
from streamflow.models.protocols import Arguments, Function, Pipeline, Scheduler

PLAIN = (str, int, float, type(None), torch.dtype, torch.device)  # types whose `repr` tells their values apart
Texts = Cache  # results of `encode_prompt` by its arguments


class _Done(Exception):
    """Raised in place of the scheduler's first step; never leaves this module."""


@dataclass(frozen=True)
class Recording:
    """The arguments of the network's calls in the first step, and the scheduler after `set_timesteps`."""

    calls: tuple[Arguments, ...]
    scheduler: Scheduler

    @property
    def schedule(self) -> Schedule:
        """The pipeline's own schedule, float32 on the CPU."""
        timesteps, sigmas = self.scheduler.timesteps, self.scheduler.sigmas
        return Schedule(timesteps.detach().float().cpu(), sigmas.detach().float().cpu())


class _StandIn(nn.Module):
    """Has the network's attributes (config, dtype, device, cache_context, ...), and records its calls."""

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
        self.calls: list[Arguments] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_network"), name)

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor | list[Tensor]]:
        arguments = self._signature.bind(*args, **kwargs).arguments
        self.calls.append(arguments)
        x = arguments[self._sample]
        return ([torch.zeros_like(row) for row in x] if isinstance(x, list) else torch.zeros_like(x),)


@torch.no_grad()
def record(
    pipe: Pipeline,
    network: str,
    sample: str,
    scheduler: Scheduler | None = None,
    texts: Texts | None = None,
    **arguments: object,
) -> Recording:
    """Call a copy of `pipe` with `arguments` up to its first scheduler step, and return what its network was given.

    network: the pipe's attribute that holds the network. sample: the name of the network's first argument. scheduler:
        replaces the pipe's own. texts: prompts encoded earlier (`once`).
    Errors that the pipeline raises about its arguments are passed on.
    """
    twin = copy.copy(pipe)
    if texts is not None and hasattr(pipe, "encode_prompt"):
        vars(twin)["encode_prompt"] = once(pipe.encode_prompt, texts)
    scheduler = copy.deepcopy(pipe.scheduler if scheduler is None else scheduler)
    stand_in = _StandIn(getattr(pipe, network), sample)
    scheduler.step = _stop
    vars(twin).update({network: stand_in, "scheduler": scheduler, "_progress_bar_config": {"disable": True}})
    try:
        twin(**arguments, output_type="latent")
    except _Done:
        return Recording(calls=tuple(stand_in.calls), scheduler=scheduler)
    raise RuntimeError(f"{type(pipe).__name__} ended without a scheduler step: its schedule cannot be read off")


def once(function: Function, known: Texts) -> Function:
    """The function, run once for equal arguments that are plain values, not tensors or images. A call returns a clone of the
    result that is kept."""

    @wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        if tree_any(lambda leaf: not isinstance(leaf, PLAIN), (args, kwargs)):
            return function(*args, **kwargs)
        result = known.get(repr((args, kwargs)), lambda: function(*args, **kwargs))
        return tree_map_only(Tensor, torch.clone, result)

    return call


_locks: WeakKeyDictionary[object, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextmanager
def encoding(pipe: Pipeline) -> Iterator[None]:
    """Holds the locks of this pipe's tokenizers, which are not thread-safe and which several pipes may share."""
    components = getattr(pipe, "components", {})
    shared = [part for name, part in components.items() if part is not None and name.startswith(("tokenizer", "processor"))]
    with _locks_lock:
        locks = {id(part): _locks.setdefault(part, threading.RLock()) for part in shared or [pipe]}
    with ExitStack() as held:
        for _, lock in sorted(locks.items()):  # sorted, so that two threads never wait for each other
            held.enter_context(lock)
        yield


def _stop(*args: object, **kwargs: object) -> None:
    raise _Done
