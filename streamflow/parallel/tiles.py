"""One large picture by tiles, on the devices of a `ShardedVAE`. Knows convolutions, and how far a decoder sees; no family.

A decoder of convolutions and pointwise functions (AutoencoderTiny) sees as far as its convolutions reach. Tiles with so wide
a halo, cut back to their cores, are the whole decode: the same sums, in the order that the kernels for the tile's size take.

A decoder with GroupNorm or attention (AutoencoderKL) looks at the whole picture, and a tile takes its own mean and variance.
There tiles are blended over half their halo, and the result is near the whole decode, not equal. How near depends on how
alike the tiles are: `psnr(decode(vae, z, devices, tile=32), vae.decode(z).sample)` says it for a picture (`psnr`, below).
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from streamflow._decibels import decibels
from streamflow.parallel.plan import Tile, grid, ramp, room_for, tiles
from streamflow.parallel.pool import Pending
from streamflow.parallel.replicas import free_bytes
from streamflow.parallel.vae import ShardedVAE

PROBE = 8  # latents on a side: a decode that shows at which scale each convolution works
SAMPLE = 24  # latents on a side: a decode that shows how much memory a latent takes
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
POINTWISE = (
    *(nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Hardtanh),
)


@dataclass(frozen=True)
class Reach:
    """How a decoder looks at its latents. factor: pixels a latent. halo: how many latents away its convolutions see.
    local: it sees nothing beyond, so that haloed tiles are exact."""

    factor: int
    halo: int
    local: bool


@torch.no_grad()
def decode_tiled(sharded: ShardedVAE, latents: Tensor, tile: int | str = "auto", halo: int | None = None) -> Tensor:
    """Pictures of latents `[N, ..., h, w]`, decoded in haloed tiles that go round the devices, on the device asked for.

    tile: a tile's side without its halo, in latents; "auto": as few tiles as occupy every device and fit its free memory.
    halo: latents around each tile; None: as far as the decoder's convolutions see. Fewer is quicker and no longer exact.

    Exact (up to the order of sums) where the decoder is local; otherwise blended (see the head of this file).

    Raises:
        TypeError, ValueError: a bad tile or no latents; memory holds not even the smallest tile. DecodeError: all devices
        failed.
    """
    if not latents.numel():
        raise ValueError(f"there are no latents to decode, {list(latents.shape)}")
    height, width = latents.shape[-2:]
    probe = latents[:1, ..., :1, :1]
    reach = _with_halo(_on_first(sharded, reach_of, probe), halo)
    counts = _counts(sharded, latents, tile, reach)
    places = tiles(height, width, counts, reach.halo)
    picture = _Exact(latents, reach) if reach.local else _Blended(latents, reach)
    waiting: deque[tuple[Tile, Pending]] = deque()
    for place in places:
        window = latents[..., _slice(place.rows.window), _slice(place.columns.window)]
        waiting.append((place, _submit(sharded, window, latents.device)))
        if len(waiting) > sharded.lanes:
            _put(picture, waiting.popleft())
    while waiting:
        _put(picture, waiting.popleft())
    return picture.finished()


def _with_halo(reach: Reach, halo: int | None) -> Reach:
    if halo is None:
        return reach
    if isinstance(halo, bool) or not isinstance(halo, int) or halo < 0:
        raise ValueError(f"halo must be 0 latents or more, not {halo!r}")
    return replace(reach, halo=halo, local=reach.local and halo >= reach.halo)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]; infinite where they are equal."""
    return decibels((a.double() - b.double()).square().mean().item() / 4)


# -- how far a decoder sees --------------------------------------------------------------------------------------------


