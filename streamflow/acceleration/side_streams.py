"""CUDA streams beside the current one, reused after their owner is gone. cuBLAS allocates a workspace (32 MiB on an H200)
for every stream on which a matrix product has run and never frees it, so the memory of a process that creates new streams
grows."""

from __future__ import annotations

from collections import defaultdict
from weakref import finalize

import torch

_IDLE: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def side_stream(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A CUDA stream that only this owner uses until it is garbage-collected. Work of the previous owner that is still queued
    runs first. device: with its index."""
    idle = _IDLE[device]
    stream = idle.pop() if idle else torch.cuda.Stream(device)
    finalize(owner, idle.append, stream).atexit = False
    return stream
