"""What enters a stream: images, noise and conditions become groups of rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from streamflow._validation import is_whole_number
from streamflow.conditioning.prompt import Prompt
from streamflow.conditioning.reference import OwnSize, several
from streamflow.flow.noise import NoiseSource
from streamflow.image_utils import (
    Images,
    Normalized,
    Sizes,
    check_range,
    check_values,
    image_tensor,
    images_of_own_size,
    normalize_image,
)
from streamflow.stream.conditioner import Conditioner, Conditions, Start
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.image_checks import RangeChecks
from streamflow.stream.model import Model
from streamflow.stream.request import Prepared
from streamflow.stream.ring import Carried, Group

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments
    from streamflow.stream.references import References

logger = logging.getLogger(__name__)


class ImageReader:
    """Makes tensors of images.

    input_range: of float images. resize: stretch images of other sizes, or refuse them. check: also look for NaN in images
    on a GPU, which makes the host wait; otherwise they are checked later, in `ranges`, whose errors later calls raise.
    """

    def __init__(
        self,
        model: Model,
        denoiser: Denoiser,
        input_range: tuple[float, float] = (0, 1),
        resize: bool = True,
        check: bool = False,
    ) -> None:
        check_range(input_range)
        self._model, self.ranges = model, RangeChecks()
        self.input_range, self._resize, self.check = input_range, resize, check
        denoiser.before_flush.add(self.ranges.raise_failed)
        denoiser.on_empty.add(self.ranges.clear)

    def read(self, image: Images, what: str) -> Tensor:
        """An image or several as `[n, 3, height, width]` in [-1, 1]. what: the image's name in errors."""
        model, check = self._model, check_values if self.check else partial(self.ranges.add, what)
        return image_tensor(image, model.height, model.width, self.input_range, self._resize, check)

    def each(self, image: Images, what: str, sizes: Sizes | None = None) -> list[Tensor]:
        """An image or several as `[1, 3, h, w]` in [-1, 1] each, in sizes of their own (`images_of_own_size`)."""
        check = check_values if self.check else partial(self.ranges.add, what)
        return images_of_own_size(image, sizes, self.input_range, check)

    def preprocess(self, image: Images) -> Normalized:
        """An image or several to `[n, 3, height, width]` in [-1, 1], marked, so that no later call converts it again."""
        model, what = self._model, "an image given to preprocess"
        check = check_values if self.check else partial(self.ranges.add, what)
        return normalize_image(image, model.height, model.width, self.input_range, self._resize, check)


@dataclass(frozen=True, eq=False)
class Read:
    """The arguments of a call, read. images: from which its frames start; None: from noise. seen: the images that the
    similarity filter compares; None: none. conditions: by conditioner, with an entry a frame."""

    images: Tensor | None
    seen: Tensor | None
    conditions: Conditions


