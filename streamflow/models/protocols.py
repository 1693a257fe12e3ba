"""What the package uses of a diffusers pipeline and of its parts, as types. diffusers attaches a pipeline's parts at run
time, so its own classes do not declare them. Nothing here is instantiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Arguments = Mapping[str, Any]  # keyword arguments of a pipeline's or a network's call
Call = dict[str, Any]  # the same, while it is put together
Function = Callable[..., Any]  # a function of a pipeline or of one of its parts


class Config(Mapping[str, Any]):
    """The config of a part of a pipeline: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str, /) -> Any: ...


class Scheduler(Protocol):
    """A scheduler of diffusers. `set_timesteps` sets timesteps and sigmas."""

    config: Config
    timesteps: Tensor
    sigmas: Tensor
    set_timesteps: Function
    step: Function


class Network(nn.Module):
    """A model of diffusers: a module with a config, a dtype and a device."""

    config: Config
    dtype: torch.dtype
    device: torch.device
    set_attention_backend: Callable[[str], None]
    fuse_qkv_projections: Callable[[], None]
    unfuse_qkv_projections: Callable[[], None]


class VAE(Network):
    """An autoencoder. `encode` and `decode` return diffusers' output objects, or tuples with `return_dict=False`."""

    encode: Function
    decode: Function


class Pipeline(Protocol):
    """A loaded diffusers pipeline. Parts that only some pipelines have are found by name."""

    components: Mapping[str, Any]
    config: Config
    device: torch.device
    dtype: torch.dtype
    scheduler: Scheduler
    vae: VAE
    to: Function

    def __getattr__(self, name: str, /) -> Any: ...

    def __call__(self, *args: object, **kwargs: object) -> Any: ...
