"""Decoding without a stream, in one call: by row, or one large image by tile.

images = decode(vae, latents, ["cuda:0", "cuda:1"])
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from streamflow.models.protocols import VAE
from streamflow.parallel.replicas import Devices
from streamflow.parallel.tiles import decode_tiled
from streamflow.parallel.vae import ShardedVAE, decode_images, shard_vae


def decode(
    vae: VAE,
    latents: Tensor,
    devices: Devices = "all",
    *,
    tile: int | str | None = None,
    output_device: str | int | torch.device | None = None,
    **settings: object,
) -> Tensor:
    """Decode latents `[N, ...]`, N >= 1, as the VAE's own `decode` takes them.

    Args:
        vae: a VAE, which is copied to the devices for this call, or a `ShardedVAE` with its own devices and settings.
        devices: as in `shard_vae`.
        tile: None: by row. "auto", or the side of a tile in latents: by tile (`streamflow.parallel.tiles.decode_tiled`).
        output_device: where the images are put; by default the device of the latents.
        settings: `balance`, `batch`, `depth` (see `Settings`).

    Raises:
        TypeError, ValueError, MemoryError: as `shard_vae`, or the batch is empty.
        DecodeError: all devices failed.
    """
    if isinstance(vae, ShardedVAE):
        if devices != "all" or output_device is not None or settings:
            raise TypeError("this VAE is sharded already: pass devices, output_device and settings to shard_vae")
        opened = nullcontext(vae)
    else:
        output = latents.device if output_device is None else output_device
        opened = shard_vae(vae, devices, output_device=output, **settings)
    with opened as sharded:
        return decode_images(sharded, latents) if tile is None else decode_tiled(sharded, latents, tile)
