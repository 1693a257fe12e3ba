"""Decoding without a stream, in one call: by row, or one large image by tile, on the devices of a `ShardedVAE`. It knows
receptive fields of decoders and no family.

    images = decode(vae, latents, ["cuda:0", "cuda:1"])

A decoder of convolutions and pointwise functions (AutoencoderTiny) has a finite receptive field. Tiles with a halo of that
width, cropped to their cores, equal the whole decode up to the order of sums.

A decoder with GroupNorm or attention (AutoencoderKL) depends on the whole image, and a tile has its own mean and variance.
There, tiles are blended over half their halo, and the result approximates the whole decode. Measure it for an image with
`psnr(decode(vae, z, devices, tile=32), vae.decode(z).sample)`.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from streamflow._decibels import decibels
from streamflow._validation import is_whole_number
from streamflow.models.protocols import VAE
from streamflow.parallel.plan import Tile, grid, ramp, room_for, tiles
from streamflow.parallel.pool import Pending
from streamflow.parallel.replicas import Devices, free_bytes
from streamflow.parallel.vae import ShardedVAE, decode_images, shard_vae

T = TypeVar("T")

PROBE = 8  # latents per side of the decode that shows the scale of each convolution
SAMPLE = 24  # latents per side of the decode that measures the memory per latent
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Hardtanh)
POINTWISE = (nn.Identity, nn.Dropout, *ACTIVATIONS)


@dataclass(frozen=True)
class Reach:
    """The receptive field of a decoder. factor: pixels per latent. halo: how many latents to each side its convolutions
    reach. local: nothing beyond the halo has an effect, so that tiles with this halo are exact."""

    factor: int
    halo: int
    local: bool


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
        tile: None: by row. "auto", or the side of a tile in latents: by tile, as `decode_tiled`.
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


@torch.no_grad()
def decode_tiled(sharded: ShardedVAE, latents: Tensor, tile: int | str = "auto", halo: int | None = None) -> Tensor:
    """Images of latents `[N, ..., h, w]`, decoded in tiles with halos that go to the devices in turn. They are on the
    `output_device` of the sharded VAE, by default on the device of the latents. Exact up to the order of sums where the
    decoder is local, otherwise blended (see the head of this file).

    Args:
        sharded: made by `shard_vae`.
        tile: the side of a tile without its halo, in latents; "auto": the fewest tiles that occupy every device and fit into
            its free memory.
        halo: latents around each tile; None: the reach of the decoder's convolutions. A smaller halo is not exact.

    Raises:
        ValueError: a bad tile or halo, there are no latents, or the smallest tile does not fit into memory.
        DecodeError: all devices failed.
    """
    if not latents.numel():
        raise ValueError(f"there are no latents to decode, {list(latents.shape)}: pass one row or more")
    height, width = latents.shape[-2:]
    reach = _with_halo(_on_first(sharded, reach_of, latents[:1, ..., :1, :1]), halo)
    parts = tiles(height, width, _counts(sharded, latents, tile, reach), reach.halo)
    image: Tensor | None = None
    for (rows, columns), pixels in _decode_parts(sharded, latents, parts):
        if image is None:
            size = (*pixels.shape[:-2], height * reach.factor, width * reach.factor)
            image = pixels.new_zeros(size, dtype=pixels.dtype if reach.local else torch.float32)
        if reach.local:
            core = pixels[..., rows.cut(reach.factor), columns.cut(reach.factor)]
            _pixels(image, rows.core, columns.core, reach.factor).copy_(core)
            continue
        down, across = (
            torch.tensor(ramp(span, size, reach.halo // 2, reach.factor))
            for span, size in ((rows, height), (columns, width))
        )
        weight = torch.outer(down, across).to(pixels.device)
        _pixels(image, rows.window, columns.window, reach.factor).add_(pixels.float() * weight)
    assert image is not None, "there is one tile at least"
    return image.to(pixels.dtype)


def _decode_parts(sharded: ShardedVAE, latents: Tensor, parts: tuple[Tile, ...]) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with its decoded window, in order. One tile more than there are devices is in flight."""
    calls = [partial(decode_images, one) for one in sharded.replicas]
    target = sharded.settings.target or latents.device
    pending: deque[tuple[Tile, Pending]] = deque()
    for part in parts:
        if len(pending) > sharded.lanes:
            yield pending[0][0], pending.popleft()[1].result()
        window = _pixels(latents, part[0].window, part[1].window)
        pending.append((part, sharded.pool.submit(calls, (window,), None, len(window), target)))
    for part, decoded in pending:
        yield part, decoded.result()


def _pixels(image: Tensor, rows: range, columns: range, factor: int = 1) -> Tensor:
    """The part of an image at these rows and columns of its latents."""
    return image[..., rows.start * factor : rows.stop * factor, columns.start * factor : columns.stop * factor]


def _with_halo(reach: Reach, halo: int | None) -> Reach:
    if halo is None:
        return reach
    if not is_whole_number(halo) or halo < 0:
        raise ValueError(f"halo must be 0 latents or more, not {halo!r}")
    return replace(reach, halo=halo, local=reach.local and halo >= reach.halo)


def psnr(a: Tensor, b: Tensor) -> float:
    """The peak signal-to-noise ratio in dB of images in [-1, 1]; infinite where they are equal."""
    return decibels((a.double() - b.double()).square().mean().item() / 4)


