"""Pairs of a reference and its target: one concept in two styles, or a doodle of it and a style.

The outline of a pair is one: two styles of a concept are a pair where their masks agree after one is moved and scaled onto
the other. Place, size, turn, mirroring, hue and background are drawn at random and alike for both, so that the output learns
to follow the reference. Images are float RGB [B, 3, 128, 128] in [-1, 1].
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import emoji_modules  # noqa: F401
import torch
import torch.nn.functional as F
from captions import BACKGROUNDS, STYLES, article, canonical, parts, plain_name
from doodles import chance, doodle, uniform
from pack import Pack, background_rgb, placement, row_weights, turn_hue
from training import cumulated, pick

SAME_OUTLINE = 0.85  # intersection over union of two masks that make a pair
STYLE_SHARES = {"3d": 0.30, "flat": 0.20, "gradient": 0.15, "noto": 0.20, "blob": 0.15}
FORMS = ("full", "without colour", "keyword", "style", "empty")
FORM_SHARES = (
    (0.40, 0.05, 0.10, 0.38, 0.07),  # one object
    (0.00, 0.50, 0.00, 0.43, 0.07),  # one object of another hue
    (0.00, 0.00, 0.00, 0.93, 0.07),  # two objects
)


def held_out_labels(holdout: Path) -> set[str]:
    """The concepts that training does not see in any style."""
    lists = json.loads(Path(holdout).read_text())
    return {label for name, labels in lists.items() if name.startswith("withheld") for label in labels}


def split(pack: Pack, holdout: Path, limit: int = 0) -> tuple[Pack, Pack]:
    """The images of training and the held-out ones; with `limit`, only so many concepts of each, evenly spread."""
    hidden = held_out_labels(holdout)
    found = []
    for out in (False, True):
        labels = sorted({row["label"] for row in pack.rows if (row["label"] in hidden) == out})
        kept = set(labels[:: max(1, len(labels) // limit)][:limit]) if limit else set(labels)
        found.append(pack.select(lambda row, kept=kept: row["label"] in kept))
    return found[0], found[1]


# -- outlines --------------------------------------------------------------------------------------------------------------


def boxes(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of bool masks [N, H, W] the boxes' centres [N, 2] (x, y) in [-1, 1] and their sizes [N] as shares of the image."""
    size = masks.shape[-1]
    centres, sides = [], []
    for along in (masks.any(1), masks.any(2)):
        start = along.int().argmax(1).float()
        end = size - along.flip(1).int().argmax(1).float()
        centres.append((start + end) / size - 1)
        sides.append((end - start).clamp(min=1) / size)
    return torch.stack(centres, 1), (sides[0] * sides[1]).sqrt()


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of bool masks [N, ...], [N]."""
    return (a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1).clamp(min=1)


def onto(align: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """The affine maps [B, 2, 3] that sample a reference, from those of its target and `align` [B, 3] (scale, x, y)."""
    linear, offset = place.split((2, 1), -1)
    scale = align[:, :1, None]
    return torch.cat([linear * scale, offset * scale + align[:, 1:, None]], -1)


@dataclass(frozen=True)
class Partners:
    """The other images of a concept that have an image's outline: index int64 [N, K], align [N, K, 3] and count [N]."""

    index: torch.Tensor
    align: torch.Tensor
    count: torch.Tensor

    def to(self, device) -> "Partners":
        return Partners(self.index.to(device), self.align.to(device), self.count.to(device))


