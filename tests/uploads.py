"""A check of training steps that a CUDA graph is to hold, on the meta device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Uploads(TorchDispatchMode):
    """Raises where an operation copies from the host to the device that a step runs on, which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        results = [one for one in torch.utils._pytree.tree_leaves(out) if isinstance(one, torch.Tensor)]
        if any(one.is_meta for one in results) and any(
            not one.is_meta and (one.ndim or "copy" in str(func)) for one in tensors
        ):
            raise AssertionError(f"{func} copies from the host")
        return out
