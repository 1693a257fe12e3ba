"""Copies of a module: the choice of devices, the check of their memory, and the copying. Knows no VAE."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

Devices = str | int | torch.device | Sequence[str | int | torch.device]


def resolve_devices(devices: Devices, home: torch.device) -> tuple[torch.device, ...]:
    """The torch devices for a setting, in order, with repetitions. "all": every CUDA device, or `home` where there is none.
    An integer is the index of a CUDA device. TypeError, ValueError: the list is empty, or a device is unknown or missing."""
    if isinstance(devices, str) and devices == "all":
        return tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count())) or (home,)
    listed = list(devices) if isinstance(devices, Iterable) and not isinstance(devices, str) else [devices]
    if not listed:
        raise ValueError("devices is empty: pass one or more, such as ['cuda:0'], or 'all'")
    return tuple(resolve_device(one) for one in listed)


def resolve_device(one: str | int | torch.device) -> torch.device:
    """The torch device for a name, an index or a device, with its index where it is a GPU."""
    if isinstance(one, bool) or not isinstance(one, (str, int, torch.device)):
        raise TypeError(f"a device is a name, an index or a torch.device, not {one!r}")
    choice = "choose 'cpu' or 'cuda:0', 'cuda:1', ..."
    try:
        device = torch.device("cuda", one) if isinstance(one, int) else torch.device(one)
    except RuntimeError as error:
        raise ValueError(f"unknown device {one!r}: {choice}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device {one!r} is not supported: {choice}")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None and count else device.index or 0
    if not 0 <= index < count:
        raise ValueError(f"device {one!r} does not exist: torch sees {count} CUDA device{'s' * (count != 1)}")
    return torch.device("cuda", index)


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a CUDA device is the current one. For a CPU it does nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_bytes(device: torch.device) -> int:
    """The free bytes of a device, with those that torch's allocator holds there and does not use."""
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_memory(module: nn.Module, devices: Sequence[torch.device]) -> None:
    """MemoryError, with the numbers, where the free memory of a device is too small for the weights of its copies."""
    each = sum(t.nbytes for t in _stored(module).values())
    for device, count in Counter(devices).items():
        if count * each > (free := free_bytes(device)):
            raise MemoryError(
                f"{count} x {type(module).__name__} on {device} needs {count * each:,} bytes for weights alone, "
                f"and {free:,} are free: free memory there, or omit {device}"
            )


def check_not_offloaded(module: nn.Module) -> None:
    """ValueError for a module that moves its weights by hooks (CPU offload, device_map)."""
    if any(hasattr(part, "_hf_hook") for part in module.modules()):
        raise ValueError(
            f"this {type(module).__name__} is offloaded by hooks, which copies would share: load the pipeline without "
            f"offload or device_map and move it with .to(device)"
        )


def replicate(module: nn.Module, devices: Sequence[torch.device]) -> tuple[nn.Module, ...]:
    """One copy for each device, which shares no tensor with the module or with another copy. ValueError: the module is
    offloaded. MemoryError: a device has too little free memory."""
    check_not_offloaded(module)
    check_memory(module, devices)
    return tuple(copy_to(module, device) for device in devices)


def copy_to(module: nn.Module, device: torch.device) -> nn.Module:
    """A deep copy on a device. Weights are copied straight to it, without a copy on the module's own device."""
    memo = {key: _copy_tensor(tensor, device) for key, tensor in _stored(module).items()}
    return copy.deepcopy(module, memo)


def _copy_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    data = tensor.detach().to(device, copy=True)
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _stored(module: nn.Module) -> dict[int, Tensor]:
    return {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