class Inputs:
    """Reads the arguments of calls, and makes the groups that enter. conditioners: the conditions that are arguments.
    references: one more, which takes the image where it is a reference."""

    def __init__(
        self,
        model: Model,
        denoiser: Denoiser,
        reader: ImageReader,
        conditioners: Sequence[Conditioner] = (),
        references: References | None = None,
    ) -> None:
        self._model, self._denoiser, self.reader = model, denoiser, reader
        self._references = references
        self.conditioners = conditioners if references is None else (*conditioners, references)
        self._fixed: tuple[NoiseSource, Tensor] | None = None  # a source, and its fixed noise on the device
        self._logged: set[str] = set()

    # -- images ---------------------------------------------------------------------------------------------------------

    def images(self, image: Images) -> Tensor:
        """The images of the frames that come next, `[n, 3, H, W]` in [-1, 1]. Raises ValueError for an earlier image on a
        GPU whose values were out of range; the new ones are checked by a later call, since nothing waits for the GPU."""
        self._raise_earlier()
        return self.reader.read(image, f"the image of frame {self._denoiser.next_id}")

    def read(self, image: Images, given: Arguments, row: int | None = None) -> Read:
        """Read the image or the images of a call, and its other arguments. row: of the only frame in its group; None: the
        call brings a whole group."""
        images, seen = None, None
        if self._references is not None and self._model.image_is_reference:
            self._raise_earlier()
            first = self._references.images(image, f"the image of frame {self._denoiser.next_id}")
            given = {**given, "reference": (OwnSize(first), *several(given.get("reference")))}
            count = len(first)
            seen = torch.cat(first) if len({one.shape for one in first}) == 1 else None
        else:
            images = seen = self.images(image)
            count = len(images)
        if row is None and count != self._model.frames:
            raise ValueError(f"{count} images for a frame buffer of {self._model.frames}")
        if row is not None and count != 1:
            raise ValueError(f"frames() takes one image at a time, not {count}")
        return Read(images, seen, self._entries(given, images, range(row or 0, (row or 0) + count)))

    def conditions(self, given: Arguments, images: Tensor | None, positions: range) -> Conditions:
        """The arguments of a call besides images, read by each conditioner that is active or has an argument here. Without
        images it raises for an earlier one, as `images` does."""
        if images is None:
            self._raise_earlier()
        return self._entries(given, images, positions)

    def _entries(self, given: Arguments, images: Tensor | None, positions: range) -> Conditions:
        return [
            (one, one.read(given.get(one.name), images, positions))
            for one in self.conditioners
            if one.active or given.get(one.name) is not None
        ]

    def _raise_earlier(self) -> None:
        """Raise ValueError for an earlier image on a GPU whose values were out of range."""
        if self.reader.ranges.pending:
            self.reader.ranges.raise_failed()

    def compared(self, images: Tensor | None, conditions: Conditions) -> Tensor | None:
        """What the similarity filter compares, `[n, C, H, W]`: the images, and what the conditioners add. None without."""
        if images is None:
            return None
        added = [one.compared(entries) for one, entries in conditions]
        parts = [_like(part, images) for part in added if part is not None]
        return torch.cat((images, *parts), 1) if parts else images

    def group_count(self, batch_size: int | None, latents: Tensor | None) -> int:
        """The number of groups that a call of txt2img returns."""
        frames = self._model.frames
        n = batch_size if batch_size is not None else frames if latents is None else len(latents)
        if not is_whole_number(n) or n < 1 or n % frames:
            raise ValueError(f"batch_size must be a positive multiple of frame_buffer_size {frames}, not {n!r}")
        if latents is not None:
            self._model.check_rows(latents, n)
        return n // frames

    # -- groups ---------------------------------------------------------------------------------------------------------

    def group(
        self,
        ids: tuple[int, ...],
        conditions: Conditions = (),
        images: Tensor | None = None,
        latents: Tensor | None = None,
        anchor: Tensor | None = None,
        prompts: tuple[Prompt, ...] | None = None,
    ) -> Group:
        """The group of the frames with these numbers, one a row.

        images: `[F, 3, H, W]` in [-1, 1]; without them the frames start from noise, or from `latents` `[F, ...]`. anchor:
        `[F, ...]`, the clean latents of frames without images.
        prompts: one a frame; by default the stream's own.
        """
        model, denoiser = self._model, self._denoiser
        state, engine = denoiser.drawing()
        mode, rule = engine.settings.mode, engine.settings.rule
        fixed = images is not None and state.request.noise == "fixed"
        for one, entries in conditions:
            one.begin(entries, images)
        x0, carried = None, {}
        if fixed:
            noise = self.fixed_noise(state.noise)
        elif latents is None:
            noise = model.to_device(torch.cat([state.noise.draw(i) for i in ids]))
        else:
            noise = latents.to(model.device, model.dtype)
        x = noise
        if images is not None:
            if state.stages.sigmas[0] >= 1.0 and not any(one.uses_image and any(entries) for one, entries in conditions):
                self._log_once("t_index_list starts at sigma 1, pure noise, so the image's pixels are ignored")
            x0 = model.encode(images)
            noise = noise.expand_as(x0)
            start = x0
            if state.request.feedback and denoiser.last_x0 is not None:
                start = self.with_feedback(x0, state.request.feedback, denoiser.last_x0)
            x = model.adapter.path(start, noise, engine.first_sigma)
            anchor = start
        elif mode.name == "self" and latents is None and not model.image_is_reference:
            self._log_once("text frames have no anchor: under cfg_type='self' they are drawn without guidance")
        if mode.carries_anchor and anchor is not None:
            carried["anchor"] = Carried(anchor.float())
        if rule.noise == "own":
            carried["noise"] = Carried(noise)
        draws = self._draws(state, ids, fixed) if rule.noise == "fresh" else None
        group = Group(x, prompts or (state.prompt,) * len(ids), ids, carried, draws)
        if conditions:
            start = Start(noise, engine.first_sigma, x0, images)
            for one, entries in conditions:
                group = one.join(group, entries, start)
        return group

    def fixed_noise(self, source: NoiseSource) -> Tensor:
        """The noise of a source that image frames share, `[1, ...]` on the device."""
        if self._fixed is None or self._fixed[0] is not source:
            self._fixed = source, self._model.to_device(source.fixed())
        return self._fixed[1]

    @staticmethod
    def with_feedback(x0: Tensor, feedback: float, last: Tensor) -> Tensor:
        """Clean latents with those of the last frame that has left mixed in, where these are finite."""
        return torch.where(torch.isfinite(last).all(), torch.lerp(x0, last.expand_as(x0), feedback), x0)

    def _draws(self, state: Prepared, ids: tuple[int, ...], fixed: bool) -> Tensor:
        """Noise for every step of these frames, float32 `[S, F, ...]`; `fixed`: the same for all frames."""
        source, steps = state.noise, len(state.stages)
        if fixed:
            draws = source.fixed_steps(steps).unsqueeze(1).expand(-1, len(ids), *self._model.shape)
        else:
            draws = torch.stack([source.draw_steps(i, steps) for i in ids], dim=1)
        return self._model.to_device(draws, torch.float32)

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.warning(message)


def _like(part: Tensor, images: Tensor) -> Tensor:
    """Images in the size of others, on their device."""
    part = part.to(images.device, images.dtype)
    return part if part.shape[-2:] == images.shape[-2:] else interpolate(part, images.shape[-2:])
