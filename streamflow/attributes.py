"""The attributes that StreamDiffusion's users read off a stream, derived from what a StreamFlow holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamflow.flow import per_row, velocity_from
from streamflow.ring import Loop, Ring, Rows


class StreamDiffusionAttributes:
    """Mixed into `StreamFlow`. Names and shapes are StreamDiffusion's; nothing here is stored twice."""

    _engine: Ring | Loop | None

    @property
    def guidance_scale(self) -> float:
        """The pipeline's guidance_scale in force; assigning it is `update(guidance_scale=...)`."""
        return self._prepared().guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        self.update(guidance_scale=value)

    @property
    def delta(self) -> float:
        """How strongly residual guidance acts; assigning it is `update(delta=...)`."""
        return self._prepared().request.delta

    @delta.setter
    def delta(self, value: float) -> None:
        self.update(delta=value)

    @property
    def timesteps(self) -> Tensor:
        """The whole schedule's timesteps, float32 `[N]`."""
        return self._prepared().schedule.timesteps.to(self.device)

    @property
    def sub_timesteps(self) -> list[Tensor]:
        """The stages' timesteps, one tensor each."""
        return list(self._prepared().stages.timesteps.to(self.device))

    @property
    def sub_timesteps_tensor(self) -> Tensor:
        """The timestep of each row of the denoising batch, float32 `[S F]` (`[S]` without the batch)."""
        return self._by_row(self._prepared().stages.timesteps)

    @property
    def beta_prod_t_sqrt(self) -> Tensor:
        """How much noise is in each row: sigma, `[S F, 1, ...]`. Read-only."""
        rows = self._by_row(self._prepared().stages.sigmas)
        return per_row(rows, torch.empty((0, *self._shape))).to(self.dtype)

    @property
    def alpha_prod_t_sqrt(self) -> Tensor:
        """How much image is in each row: 1 - sigma, `[S F, 1, ...]`. Read-only."""
        return 1.0 - self.beta_prod_t_sqrt

    @property
    def c_skip(self) -> Any:
        """Raises AttributeError, with the reason."""
        raise AttributeError("c_skip belongs to LCM's boundary condition; a flow's step is x + (sigma_next - sigma) v")

    @property
    def c_out(self) -> Any:
        """As `c_skip`."""
        raise AttributeError("c_out belongs to LCM's boundary condition; a flow's step is x + (sigma_next - sigma) v")

    @property
    def x_t_latent_buffer(self) -> Tensor | None:
        """The rows under way, `[(S - 1) F, ...]`, newest first; None with one stage."""
        return self._running().waiting

    @property
    def prompt_embeds(self) -> Tensor:
        """The embeddings of new frames' rows, `[batch_size, tokens, width]`."""
        rows = self._prepared().prompt.cond.rows["encoder_hidden_states"]
        return rows.expand(self.batch_size, *rows.shape[1:])

    @property
    def init_noise(self) -> Tensor:
        """The noise that image frames share, `[batch_size, ...]`."""
        noise = self._prepared().noise.preview().to(self.device, self.dtype)
        return noise.expand(self.batch_size, *self._shape)

    @property
    def stock_noise(self) -> Tensor:
        """The noise that residual guidance takes each row for, `anchor + v_uncond`, `[S F, ...]`; zeros without anchors."""
        engine = self._running()
        if not isinstance(engine, Ring) or engine.anchors is None:
            return torch.zeros((self.batch_size, *self._shape), device=self.device, dtype=self.dtype)
        anchor = engine.anchors.x0
        noise = anchor + velocity_from(engine.x, anchor, engine.rows.sigma)
        known = engine.anchors.known
        return (noise if known is None else noise * per_row(known, noise)).to(self.dtype)

    @property
    def inference_time_ema(self) -> float:
        """A moving average of a call's seconds; on a GPU of those that the device has finished."""
        return self._timer.average

    @inference_time_ema.setter
    def inference_time_ema(self, value: float) -> None:
        self._timer.average = value

    def _by_row(self, values: Tensor) -> Tensor:
        repeats = self.frame_bff_size if self.use_denoising_batch else 1
        return values.to(self.device).repeat_interleave(repeats)

    def _rows(self, idx: int | None) -> Rows:
        """The rows of the batch, or those of stage idx."""
        engine = self._running()
        self.adapter.check_offers("stages")
        if idx is None and isinstance(engine, Ring):
            return engine.rows
        return Rows(engine.settings, idx or 0, (idx or 0) + 1)
