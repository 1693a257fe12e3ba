"""CUDA streams beside the current one, reused after their owner is gone. cuBLAS allocates a workspace (32 MiB on an H200)
for every stream on which a matrix product has run and never frees it, so the memory of a process that creates new streams
grows."""

from __future__ import annotations

from collections import defaultdict
from weakref import finalize

import torch
from torch import Tensor, nn

from streamflow.acceleration.watch import WeightWatch

_IDLE: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def side_stream(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A CUDA stream that only this owner uses until it is garbage-collected. Work of the previous owner that is still queued
    runs first. device: with its index."""
    idle = _IDLE[device]
    stream = idle.pop() if idle else torch.cuda.Stream(device)
    finalize(owner, idle.append, stream).atexit = False
    return stream


class Beside(nn.Module):
    """A module of one tensor on a side stream: for a tensor on the host it runs beside what is queued on the current stream,
    which waits for the output only.

    A tensor that is on the GPU, and weights that have changed (`WeightWatch`), come from the current stream; the side stream
    then waits for it first.
    """

    uploads = True

    def __init__(self, module: nn.Module, device: torch.device):
        super().__init__()
        self.module, self.device = module, device
        self._side, self._watch = side_stream(self, device), WeightWatch(module)

    @torch.no_grad()
    def forward(self, value: Tensor) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        changed = self._watch.changed()
        if changed:
            self._watch.renew()
        if changed or value.is_cuda:
            self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            if value.is_cuda:
                value.record_stream(self._side)
            made = self.module(value.as_subclass(Tensor).to(self.device, non_blocking=True))
        current.wait_stream(self._side)
        made.record_stream(current)
        return made
