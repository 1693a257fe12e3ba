"""How a stream inpaints: what `inpaint` and masks of single frames set, and where it joins the frames. The rule itself is in
`streamflow.conditioning.inpaint`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamflow.conditioning.inpaint import Pasted, Region, known_rows, paste_of, read_mask
from streamflow.stream.grad_mode import computing
from streamflow.stream.ring import Done, Group

Regions = Sequence[Region | None]


class Inpainting:
    """Mixed into `StreamFlow`."""

    _regions: tuple[Region, ...] | None = None
    _paste = True

    @computing
    def inpaint(self, image: Any = None, mask: Any = None, paste: bool = True) -> None:
        """Draw only part of the frames that enter from now on; the rest is known and follows its own noised path. What is
        set stays, through `prepare` too, until `inpaint(None)` ends it; frames under way keep what they entered with.

        image: the known picture, of the size of the stream or stretched to it; F of them: one a row of the frame buffer.
            None: each frame's own picture is kept where the mask is black.
        mask: white (1, 255, True) where frames are drawn, black where they are known, as diffusers'; in the stream's size;
            one, or F of them. Grey counts as white from one half on. `conditioning.inpaint.read_mask` lists the
            forms.
        paste: put the known pixels back into the drawn picture, since the VAE alters them. Holds for the masks of single
            calls (`stream(image, mask=...)`) too.

        Latents are larger than pixels: one is drawn where the mask is white in its upper left pixel, as in the pipelines.
        To be called by the thread that draws.

        Raises:
            TypeError, ValueError: no mask, a mask of another size, values or form, another number than 1 or F. Then all is
                as it was.
        """
        self._check_open()
        self.adapter.check_offers("images")
        if not isinstance(paste, bool):
            raise TypeError(f"paste is True or False, not {paste!r}")
        if mask is None and image is not None:
            raise ValueError("inpaint(image) needs a mask, white where to draw; inpaint(None) ends inpainting")
        regions = None if mask is None else self._make_regions(self._read_mask(mask), image, paste)
        self._regions, self._paste = regions, paste
        self._redraw()

    def _read_mask(self, mask: Any) -> Tensor:
        return read_mask(mask, self.height, self.width, self._check)

    def _make_regions(self, masks: Tensor, image: Any, paste: bool) -> tuple[Region, ...]:
        """One region a row of the frame buffer."""
        pictures = None if image is None else self.preprocess(image).clone()  # kept, and its memory is the caller's
        for name, given in (("masks", masks), ("pictures", pictures)):
            if given is not None and len(given) not in (1, self.frame_bff_size):
                raise ValueError(
                    f"{len(given)} {name} for a frame buffer of {self.frame_bff_size}: pass one for all frames, or one each"
                )
        drawn = self._to_device(masks.float())
        small = self.adapter.latent_mask(drawn, self.height, self.width)
        x0 = None if pictures is None else self._clean_latents(pictures)
        pictures = None if pictures is None else self._upload(pictures)
        whole = drawn > 0.5
        return tuple(
            Region(_row(whole, i), _row(small, i), _row(pictures, i), _row(x0, i), paste) for i in range(self.frame_bff_size)
        )

    def _masked(self, pictures: Tensor, mask: Any) -> tuple[Regions | None, Tensor]:
        """(the regions of frames that come from these pictures, what the similarity filter is to compare)."""
        if mask is None:
            return self._regions, pictures
        masks = self._read_mask(mask)
        regions = self._make_regions(masks, None, self._paste)
        if not self.similar_image_filter:
            return regions, pictures
        shown = masks.to(pictures.device, pictures.dtype).expand(len(pictures), -1, -1, -1)
        return regions, torch.cat((pictures.as_subclass(Tensor), shown), 1)

    def _text_regions(self, mask: Any = None) -> Regions | None:
        """The regions of frames that start from noise, which have no picture of their own and so no mask."""
        if mask is not None:
            raise ValueError("a mask says what of a picture is known, and there is none: pass both, or inpaint(image, mask)")
        if self._regions and any(one.picture is None for one in self._regions):
            raise ValueError(
                "inpaint(mask=...) keeps each frame's own picture, and a frame drawn from noise has none: "
                "pass inpaint(image, mask)"
            )
        return self._regions

    def _knowing(self, group: Group, regions: Regions | None, x0: Tensor | None = None, own: Tensor | None = None) -> Group:
        """The group with what is known of its frames, which came from clean latents x0 of the pictures `own`."""
        if regions is None or not any(regions):
            return group
        own = None if own is None else self._upload(own)
        known = known_rows(regions, x0, group.noise)
        x = known.put(group.x, self._running().first_sigma, self.adapter.path)
        return replace(group, x=x, known=known, paste=paste_of(regions, own))

    def _decode(self, done: Done) -> Tensor:
        """The pictures of a group that has left, `[F, 3, H, W]`."""
        pictures = self.decode_image(done.x0)
        return pictures if done.paste is None else done.paste(pictures)

    def _decode_later(self, done: Done) -> Any:
        """As `_decode`, under way (`Codec.decode_later`)."""
        decoding = self.codec.decode_later(done.x0)
        return decoding if done.paste is None else Pasted(decoding, done.paste)


def _row(values: Tensor | None, i: int) -> Tensor | None:
    """Row i of these, or their only one."""
    return None if values is None else values[i % len(values)].unsqueeze(0)
