"""Decoding without a stream, in one call: by row, or one large picture by tile.

pictures = decode(vae, latents, ["cuda:0", "cuda:1"])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamflow.parallel.replicas import Devices
from streamflow.parallel.tiles import decode_tiled
from streamflow.parallel.vae import ShardedVAE, shard_vae


def decode(
    vae: nn.Module,
    latents: Tensor,
    devices: Devices = "all",
    *,
    tile: int | str | None = None,
    output_device: str | int | torch.device | None = None,
    **settings: Any,
) -> Tensor:
    """Latents `[N, ...]`, any N of 1 or more, as the VAE's own `decode` takes them, to its pictures, on `output_device` (by
    default the latents' device).

    vae: a VAE, which is copied to the devices for this call, or a `ShardedVAE`, which has devices and settings of its own.
    tile: None: by row. "auto", or the side of a tile in latents: by tile (see `streamflow.parallel.tiles.decode_tiled`).
    settings: `balance`, `batch`, `depth` (see `Settings`).

    Raises:
        TypeError, ValueError, MemoryError: as `shard_vae`; an empty batch. DecodeError: all devices failed.
    """
    if not len(latents):
        raise ValueError(f"there are no latents to decode, {list(latents.shape)}")
    if isinstance(vae, ShardedVAE):
        if devices != "all" or output_device is not None or settings:
            raise TypeError("this VAE is sharded already: give devices, output_device and settings to shard_vae")
        return _decode(vae, latents, tile)
    output = latents.device if output_device is None else output_device
    with shard_vae(vae, devices, output_device=output, **settings) as sharded:
        return _decode(sharded, latents, tile)


def _decode(sharded: ShardedVAE, latents: Tensor, tile: int | str | None) -> Tensor:
    if tile is None:
        return sharded.decode(latents, return_dict=False)[0]
    return decode_tiled(sharded, latents, tile)