def reach_of(vae: VAE | ShardedVAE, like: Tensor) -> Reach:
    """The reach of a decoder, measured by a decode of a few latents. like: latents of one position, `[1, ..., 1, 1]`, which
    set the channels, dtype and device."""
    small = like.expand(*like.shape[:-2], PROBE, PROBE)
    ran, images = _record_modules(vae, torch.zeros_like(small, memory_format=torch.contiguous_format))
    factor, rest = divmod(images.shape[-1], PROBE)
    pixels: dict[int, int] = defaultdict(int)
    local = not rest
    for module, width, _ in ran:
        if any(True for _ in module.children()):
            continue
        if isinstance(module, CONVOLUTIONS) and width and not width % PROBE:
            pixels[width // PROBE] += _conv_reach(module)
        local = local and _is_local(module, width)
    halo = _in_latents(pixels)
    return Reach(factor, halo, local and _is_confined(vae, like, halo, factor))


def _record_modules(vae: VAE | ShardedVAE, latents: Tensor) -> tuple[list[tuple[nn.Module, int, int]], Tensor]:
    """(each module that ran in a decode, with the width of its first input and the bytes of its inputs and outputs; the
    images)."""
    ran: list[tuple[nn.Module, int, int]] = []

    def note(module: nn.Module, args: tuple, output: object) -> None:
        width = args[0].shape[-1] if args and isinstance(args[0], Tensor) else 0
        ran.append((module, width, sum(t.nbytes for t in (*args, output) if isinstance(t, Tensor))))

    with ExitStack() as stack:
        for module in vae.modules():
            stack.callback(module.register_forward_hook(note).remove)
        return ran, decode_images(vae, latents)


def _is_local(module: nn.Module, width: int) -> bool:
    if isinstance(module, CONVOLUTIONS):
        keeps_size = all(step == 1 for step in module.stride) and module.padding_mode == "zeros"
        return keeps_size and width > 0 and width % PROBE == 0
    if isinstance(module, nn.Upsample):
        return module.mode == "nearest"
    return isinstance(module, POINTWISE) or type(module).__module__.endswith("activations")


def _conv_reach(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> int:
    """How many pixels to each side a convolution reaches, the larger of the two axes."""
    return max(step * (size - 1) // 2 for step, size in zip(module.dilation[-2:], module.kernel_size[-2:], strict=True))


def _in_latents(pixels: dict[int, int]) -> int:
    """The reach of all convolutions in latents. pixels: their sum at each scale, in pixels of that scale. It is accumulated
    from the finest scale to that of the latents, and rounded up at every change of scale."""
    reach, last = 0, 1
    for scale in sorted(pixels, reverse=True):
        reach = math.ceil(reach * scale / last) + pixels[scale] if reach else pixels[scale]
        last = scale
    return math.ceil(reach / last)


def _is_confined(vae: VAE | ShardedVAE, like: Tensor, halo: int, factor: int) -> bool:
    """Whether a change of one latent stays within the halo. This finds global operations outside of modules."""
    side = halo + 3
    generator = torch.Generator().manual_seed(0)
    shape = (*like.shape[:-2], side, side)
    plain = torch.randn(shape, generator=generator).to(like.device, like.dtype)
    changed = plain.clone()
    changed[..., 0, 0] += 3
    before, after = decode_images(vae, plain), decode_images(vae, changed)
    start = (halo + 1) * factor
    far = [(before[..., start:, :], after[..., start:, :]), (before[..., start:], after[..., start:])]
    tolerance = 1e3 * torch.finfo(before.dtype).eps
    return all(torch.allclose(a, b, atol=tolerance, rtol=0) for a, b in far)


def _counts(sharded: ShardedVAE, latents: Tensor, tile: int | str, reach: Reach) -> tuple[int, int]:
    """How many tiles (down, across). "auto": as many as fit into the device with the least free memory."""
    height, width = latents.shape[-2:]
    if tile == "auto":
        each = _on_first(sharded, bytes_per_latent, latents[:1, ..., :1, :1]) * len(latents)
        free = min(free_bytes(device) // sharded.devices.count(device) for device in sharded.devices)
        return grid(height, width, sharded.lanes, reach.halo, room_for(free, each))
    if not is_whole_number(tile) or tile < 1:
        raise ValueError(f"tile must be 'auto' or a side of 1 latent or more, not {tile!r}")
    return -(-height // tile), -(-width // tile)


def bytes_per_latent(vae: VAE | ShardedVAE, like: Tensor) -> float:
    """The memory of a decode in bytes per latent, measured on a few latents. On CUDA it is the peak of torch's allocator,
    whose peak statistics are reset; on a CPU, twice the inputs and outputs of the largest module."""
    latents = torch.zeros(*like.shape[:-2], SAMPLE, SAMPLE, device=like.device, dtype=like.dtype)
    if like.is_cuda:
        torch.cuda.reset_peak_memory_stats(like.device)
        before = torch.cuda.memory_allocated(like.device)
        decode_images(vae, latents)
        return (torch.cuda.max_memory_allocated(like.device) - before) / SAMPLE**2
    return 2 * max(size for _, _, size in _record_modules(vae, latents)[0]) / SAMPLE**2


def _on_first(sharded: ShardedVAE, function: Callable[..., T], like: Tensor) -> T:
    """The result of a function of (VAE, latents) on the first device that works, computed in its own thread."""
    calls = [partial(function, one) for one in sharded.replicas]
    return sharded.pool.submit(calls, (like,), worker=sharded.pool.alive[0]).result()
