"""The reference images of each family: their sizes, position ids and tensors, as in the pipelines (diffusers
pipelines/flux2/pipeline_flux2_klein.py and pipeline_flux2_klein_kv.py, pipelines/flux/pipeline_flux_kontext.py,
pipelines/qwenimage/pipeline_qwenimage_edit.py and pipeline_qwenimage_edit_plus.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from streamflow.conditioning.prompt import Cond, Extend, Prompt
from streamflow.conditioning.reference import Entering, Grid, Reference, ReferenceRule, Size
from streamflow.image_utils import uint8_pixels

if TYPE_CHECKING:
    from streamflow.models.adapter import FlowAdapter
    from streamflow.models.protocols import Arguments

MOST_PIXELS = 1024**2  # of a reference; larger ones are scaled down
PARTS = 8  # kept keys and values are renewed in eighths of all tokens, so that few shapes occur


class Flux2References(ReferenceRule):
    """At their own size, at most 1024 x 1024 pixels, cropped to whole tokens. Reference i is at time 10 + 10 i."""

    shortest, narrowest = 64, 8  # pixels of a side, and the ratio of the sides, as Flux2ImageProcessor.check_image_input

    def sizes(self, adapter: FlowAdapter, size: Size, arguments: Arguments) -> tuple[Size, Size]:
        width, height = size
        if min(size) < self.shortest or max(size) > self.narrowest * min(size):
            raise ValueError(
                f"a reference of {width}x{height} pixels: {type(adapter.pipe).__name__} takes sides of {self.shortest} and "
                f"more, the longer at most {self.narrowest} times the shorter"
            )
        if width * height > MOST_PIXELS:
            scale = math.sqrt(MOST_PIXELS / (width * height))
            width, height = int(width * scale), int(height * scale)
        return (width, height), whole_tokens(adapter, (width, height))

    def in_tokens(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def ids(self, grids: Sequence[Grid], like: Tensor) -> Tensor:
        """`[1, n, 4]`: time, row, column and 0 (`_prepare_image_ids`)."""
        return _flux2_ids(tuple(grids), like.device, like.dtype)


class Flux2CachedReferences(Flux2References):
    """Keys and values of the references, which depend on the references alone, are computed once, when a frame enters. They
    are the network's argument `reference_kv` `[1, blocks, 2, n, heads, head_dim]`."""

    keeps = True

    @torch.no_grad()
    def extend(self, adapter: FlowAdapter, references: Sequence[Reference], entering: Entering) -> Extend:
        from streamflow.models.families.flux2_kv import keys_and_values, with_new_tokens

        tokens = self.tokens(references)
        ids = self.ids(tuple(one.grid for one in references), entering.prompt.cond.shared["img_ids"])
        kept: Kept | None = None if entering.reuse is None else entering.memory.get("kept")
        images = [one.image for one in references]
        changed = None if kept is None else kept.changed(images, entering.reuse or 0.0, adapter.multiple)
        if kept is None or changed is None:
            x, cond = self.in_tokens(entering.x), entering.prompt.cond
            text = cond.rows["encoder_hidden_states"], cond.shared["txt_ids"]
            kv = keys_and_values(adapter.net, tokens, ids, x, cond.shared["img_ids"], *text, entering.time, entering.exact)
            kept = Kept(tuple(images), kv)
        elif len(changed):
            kv = with_new_tokens(adapter.net, tokens, ids, kept.kv, changed)
            kept = kept.renewed(images, changed, kv, adapter.multiple)
        entering.memory["kept"] = kept
        rows = {"reference_kv": kept.kv}
        if not entering.exact:
            return lambda cond, prompt: cond.with_tensors(rows)
        rows |= {"references": tokens, "reference_time": entering.time}

        def extend(cond: Cond, prompt: Prompt) -> Cond:
            return cond.with_tensors(rows, {"reference_ids": ids})

        return extend