def find_partners(pack: Pack, least: float = SAME_OUTLINE) -> Partners:
    """The images of a concept in other styles whose masks agree by `least` with an image's after `align`."""
    masks = F.avg_pool2d(pack.rgba[:, 3:].float() / 255, 2)
    centres, sizes = boxes(masks[:, 0] > 0.5)
    of_concept: dict[str, list[int]] = {}
    for i, row in enumerate(pack.rows):
        of_concept.setdefault(row["id"], []).append(i)
    both = [(i, j) for members in of_concept.values() for i in members for j in members if i != j]
    of_image: list[list[tuple[int, torch.Tensor]]] = [[] for _ in pack.rows]
    for start in range(0, len(both), 1024):
        target, reference = torch.tensor(both[start : start + 1024]).T
        scale = (sizes[reference] / sizes[target])[:, None]
        align = torch.cat([scale, centres[reference] - scale * centres[target]], 1)
        place = onto(align, torch.eye(2, 3).expand(len(target), -1, -1))
        grid = F.affine_grid(place, [len(target), 1, *masks.shape[-2:]], align_corners=False)
        moved = F.grid_sample(masks[reference], grid, align_corners=False)
        agree = overlap(moved > 0.5, masks[target] > 0.5) >= least
        for i, j, one in zip(target[agree].tolist(), reference[agree].tolist(), align[agree], strict=True):
            of_image[i].append((j, one))
    most = max(1, max(map(len, of_image)))
    index = torch.arange(len(pack.rows))[:, None].repeat(1, most)
    aligns = torch.tensor([1.0, 0.0, 0.0]).repeat(len(pack.rows), most, 1)
    for i, members in enumerate(of_image):
        for k, (j, one) in enumerate(members):
            index[i, k], aligns[i, k] = j, one
    return Partners(index, aligns, torch.tensor([len(members) for members in of_image]))


# -- words -----------------------------------------------------------------------------------------------------------------


def captions_of(row: dict, rng: random.Random) -> list[str]:
    """The prompts of an image, in the order of FORMS."""
    style, (start, _) = STYLES[row["style"]], parts(row)
    name = plain_name(row)
    words = [word for word in row["keywords"] if len(word) > 2 and word.replace(" ", "").isalpha()] or [name]
    word = rng.choice(words)
    plain = f"{article(name) if start else ''}{name}, {style}"
    return [canonical(row), plain, f"{article(word)}{word}, {style}", style, ""]


# -- pairs -----------------------------------------------------------------------------------------------------------------


def placed(rgba: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 4, H, W] -> a layer [B, 4, H, W] in [0, 1], its colours multiplied by alpha, sampled by `place`."""
    layer = rgba.float() / 255
    layer = torch.cat([layer[:, :3] * layer[:, 3:], layer[:, 3:]], 1)
    grid = F.affine_grid(place, list(layer.shape), align_corners=False)
    return F.grid_sample(layer, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def over(top: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
    return top + (1 - top[:, 3:]) * bottom


def on_paper(layer: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """A layer over `background` [B, 3], [B, 3, H, W] in [0, 1]."""
    return layer[:, :3] + (1 - layer[:, 3:]) * background[..., None, None]


def with_hue(layer: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """A layer with its colours turned about the grey axis."""
    return torch.cat([torch.minimum(turn_hue(layer[:, :3], degrees), layer[:, 3:]), layer[:, 3:]], 1)


def any_below(count: torch.Tensor) -> torch.Tensor:
    """Random integers from 0 to `count` - 1 [B]; 0 where the count is 0."""
    return torch.minimum((torch.rand(len(count), device=count.device) * count).long(), (count - 1).clamp(min=0))


@dataclass(frozen=True)
class Batch:
    """references and targets [B, 3, 128, 128] in [-1, 1]; token ids int16 [B, T] of the targets' prompts."""

    reference: torch.Tensor
    target: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class Shares:
    """How often what is drawn."""

    style: float = 0.35  # of the references: another style of the concept
    of_other: float = 0.30  # a doodle of another style
    same: float = 0.05  # the target itself; all others are doodles of the target
    still: float = 0.3  # of the pairs: as they are in the pack
    turned_hue: float = 0.25
    two: float = 0.15  # two objects
    white: float = 0.65  # backgrounds
    soft: float = 0.25  # of the references that are no doodles: blurred


