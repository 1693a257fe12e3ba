"""The pack of images (see data.py) and what is done to one on the device: background, place and size, colour.

Knows captions' colour tables; knows no network. The images of the pack are uint8 RGBA [N, 4, 128, 128], straight alpha;
composed images are float RGB in [-1, 1].
"""

import io
import json
import math
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import BACKGROUNDS, HUES
from PIL import Image

SIZE = 128
STYLE_SHARES = {"3d": 0.45, "noto": 0.17, "flat": 0.17, "gradient": 0.11, "blob": 0.10}
PEOPLE_WEIGHT = 0.4


@dataclass(frozen=True)
class Pack:
    """`rows` are the dicts of captions.jsonl; `rgba` uint8 [N, 4, 128, 128] holds their images in the same order."""

    rows: list[dict]
    rgba: torch.Tensor

    def select(self, keep) -> "Pack":
        index = [i for i, row in enumerate(self.rows) if keep(row)]
        return Pack([self.rows[i] for i in index], self.rgba[index])


def _decode(blob: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(blob)).convert("RGBA")).transpose(2, 0, 1)


def read_pack(path: Path) -> Pack:
    """Every image of the tar that data.py writes."""
    with tarfile.open(path) as tar:
        files = {member.name.removeprefix("./"): tar.extractfile(member).read() for member in tar if member.isfile()}
    rows = [json.loads(line) for line in files["captions.jsonl"].decode().splitlines()]
    with ThreadPoolExecutor() as pool:
        arrays = list(pool.map(_decode, (files[row["image"]] for row in rows)))
    return Pack(rows, torch.from_numpy(np.stack(arrays)))


def withheld(row: dict, holdout: dict) -> bool:
    """True for an image that no training script may see."""
    hidden = {
        "3d": "withheld_3d_and_gradient",
        "gradient": "withheld_3d_and_gradient",
        "noto": "withheld_noto_and_blob",
        "blob": "withheld_noto_and_blob",
    }
    return row["style"] in hidden and row["label"] in holdout[hidden[row["style"]]]


def training_pack(path: Path, holdout: Path, limit: int = 0) -> Pack:
    """The pack without its withheld images; with `limit`, only that many, evenly spread."""
    hidden = json.loads(Path(holdout).read_text())
    pack = read_pack(path).select(lambda row: not withheld(row, hidden))
    if limit:
        chosen = {row["image"] for row in pack.rows[:: max(1, len(pack.rows) // limit)][:limit]}
        pack = pack.select(lambda row: row["image"] in chosen)
    return pack


def row_weights(rows: list[dict], shares: dict[str, float] = STYLE_SHARES) -> torch.Tensor:
    """How often each image is drawn, float64 [N]: by style in these shares, people less often."""
    weight = torch.tensor([PEOPLE_WEIGHT if row["group"] == "people & body" else 1.0 for row in rows], dtype=torch.float64)
    for style, share in shares.items():
        of_style = torch.tensor([row["style"] == style for row in rows])
        if of_style.any():
            weight[of_style] *= share / weight[of_style].sum()
    return weight / weight.sum()


def background_rgb(names: list[str], device) -> torch.Tensor:
    """Float [B, 3] in [0, 1]."""
    return torch.tensor([BACKGROUNDS[name] for name in names], device=device, dtype=torch.float32) / 255


def placement(scale: torch.Tensor, shift: torch.Tensor, turn: torch.Tensor | None = None) -> torch.Tensor:
    """Affine maps [B, 2, 3] for `compose`: the image drawn `scale` times as large, moved by `shift` [B, 2] pixels."""
    turn = torch.zeros_like(scale) if turn is None else turn
    cos, sin = torch.cos(turn) / scale, torch.sin(turn) / scale
    linear = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
    offset = -(linear @ (shift * 2 / SIZE)[..., None])
    return torch.cat([linear, offset], -1)


def compose(rgba: torch.Tensor, background: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [B, 4, H, W] over `background` [B, 3] -> images [B, 3, H, W] in [-1, 1]; resampled in premultiplied
    alpha.
    """
    layer = rgba.float() / 255
    alpha = layer[:, 3:]
    layer = torch.cat([layer[:, :3] * alpha, alpha], 1)
    if place is not None:
        grid = F.affine_grid(place, list(layer.shape), align_corners=False)
        layer = F.grid_sample(layer, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (layer[:, :3] + (1 - layer[:, 3:]) * background[..., None, None]) * 2 - 1


def _hue_chroma(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hue in degrees and chroma, each [B, H, W], of colours [B, 3, H, W] in [0, 1]."""
    red, green, blue = rgb.unbind(1)
    hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) * (180 / math.pi) % 360
    return hue, rgb.amax(1) - rgb.amin(1)


def turn_hue(rgb: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Rotates colours [B, 3, H, W] about the grey axis by `degrees` [B]."""
    angle = degrees * math.pi / 180
    third, root = (1 - torch.cos(angle)) / 3, torch.sin(angle) / math.sqrt(3)
    eye = torch.cos(angle) + third
    matrix = torch.stack(
        [
            torch.stack([eye, third - root, third + root], -1),
            torch.stack([third + root, eye, third - root], -1),
            torch.stack([third - root, third + root, eye], -1),
        ],
        1,
    )
    return torch.einsum("bij,bjhw->bihw", matrix, rgb).clamp(0, 1)


def recolour(rgba: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 4, H, W] with the pixels near its dominant hue turned to hue `target` [B] (degrees)."""
    rgb = rgba[:, :3].float() / 255
    hue, chroma = _hue_chroma(rgb)
    weight = chroma * rgba[:, 3].float() / 255
    radians = hue * math.pi / 180
    main = torch.atan2((weight * radians.sin()).sum((1, 2)), (weight * radians.cos()).sum((1, 2))) * 180 / math.pi
    away = ((hue - main[:, None, None] + 180) % 360 - 180).abs()
    near = ((60 - away) / 20).clamp(0, 1) * (chroma * 8).clamp(0, 1)
    turned = turn_hue(rgb, target - main)
    mixed = rgb + near[:, None] * (turned - rgb)
    return torch.cat([(mixed * 255).round().to(torch.uint8), rgba[:, 3:]], 1)


def can_recolour(row: dict) -> bool:
    return row["hue_conc"] > 0.85 and row["color_share"] > 0.55 and row["color"] in HUES
