"""Doodles of images, as a person draws them with a mouse in a paint program: few flat colours, thick wobbly lines.

Everything runs on the device and without the host, so that a CUDA graph can hold it. A layer is RGBA [B, 4, H, W] in
[0, 1], its colours multiplied by alpha.
"""

from functools import cache

import torch
import torch.nn.functional as F

SCALE = 2  # a doodle is drawn at twice its size and then averaged, which smooths its edges
SMOOTHING = (3, 9)  # of areas, in passes: of all doodles, and of rough ones
COLOURS = 5  # at most, of one doodle
RADII = (2, 3, 5)  # of the pen, in pixels of the large drawing
RADIUS_SHARES = (0.35, 0.75)  # cumulated: the shares of the first and of the first two
PAINT = (
    (0, 0, 0), (128, 128, 128), (136, 0, 21), (237, 28, 36), (255, 127, 39), (255, 242, 0), (34, 177, 76), (0, 162, 232),
    (63, 72, 204), (163, 73, 164), (255, 255, 255), (195, 195, 195), (185, 122, 87), (255, 174, 201), (255, 201, 14),
    (239, 228, 176), (181, 230, 29), (153, 217, 234), (112, 146, 190), (200, 191, 231),
)  # fmt: skip


@cache
def paint_colours(device: torch.device) -> torch.Tensor:
    """PAINT in [0, 1], copied to the device once."""
    return torch.tensor(PAINT, device=device) / 255


def chance(share: float, count: int, device) -> torch.Tensor:
    """Bool [count, 1, 1, 1], each True with probability `share`."""
    return torch.rand(count, 1, 1, 1, device=device) < share


def uniform(low: float, high: float, count: int, device) -> torch.Tensor:
    """[count, 1, 1, 1]"""
    return low + (high - low) * torch.rand(count, 1, 1, 1, device=device)


