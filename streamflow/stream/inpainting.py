"""Inpainting as a condition of frames: the settings of `inpaint`, and the masks of single calls. The mathematics is in
`streamflow.conditioning.inpaint`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from streamflow._grad_mode import computing
from streamflow.conditioning.inpaint import MASK, Region, known_rows, paste_of, put_known, read_mask
from streamflow.conditioning.prompt import Prompt
from streamflow.image_utils import Images
from streamflow.stream.conditioner import Conditioner, Start
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.inputs import ImageReader
from streamflow.stream.model import Model
from streamflow.stream.ring import Carried, Group


class Inpainting(Conditioner):
    """The conditioner of masks. redraw: called when what is drawn has changed."""

    name = "mask"
    uses_image = True

    def __init__(self, model: Model, denoiser: Denoiser, redraw: Callable[[], None], reader: ImageReader) -> None:
        self._model, self._denoiser, self._redraw, self._reader = model, denoiser, redraw, reader
        self.active = False  # frames are inpainted where a call brings no mask
        self._regions: tuple[Region, ...] | None = None
        self._paste = True

    @computing
    def inpaint(self, image: Images | None = None, mask: Images | None = None, paste: bool = True) -> None:
        """Draw only part of the frames that enter from now on; the rest is known and follows its own noised path. What is
        set stays, through `prepare` too, until `inpaint(None)` ends it; frames in flight keep what they entered with.

        image: the known image, of the size of the stream or stretched to it; F of them: one a row of the frame buffer.
            None: each frame's own image is kept where the mask is black.
        mask: white (1, 255, True) where frames are drawn, black where they are known, as diffusers'; in the stream's size;
            one, or F of them. Grey counts as white from one half on. `conditioning.inpaint.read_mask` lists the forms.
        paste: put the known pixels back into the drawn image, since the VAE alters them. Holds for the masks of single
            calls (`stream(image, mask=...)`) too.

        Latents are larger than pixels: one is drawn where the mask is white in its upper left pixel, as in the pipelines.
        To be called by the thread that draws.

        Raises:
            TypeError, ValueError: no mask, a mask of another size, values or form, another number than 1 or F. Then all is
                as it was.
        """
        self._model.check_open()
        self._model.adapter.check_offers("images")
        if not isinstance(paste, bool):
            raise TypeError(f"paste is True or False, not {paste!r}")
        if mask is None and image is not None:
            raise ValueError("inpaint(image) needs a mask, white where to draw; inpaint(None) ends inpainting")
        regions = None if mask is None else self._make_regions(self._read_mask(mask), image, paste)
        self._regions, self._paste, self.active = regions, paste, regions is not None
        self._redraw()

    def read(self, given: Images | None, images: Tensor | None, positions: range) -> list[Region | None]:
        """One region a frame, of the mask of this call or of what `inpaint` has set."""
        regions = self._regions
        if images is None:
            if given is not None and self._model.image_is_reference:
                raise ValueError(
                    "the image of a call is a reference here, and a mask says what is kept of the image from which a frame "
                    "starts: call inpaint(image, mask), or make the stream with image_as='start'"
                )
            if given is not None:
                raise ValueError("a mask belongs to an image, and there is none: pass both, or call inpaint(image, mask)")
            if regions and any(one.image is None for one in regions):
                raise ValueError(
                    "inpaint(mask=...) keeps each frame's own image, and a frame drawn from noise has none: "
                    "pass inpaint(image, mask)"
                )
        elif given is not None:
            masks = self._read_mask(given)
            regions = self._make_regions(masks, None, self._paste)
            regions = tuple(replace(one, given=_row(masks, i)) for i, one in enumerate(regions))
        return [regions[i % len(regions)] if regions else None for i in positions]

    def compared(self, entries: Sequence[Region | None]) -> Tensor | None:
        """The masks of this call."""
        masks = [one.given for one in entries if one is not None and one.given is not None]
        return torch.cat(masks) if masks else None

    def example(self, prompt: Prompt) -> Prompt:
        """The prompt itself."""
        return prompt

    def join(self, group: Group, entries: Sequence[Region | None], start: Start) -> Group:
        """The group with the known parts of its frames."""
        if not any(entries):
            return group
        known = known_rows(entries, start.x0, start.noise)
        carried = {name: Carried(value, 1.0 if name == MASK else 0.0) for name, value in known.items()}
        return replace(
            group,
            x=put_known(group.x, known, start.sigma, self._model.adapter.path),
            carried={**group.carried, **carried},
            finish=paste_of(entries, None if start.images is None else self._model.upload(start.images)),
        )

    def _read_mask(self, mask: Images) -> Tensor:
        return read_mask(mask, self._model.height, self._model.width, self._reader.check)

    def _make_regions(self, masks: Tensor, image: Images | None, paste: bool) -> tuple[Region, ...]:
        """One region a row of the frame buffer."""
        model = self._model
        images = None if image is None else self._reader.preprocess(image).clone()  # kept, and its memory is the caller's
        for name, given in (("masks", masks), ("images", images)):
            if given is not None and len(given) not in (1, model.frames):
                raise ValueError(
                    f"{len(given)} {name} for a frame buffer of {model.frames}: pass one for all frames, or one each"
                )
        drawn = model.to_device(masks.float())
        small = model.adapter.latent_mask(drawn, model.height, model.width)
        x0 = None if images is None else model.encode(images)
        images = None if images is None else model.upload(images)
        whole = drawn > 0.5
        return tuple(
            Region(
                mask=_row(whole, i),
                latent_mask=_row(small, i),
                image=None if images is None else _row(images, i),
                x0=None if x0 is None else _row(x0, i),
                paste=paste,
            )
            for i in range(model.frames)
        )


def _row(values: Tensor, i: int) -> Tensor:
    """Row i of these, or their only row, `[1, ...]`."""
    return values[i % len(values)].unsqueeze(0)