def reach_of(vae: nn.Module, like: Tensor) -> Reach:
    """Read off a decode of a few latents: which modules ran, at which scale. like: latents of one position, for their
    channels, dtype and device."""
    channels = like.expand(*like.shape[:-2], PROBE, PROBE)
    ran, pictures = _watched(vae, torch.zeros_like(channels, memory_format=torch.contiguous_format))
    factor, rest = divmod(pictures.shape[-1], PROBE)
    pixels: dict[int, int] = defaultdict(int)
    local = not rest
    for module, size in ran:
        if isinstance(module, CONVOLUTIONS) and size and not size % PROBE:
            pixels[size // PROBE] += _conv_reach(module)
        local = local and _is_local(module, size)
    halo = _in_latents(pixels)
    return Reach(factor, halo, local and _sees_no_farther(vae, like, halo, factor))


def _watched(vae: nn.Module, latents: Tensor) -> tuple[list[tuple[nn.Module, int]], Tensor]:
    """(modules without children that ran in a decode, each with its input's width; the pictures)."""
    ran: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, args: tuple) -> None:
        ran.append((module, args[0].shape[-1] if args and isinstance(args[0], Tensor) else 0))

    with ExitStack() as stack:
        for module in vae.modules():
            if not any(True for _ in module.children()):
                stack.callback(module.register_forward_pre_hook(note).remove)
        return ran, _decoded(vae, latents)


def _is_local(module: nn.Module, size: int) -> bool:
    if isinstance(module, CONVOLUTIONS):
        square = all(step == 1 for step in module.stride) and module.padding_mode == "zeros"
        return square and size > 0 and size % PROBE == 0
    if isinstance(module, nn.Upsample):
        return module.mode == "nearest"
    return isinstance(module, POINTWISE) or type(module).__module__.endswith("activations")