class Pairs:
    """The pack on the device, drawn from without the host, so that a CUDA graph can hold it.

    ids: int16 [N, FORMS, T], the prompts of every image.
    """

    def __init__(self, pack: Pack, ids: torch.Tensor, device, shares: Shares | None = None):
        self.shares = shares or Shares()
        self.rgba, self.ids, self.device = pack.rgba.to(device), ids.to(device), device
        self.partners = find_partners(pack).to(device)
        self.still = torch.tensor([1.0, 0.0, 0.0], device=device)
        self.weights = cumulated(row_weights(pack.rows, STYLE_SHARES)).to(device)
        self.forms = torch.stack([cumulated(torch.tensor(one)) for one in FORM_SHARES]).to(device)
        self.backgrounds = background_rgb(list(BACKGROUNDS), device)
        styles = list(STYLES)
        of_style = [[i for i, row in enumerate(pack.rows) if row["style"] == style] or [0] for style in styles]
        self.style_counts = torch.tensor([len(one) for one in of_style], device=device)
        self.of_style = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in of_style], batch_first=True).to(device)
        self.style = torch.tensor([styles.index(row["style"]) for row in pack.rows], device=device)

    def _partner(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A partner of each image and how it is moved onto the image; the image itself where it has none."""
        which = any_below(self.partners.count[index])
        return self.partners.index[index, which], self.partners.align[index, which]

    def _layers(self, index: torch.Tensor, other: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layers of the target and of its reference, a partner where `other` [B] is True."""
        partner, align = self._partner(index)
        source = torch.where(other, partner, index)
        moved = onto(torch.where(other[:, None], align, self.still), place)
        return placed(self.rgba[index], place), placed(self.rgba[source], moved)

    def _places(self, count: int, two: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Affine maps of the only or first and of the second object."""

        def between(low: float, high: float, *shape: int) -> torch.Tensor:
            return low + (high - low) * torch.rand(count, *shape, device=self.device)

        still = (torch.rand(count, device=self.device) < self.shares.still) & ~two
        scale = torch.where(two, between(0.42, 0.62), torch.where(still, 1.0, between(0.65, 1.12)))
        apart = between(26, 34, 1) * F.normalize(torch.randn(count, 2, device=self.device))
        shift = torch.where(two[:, None], apart, between(-14, 14, 2) * ~still[:, None])
        turn = between(-0.25, 0.25) * ~still
        mirror = torch.where((torch.rand(count, device=self.device) < 0.5) & ~still, -1.0, 1.0)
        columns = torch.stack([mirror, torch.ones_like(mirror), torch.ones_like(mirror)], 1)[:, None]
        second = placement(between(0.42, 0.62), -apart, between(-0.25, 0.25))
        return placement(scale, shift, turn) * columns, second

    def prompts(self, index: torch.Tensor, turned: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] of one of the prompts of each image, which has another hue or another object beside it."""
        case = torch.where(two, 2, torch.where(turned, 1, 0))
        number = torch.rand(len(index), 1, dtype=torch.float64, device=self.device)
        form = (number >= self.forms[case]).sum(1).clamp(max=len(FORMS) - 1)
        return self.ids[index, form]

    def draw(self, count: int) -> Batch:
        """`count` pairs."""
        device, shares = self.device, self.shares
        index = pick(self.weights, count)
        style = self.style[index]
        two = torch.rand(count, device=device) < shares.two
        turned = (torch.rand(count, device=device) < shares.turned_hue) & ~two
        kind = torch.rand(count, device=device)
        has = self.partners.count[index] > 0
        other = (kind < shares.style + shares.of_other) & has
        as_it_is = ((kind < shares.style) & has) | (kind > 1 - shares.same)

        place, second_place = self._places(count, two)
        target, source = self._layers(index, other, place)
        second = self.of_style[style, any_below(self.style_counts[style])]
        second_target, second_source = self._layers(second, other, second_place)
        both = two[:, None, None, None]
        target = torch.where(both, over(second_target, target), target)
        source = torch.where(both, over(second_source, source), source)
        degrees = torch.where(turned, 360 * torch.rand(count, device=device), 0.0)
        target, source = with_hue(target, degrees), with_hue(source, degrees)

        named = self.backgrounds[torch.randint(len(self.backgrounds), (count,), device=device)]
        anything = torch.where(torch.rand(count, 1, device=device) < 0.5, named, torch.rand(count, 3, device=device))
        background = torch.where(torch.rand(count, 1, device=device) < shares.white, 1.0, anything)
        plain = on_paper(source, background)
        soft = F.avg_pool2d(plain, 3, 1, 1, count_include_pad=False)
        plain = torch.where(chance(shares.soft, count, device), torch.lerp(plain, soft, uniform(0, 1, count, device)), plain)
        reference = torch.where(as_it_is[:, None, None, None], plain, doodle(source, background))

        ids = self.prompts(index, turned, two)
        return Batch(reference * 2 - 1, on_paper(target, background) * 2 - 1, ids)