def warp(layer: torch.Tensor, pixels: torch.Tensor, cells: int = 6) -> torch.Tensor:
    """`layer` moved by a smooth random field whose deviation is `pixels` [B, 1, 1, 1]."""
    count, _, height, width = layer.shape
    field = torch.randn(count, 2, cells, cells, device=layer.device)
    field = F.interpolate(field, (height, width), mode="bicubic", align_corners=False) * pixels * (2 / width)
    still = torch.eye(2, 3, device=layer.device).expand(count, -1, -1)
    grid = F.affine_grid(still, [count, 1, height, width], align_corners=False) + field.permute(0, 2, 3, 1)
    return F.grid_sample(layer, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def palette(layer: torch.Tensor, used: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The main colours [B, COLOURS, 3] by k-means of the opaque pixels; those from `used` [B] on are far from any."""
    small = F.adaptive_avg_pool2d(layer, 32).flatten(2)
    alpha = small[:, 3]
    colour = (small[:, :3] / alpha[:, None].clamp(min=1e-3)).transpose(1, 2)  # [B, 1024, 3]
    first = (torch.rand_like(alpha) * (alpha > 0.5)).topk(COLOURS, dim=1).indices
    centres = torch.gather(colour, 1, first[..., None].expand(-1, -1, 3))
    left_out = torch.arange(COLOURS, device=layer.device) >= used[:, None]
    for _ in range(steps):
        distance = torch.cdist(colour, centres).masked_fill(left_out[:, None], 1e3)
        nearest = distance.argmin(2, keepdim=True) == torch.arange(COLOURS, device=layer.device)
        weight = nearest * (alpha > 0.5)[..., None]
        total = weight.sum(1)[..., None]
        centres = torch.where(total > 0, weight.float().mT @ colour / total.clamp(min=1), centres)
    return torch.where(left_out[..., None], 1e3, centres)


def regions(layer: torch.Tensor, centres: torch.Tensor, rough: torch.Tensor) -> torch.Tensor:
    """Labels [B, 1, H, W]: the nearest of the colours, COLOURS outside. Small spots are smoothed away, more if `rough`."""
    alpha = layer[:, 3:]
    colour = layer[:, :3] / alpha.clamp(min=1e-3)
    squares = (colour[:, None] - centres[..., None, None]).square().sum(2)
    label = torch.where(alpha > 0.5, squares.argmin(1, keepdim=True), COLOURS)
    areas = (label == torch.arange(COLOURS + 1, device=layer.device)[:, None, None]).float()
    for again in range(SMOOTHING[1]):
        smooth = F.avg_pool2d(areas, 5, 1, 2, count_include_pad=False)
        areas = smooth if again < SMOOTHING[0] else torch.where(rough, smooth, areas)
    return areas.argmax(1, keepdim=True)


def borders(label: torch.Tensor) -> torch.Tensor:
    """1.0 [B, 1, H, W] where a pixel's right or lower neighbour has another label."""
    right = F.pad(label[..., 1:] != label[..., :-1], (0, 1))
    below = F.pad(label[..., 1:, :] != label[..., :-1, :], (0, 0, 0, 1))
    return (right | below).float()


def thick(lines: torch.Tensor, radius: int) -> torch.Tensor:
    """Lines drawn by a round pen."""
    at = torch.arange(-radius, radius + 1, device=lines.device)
    pen = (at[:, None] ** 2 + at**2 <= radius**2 + 1).to(lines.dtype)
    return (F.conv2d(lines, pen[None, None], padding=radius) > 0.5).to(lines.dtype)


def with_pens(lines: torch.Tensor) -> torch.Tensor:
    """Lines of one of the pens, drawn for each image."""
    choice = torch.rand(len(lines), 1, 1, 1, device=lines.device)
    drawn = thick(lines, RADII[-1])
    for radius, share in zip(RADII[-2::-1], RADIUS_SHARES[::-1], strict=True):
        drawn = torch.where(choice < share, thick(lines, radius), drawn)
    return drawn


def hatching(count: int, size: int, device) -> torch.Tensor:
    """1.0 [B, 1, H, W] in the stripes of an area that is filled by moving the pen to and fro."""
    at = torch.arange(size, device=device, dtype=torch.float32)
    angle, period = uniform(0, 3.14, count, device), uniform(8, 16, count, device)
    along = at[:, None] * angle.sin() + at * angle.cos()
    return ((along * 6.28 / period).sin() > -0.6).float()


def doodle(layer: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1] of doodles of `layer` on `background` [B, 3].

    Half of them have lines and filled areas, a quarter only areas, a quarter only lines.
    """
    count, device = len(layer), layer.device
    paper = background[..., None, None]
    large = F.interpolate(layer, scale_factor=SCALE, mode="bilinear", align_corners=False)
    large = warp(large, uniform(0.3, 3.0, count, device))
    centres = palette(large, torch.randint(2, COLOURS + 1, (count,), device=device))
    label = regions(large, centres, chance(0.4, count, device))
    inside = label < COLOURS

    flat = centres.clamp(0, 1) + 0.04 * torch.randn_like(centres)
    paint = paint_colours(device)
    snapped = paint[torch.cdist(flat, paint).argmin(2)]
    flat = torch.where(chance(0.5, count, device)[..., 0], snapped, flat).clamp(0, 1)
    left_white = torch.rand(count, COLOURS, 1, device=device) < 0.08
    flat = torch.where(left_white, background[:, None], flat)
    index = label.clamp(max=COLOURS - 1).flatten(1)[..., None].expand(-1, -1, 3)
    filled = torch.gather(flat, 1, index).transpose(1, 2).reshape(count, 3, *label.shape[-2:])
    stripes = torch.where(chance(0.12, count, device), hatching(count, label.shape[-1], device), 1.0)
    areas = torch.where(inside & (stripes > 0), filled, paper)

    mode = torch.rand(count, 1, 1, 1, device=device)  # below 0.25 only lines, above 0.75 only areas
    outline = borders(inside)
    lines = torch.where(chance(0.3, count, device) & (mode > 0.25), outline, borders(label))
    lines = with_pens(warp(lines, uniform(0.0, 1.2, count, device)).gt(0.3).to(lines.dtype))
    mean = layer[:, :3].sum((2, 3)) / layer[:, 3].sum((1, 2)).clamp(min=1)[:, None]
    chosen = paint[torch.randint(len(paint), (count,), device=device)] * 0.7
    pick = torch.rand(count, 1, device=device)
    ink = torch.where(pick < 0.6, 0.05, torch.where(pick < 0.85, mean * 0.4, chosen))[..., None, None]

    canvas = torch.where(mode < 0.25, paper, areas)
    canvas = torch.where((lines > 0) & (mode < 0.75), ink, canvas)
    return F.avg_pool2d(canvas, SCALE)