def _conv_reach(module: nn.Module) -> int:
    """Pixels to each side that a convolution sees, the more of the two sides."""
    return max(step * (size - 1) // 2 for step, size in zip(module.dilation[-2:], module.kernel_size[-2:], strict=True))


def _in_latents(pixels: dict[int, int]) -> int:
    """The reach of all convolutions, given the sum at each scale: from the finest scale down to the latents', rounded up to
    whole pixels at every change of scale."""
    reach, last = 0, 1
    for scale in sorted(pixels, reverse=True):
        reach = math.ceil(reach * scale / last) + pixels[scale] if reach else pixels[scale]
        last = scale
    return math.ceil(reach / last)


def _sees_no_farther(vae: nn.Module, like: Tensor, halo: int, factor: int) -> bool:
    """Whether a change of one latent stays within the halo; what acts on the whole picture outside of modules shows here."""
    side = halo + 3
    generator = torch.Generator().manual_seed(0)
    shape = (*like.shape[:-2], side, side)
    plain = torch.randn(shape, generator=generator).to(like.device, like.dtype)
    changed = plain.clone()
    changed[..., 0, 0] += 3
    before, after = _decoded(vae, plain), _decoded(vae, changed)
    start = (halo + 1) * factor
    far = [(before[..., start:, :], after[..., start:, :]), (before[..., start:], after[..., start:])]
    tolerance = 1e3 * torch.finfo(before.dtype).eps
    return all(torch.allclose(a, b, atol=tolerance, rtol=0) for a, b in far)


# -- how large a tile may be -------------------------------------------------------------------------------------------


def _counts(sharded: ShardedVAE, latents: Tensor, tile: int | str, reach: Reach) -> tuple[int, int]:
    height, width = latents.shape[-2:]
    if tile == "auto":
        return grid(height, width, sharded.lanes, reach.halo, _room(sharded, latents))
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ValueError(f"tile is 'auto' or a side of 1 latent or more, not {tile!r}")
    return -(-height // tile), -(-width // tile)


def _room(sharded: ShardedVAE, latents: Tensor) -> int:
    """How many latents a tile may hold on the device with the least room."""
    like = latents[:1, ..., :1, :1]
    each = _on_first(sharded, bytes_per_latent, like) * len(latents)
    free = [free_bytes(device) // sharded.devices.count(device) for device in sharded.devices]
    return room_for(min(free), each)


def bytes_per_latent(vae: nn.Module, like: Tensor) -> float:
    """Bytes that decoding takes a latent, from a decode of a few: on CUDA the peak that torch's allocator saw (whose
    peak statistics this resets); on a CPU twice what the largest module takes in and gives out."""
    latents = torch.zeros(*like.shape[:-2], SAMPLE, SAMPLE, device=like.device, dtype=like.dtype)
    if like.is_cuda:
        torch.cuda.reset_peak_memory_stats(like.device)
        before = torch.cuda.memory_allocated(like.device)
        _decoded(vae, latents)
        return (torch.cuda.max_memory_allocated(like.device) - before) / SAMPLE**2
    return 2 * _largest_step(vae, latents) / SAMPLE**2


def _largest_step(vae: nn.Module, latents: Tensor) -> int:
    steps = [0]

    def note(module: nn.Module, args: tuple, output: object) -> None:
        held = [t for t in (*args, output) if isinstance(t, Tensor)]
        steps.append(sum(t.numel() * t.element_size() for t in held))

    with ExitStack() as stack:
        for module in vae.modules():
            stack.callback(module.register_forward_hook(note).remove)
        _decoded(vae, latents)
    return max(steps)


# -- putting tiles together --------------------------------------------------------------------------------------------


class _Exact:
    """Cores side by side."""

    def __init__(self, latents: Tensor, reach: Reach):
        self.size, self.factor, self.canvas = latents.shape[-2:], reach.factor, None

    def put(self, place: Tile, pixels: Tensor) -> None:
        core = pixels[..., place.rows.cut(self.factor), place.columns.cut(self.factor)]
        self.region(self.made(pixels), place.rows.core, place.columns.core).copy_(core)

    def made(self, pixels: Tensor) -> Tensor:
        """The canvas, made when the first tile says of which channels and kind it is."""
        if self.canvas is None:
            self.canvas = pixels.new_zeros((*pixels.shape[:-2], *(side * self.factor for side in self.size)))
        return self.canvas

    def region(self, canvas: Tensor, rows: range, columns: range) -> Tensor:
        f = self.factor
        return canvas[..., rows.start * f : rows.stop * f, columns.start * f : columns.stop * f]

    def finished(self) -> Tensor:
        return self.canvas


class _Blended(_Exact):
    """Windows that fade into each other around the ends of their cores."""

    def __init__(self, latents: Tensor, reach: Reach):
        super().__init__(latents, reach)
        self.blend = reach.halo // 2

    def put(self, place: Tile, pixels: Tensor) -> None:
        self.dtype = pixels.dtype
        down = ramp(place.rows, self.size[0], self.blend, self.factor)
        across = ramp(place.columns, self.size[1], self.blend, self.factor)
        weight = torch.outer(torch.tensor(down), torch.tensor(across)).to(pixels.device)
        canvas = self.made(pixels.float())
        self.region(canvas, place.rows.window, place.columns.window).add_(pixels.float() * weight)

    def finished(self) -> Tensor:
        return self.canvas.to(self.dtype)


def _put(picture: _Exact, decoded: tuple[Tile, Pending]) -> None:
    place, pending = decoded
    picture.put(place, pending.result())


# -- on the devices ----------------------------------------------------------------------------------------------------


def _decoded(vae: nn.Module, latents: Tensor) -> Tensor:
    return vae.decode(latents, return_dict=False)[0]


def _submit(sharded: ShardedVAE, window: Tensor, home: torch.device) -> Pending:
    calls = _each(sharded, _decoded)
    return sharded.pool.submit(calls, (window,), None, len(window), sharded.settings.target or home)


def _on_first(sharded: ShardedVAE, act: Callable, like: Tensor):
    """What a function of (VAE, latents) gives on the first device that works, in that device's own thread."""
    return sharded.pool.submit(_each(sharded, act), (like,), worker=sharded.pool.alive[0]).result()


def _each(sharded: ShardedVAE, act: Callable) -> Sequence[Callable]:
    return [partial(act, one) for one in sharded.replicas]


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)
