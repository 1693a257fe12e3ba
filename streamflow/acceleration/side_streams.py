"""CUDA streams beside the current one, lent to an owner and used again after it. cuBLAS keeps a workspace (32 MiB on an
H200) for good for every stream that ever multiplied on it, so that a process which makes new ones grows.

Knows CUDA streams; nothing of what runs on them.
"""

from __future__ import annotations

from collections import defaultdict
from weakref import finalize

import torch

_IDLE: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def side_stream(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A stream of the CUDA device, the owner's alone until it is collected. What was queued there runs before whatever the
    next owner queues. device: with its index."""
    idle = _IDLE[device]
    stream = idle.pop() if idle else torch.cuda.Stream(device)
    finalize(owner, idle.append, stream).atexit = False
    return stream