@dataclass(frozen=True, eq=False)
class Kept:
    """Keys and values of references, and the images of which each token's were computed, `[1, 3, h, w]` each."""

    images: tuple[Tensor, ...]
    kv: Tensor

    def changed(self, images: Sequence[Tensor], tolerance: float, side: int) -> Tensor | None:
        """The tokens of which a pixel, or one of a neighbour, differs by more than the tolerance, on the references' device,
        filled up to an eighth of all tokens; None where that is all of them, or where sizes differ. On a GPU the host
        waits for their number."""
        if [one.shape for one in images] != [one.shape for one in self.images]:
            return None
        found = []
        for new, old in zip(images, self.images, strict=True):
            apart = max_pool2d((new - old).abs().amax(1, keepdim=True), side)
            found.append(max_pool2d(apart, 3, stride=1, padding=1).flatten())
        apart = torch.cat(found)
        count, part = int((apart > tolerance).sum()), -(-len(apart) // PARTS)
        wanted = -(-count // part) * part
        return None if wanted >= len(apart) else apart.topk(wanted).indices.sort().values

    def renewed(self, images: Sequence[Tensor], changed: Tensor, kv: Tensor, side: int) -> Kept:
        """These keys and values, and the new images where their tokens are among those that have changed."""
        made, start = [], 0
        for new, old in zip(images, self.images, strict=True):
            height, width = new.shape[-2] // side, new.shape[-1] // side
            mask = torch.zeros(height * width, dtype=torch.bool, device=new.device)
            own = changed[(changed >= start) & (changed < start + len(mask))] - start
            mask[own] = True
            pixels = mask.reshape(height, width).repeat_interleave(side, 0).repeat_interleave(side, 1)
            made.append(torch.where(pixels, new, old))
            start += len(mask)
        return Kept(tuple(made), kv)


class KontextReferences(ReferenceRule):
    """One reference, resized to the closest of the model's resolutions; with `_auto_resize=False` at its own size, in whole
    tokens. Its tokens are at time 1."""

    most = 1

    def sizes(self, adapter: FlowAdapter, size: Size, arguments: Arguments) -> tuple[Size, Size]:
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        if arguments.get("_auto_resize", True):
            width, height = whole_tokens(adapter, size)
            size = min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda one: (abs(width / height - one[0] / one[1]), *one))
        size = whole_tokens(adapter, size)
        return size, size

    def ids(self, grids: Sequence[Grid], like: Tensor) -> Tensor:
        """`[n, 3]`: 1, row and column (`prepare_latents`)."""
        return _kontext_ids(tuple(grids), like.device, like.dtype)


class QwenImageEditReferences(ReferenceRule):
    """One reference. The language model sees it with the prompt, so every frame is encoded by the pipeline's own code, up to
    its first step, from an image of 8 bits a channel."""

    least, most = 1, 1
    uses_codec = False
    reusable = True

    def sizes(self, adapter: FlowAdapter, size: Size, arguments: Arguments) -> tuple[Size, Size]:
        return size, size  # the pipeline resizes it

    def extend(self, adapter: FlowAdapter, references: Sequence[Reference], entering: Entering) -> Extend:
        images = [PIL.Image.fromarray(uint8_pixels(one.image)[0]) for one in references]
        given = images[0] if self.most == 1 else images
        read: dict[Prompt, Prompt] = {}  # by the frame's prompt, which an update may replace

        def extend(cond: Cond, prompt: Prompt) -> Cond:
            if prompt not in read:
                read.clear()
                read[prompt] = entering.read({"image": given})
            return read[prompt].cond if cond is prompt.cond else read[prompt].negative

        return extend


class QwenImageEditPlusReferences(QwenImageEditReferences):
    """One reference or several."""

    most = None


@lru_cache(maxsize=64)  # a copy to a GPU would wait for what runs there
def _flux2_ids(grids: tuple[Grid, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    one = torch.zeros(1, dtype=torch.int64)
    ids = [
        torch.cartesian_prod(one + 10 + 10 * i, torch.arange(height), torch.arange(width), one)
        for i, (height, width) in enumerate(grids)
    ]
    return torch.cat(ids)[None].to(device, dtype)


@lru_cache(maxsize=64)
def _kontext_ids(grids: tuple[Grid, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    ids = [torch.cartesian_prod(torch.ones(1), torch.arange(float(h)), torch.arange(float(w))) for h, w in grids]
    return torch.cat(ids).to(device, dtype)


def whole_tokens(adapter: FlowAdapter, size: Size) -> Size:
    """The largest size of whole tokens within this one. ValueError where there is none."""
    width, height = (side // adapter.multiple * adapter.multiple for side in size)
    if not width or not height:
        raise ValueError(
            f"a reference of {size[0]}x{size[1]} pixels is smaller than one token, {adapter.multiple}x{adapter.multiple}"
        )
    return width, height
