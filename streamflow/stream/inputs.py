"""What enters the ring: the groups of rows made of pictures, of text or of given latents, their noise and their anchors.

Mixed into `StreamFlow`, whose codec, noise and settings it uses; knows no ring and no loop but their first sigma.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from streamflow.stream.inpainting import Regions
from streamflow.stream.ring import Group

logger = logging.getLogger(__name__)


class Entering:
    """Mixed into `StreamFlow`."""

    _next_id: int
    _said: set[str]
    _held_noise: tuple[Any, Tensor | None]
    _last_x0: Tensor | None

    def _fed_back(self, x0: Tensor) -> Tensor:
        """Clean latents with those of the last frame that has left mixed in, where these are finite."""
        feedback, last = self._prepared().request.feedback, self._last_x0
        if not feedback or last is None:
            return x0
        return torch.where(torch.isfinite(last).all(), torch.lerp(x0, last.expand_as(x0), feedback), x0)

    def _next_ids(self, count: int) -> tuple[int, ...]:
        """The numbers of the next frames, which they have once they have entered."""
        return tuple(range(self._next_id, self._next_id + count))

    def _fixed_noise(self) -> Tensor:
        """The noise that image frames share, on the device."""
        source, held = self._held_noise
        if source is not self._prepared().noise:
            source = self._prepared().noise
            held = self._to_device(source.fixed())
            self._held_noise = source, held
        return held

    def _to_device(self, noise: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if self.device.type == "cuda" and noise.device.type == "cpu":
            noise = noise.pin_memory()
        return noise.to(self.device, non_blocking=True).to(dtype or self.dtype)

    def _upload(self, pictures: Tensor) -> Tensor:
        return pictures.as_subclass(Tensor).to(self.device, non_blocking=True)

    def _clean_latents(self, pictures: Tensor) -> Tensor:
        return self.codec.encode(self._upload(pictures)).to(self.dtype)

    def _image_group(self, pictures: Tensor, ids: tuple[int, ...], regions: Regions | None = None) -> Group:
        state = self._prepared()
        if state.stages.sigmas[0] >= 1.0 and not any(regions or ()):
            self._say_once("image", "t_index_list starts at sigma 1, pure noise, so the image's pixels are ignored")
        x0, fixed = self._clean_latents(pictures), state.request.noise == "fixed"
        if fixed:
            noise = self._fixed_noise().expand_as(x0)
        else:
            noise = self._to_device(torch.cat([state.noise.draw(i) for i in ids]))
        start = self._fed_back(x0)
        anchor = start.float() if self._mode.carries_anchor else None
        x = self.adapter.path(start, noise, self._running().first_sigma)
        draws = self._draws(ids, fixed)
        group = Group(x, (state.prompt,) * len(ids), ids, noise, anchor, draws=draws)
        return self._knowing(group, regions, x0, pictures)

    def _text_group(self, ids: tuple[int, ...], latents: Tensor | None = None, regions: Regions | None = None) -> Group:
        state = self._prepared()
        if self._mode.name == "self" and latents is None:
            self._say_once("self", "text frames have no anchor: under cfg_type='self' they are drawn without guidance")
        if latents is None:
            x = self._to_device(torch.cat([state.noise.draw(i) for i in ids]))
        else:
            x = latents.to(self.device, self.dtype)
        return self._knowing(Group(x, (state.prompt,) * len(ids), ids, x, draws=self._draws(ids)), regions)

    def _draws(self, ids: tuple[int, ...], fixed: bool = False) -> Tensor | None:
        """Noise for every step of these frames, `[S, F, ...]`, where the rule needs it fresh; `fixed`: the same for all."""
        if self._running().settings.rule.noise != "fresh":
            return None
        source, steps = self._prepared().noise, len(self._prepared().stages)
        if fixed:
            draws = source.fixed_steps(steps).unsqueeze(1).expand(-1, len(ids), *self._shape)
        else:
            draws = torch.stack([source.draw_steps(i, steps) for i in ids], dim=1)
        return self._to_device(draws, torch.float32)

    def _say_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.warning(message)
