"""Copies of a module on devices: which devices, whether they have the memory, and the copying. Knows no VAE."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

Devices = str | int | torch.device | Sequence[str | int | torch.device]


def resolve_devices(devices: Devices, home: torch.device) -> tuple[torch.device, ...]:
    """The devices meant, in order, repeated ones kept. "all": every CUDA device, or `home` where there is none. A number is
    that CUDA device.

    Raises:
        TypeError, ValueError: nothing in the list; a device that torch does not know or that is not there.
    """
    if isinstance(devices, str) and devices == "all":
        return tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count())) or (home,)
    listed = [devices] if isinstance(devices, (str, int, torch.device)) else list(devices)
    if not listed:
        raise ValueError("devices is empty: name one at least, such as ['cuda:0'], or 'all'")
    return tuple(resolve_device(one) for one in listed)


def resolve_device(one: str | int | torch.device) -> torch.device:
    """One device, with its number where it is a GPU."""
    if isinstance(one, bool) or not isinstance(one, (str, int, torch.device)):
        raise TypeError(f"a device is a name, a number or a torch.device, not {one!r}")
    try:
        device = torch.device("cuda", one) if isinstance(one, int) else torch.device(one)
    except RuntimeError as error:
        raise ValueError(f"unknown device {one!r}: choose 'cpu' or 'cuda:0', 'cuda:1', ...") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {one!r} is not supported: choose 'cpu' or 'cuda:0', 'cuda:1', ...")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None and count else device.index or 0
    if not 0 <= index < count:
        raise ValueError(f"device {one!r} is not there: torch sees {count} CUDA device{'s' * (count != 1)}")
    return torch.device("cuda", index)


def size_in_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights and buffers, shared ones once."""
    return sum(t.numel() * t.element_size() for t in _stored(module).values())


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on a device, what torch holds unused there included."""
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_memory(module: nn.Module, devices: Sequence[torch.device]) -> None:
    """MemoryError, with the numbers, where a device has no room for its copies' weights."""
    each = size_in_bytes(module)
    for device, count in Counter(devices).items():
        if count * each > (free := free_bytes(device)):
            raise MemoryError(
                f"{count} x {type(module).__name__} on {device} needs {count * each:,} bytes for weights alone, "
                f"and {free:,} are free: free memory there, or leave {device} out"
            )


def check_whole(module: nn.Module) -> None:
    """ValueError for a module that moves its weights by hooks (CPU offload, device_map)."""
    if any(hasattr(part, "_hf_hook") for part in module.modules()):
        raise ValueError(
            f"this {type(module).__name__} is offloaded by hooks, which copies would share: load the pipeline without "
            f"offload or device_map and move it with .to(device)"
        )


def replicate(module: nn.Module, devices: Sequence[torch.device]) -> tuple[nn.Module, ...]:
    """One copy a device, which shares nothing with the module or with another copy; the module stays as it is.

    Raises:
        ValueError: the module is offloaded. MemoryError: a device has no room.
    """
    check_whole(module)
    check_memory(module, devices)
    return tuple(copied(module, device) for device in devices)


def copied(module: nn.Module, device: torch.device) -> nn.Module:
    """A deep copy on a device; weights go there straight, without a second copy beside the first."""
    memo = {key: _moved(tensor, device) for key, tensor in _stored(module).items()}
    return copy.deepcopy(module, memo)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    data = tensor.detach().to(device, copy=True)
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _stored(module: nn.Module) -> dict[int, Tensor]:
    return {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
