"""The steps of a stream by themselves, under StreamDiffusion's names: encode, add noise, one step of the network, decode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamflow._grad_mode import computing
from streamflow.flow.guidance import Anchors
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.inputs import Inputs
from streamflow.stream.model import Model
from streamflow.stream.ring import Carried, Group, Loop, Ring, Rows
from streamflow.stream.updates import Updates

if TYPE_CHECKING:
    from streamflow.image_utils import ReferenceArgument


class Steps:
    """Single steps with the model, the noise and the noise levels of a stream. They leave the frames in flight alone."""

    def __init__(self, model: Model, denoiser: Denoiser, updates: Updates, inputs: Inputs) -> None:
        self._model, self._denoiser, self._updates, self._inputs = model, denoiser, updates, inputs

    def add_noise(self, original_samples: Tensor, noise: Tensor, t_index: int) -> Tensor:
        """x0 on its path to the noise (`(1 - sigma) x0 + sigma noise` where that is straight) at stage `t_index`."""
        sigma = self._denoiser.prepared().stages.sigmas[t_index].to(original_samples.device)
        return self._model.adapter.path(original_samples, noise, sigma.reshape(1))

    @computing
    def encode_image(self, image_tensors: Tensor) -> Tensor:
        """Images `[n, 3, H, W]` in [-1, 1] to latents noised to the first stage with the stream's fixed noise."""
        x0 = self._model.encode(image_tensors)
        state, engine = self._denoiser.drawing()
        return self._model.adapter.path(x0, self._inputs.fixed_noise(state.noise), engine.first_sigma)

    @computing
    def decode_image(self, x_0_pred_out: Tensor) -> Tensor:
        """Clean latents, as the pipeline's `output_type="latent"`, to images `[n, 3, H, W]` in [-1, 1]."""
        return self._model.codec.decode(x_0_pred_out)

    def frame_noise(self, frame_id: int) -> Tensor:
        """The noise from which text frame `frame_id` is drawn, `[1, ...]`; the pipeline takes it as `latents=`."""
        return self._model.to_device(self._denoiser.prepared().noise.draw(frame_id))

    def scheduler_step_batch(self, model_pred_batch: Tensor, x_t_latent_batch: Tensor, idx: int | None = None) -> Tensor:
        """x at the next sigma, given velocities; all rows of the batch, or those of stage idx."""
        return self.rows(idx).step(x_t_latent_batch, model_pred_batch)

    @computing
    def predict_x0_batch(
        self, x_t_latent: Tensor, anchor: Tensor | None = None, reference: ReferenceArgument | None = None
    ) -> Tensor | None:
        """One tick: F rows in at the first stage's sigma, `[F, ...]`; None until the ring is full, then the oldest F
        clean latents. `anchor` `[F, ...]`: the rows' clean latents, for `cfg_type="self"`; without it they are not guided.
        `reference`: reference images, as in `stream(image, reference=...)`. ValueError: another number of rows or another
        shape."""
        denoiser = self._denoiser
        denoiser.check_free("predict_x0_batch()")
        self._model.check_rows(x_t_latent, self._model.frames)
        conditions = self._inputs.conditions({"reference": reference}, None, range(len(x_t_latent)))
        self._updates.take()
        ids = denoiser.next_ids(len(x_t_latent))
        denoiser.tick(self._inputs.group(ids, conditions, latents=x_t_latent, anchor=anchor))
        done = denoiser.take_oldest()
        return done and done.x0

    @computing
    def unet_step(self, x_t_latent: Tensor, t_list: Tensor | list[int], idx: int | None = None) -> tuple[Tensor, Tensor]:
        """(x at the next sigma, guided velocity) of all rows of the batch, or of stage idx, at times `t_list`."""
        rows, (state, engine) = self.rows(idx), self._denoiser.drawing()
        if engine.settings.mode.carries_anchor:  # those of the frames in flight
            self._denoiser.one_ring("unet_step")
        self._model.check_rows(x_t_latent, rows.count)
        anchors = engine.anchors if idx is None and isinstance(engine, Ring) else None
        if anchors is not None:
            anchors = Anchors(anchors.x0.clone(), anchors.known)
        times = torch.as_tensor(t_list, dtype=torch.float32, device=self._model.device)
        with self._denoiser.ticks:
            prompts = (state.prompt,) * rows.count
            return rows.advance(self._model.velocity, x_t_latent, prompts, state.weight, anchors, None, times)

    @computing
    def trial(self, groups: int) -> Iterator[Tensor]:
        """The ticks in which an engine of its own draws so many groups of frames from noise, with the modules in force.
        Each yields F images, `[F, 3, height, width]`: of the frames that have left, or of the entering ones while none
        leaves. The last F images are random ones that were encoded and decoded. The stream's own frames, their numbers and
        its noise stay as they are."""
        model, (state, engine) = self._model, self._denoiser.drawing()
        own = (Ring if self._denoiser.batched else Loop)(engine.settings, state.weight)
        prompt, generator = state.prompt, torch.Generator().manual_seed(0)
        for one in self._inputs.conditioners:
            prompt = one.example(prompt)
        for index in range(groups + own.depth - 1):
            noise = model.to_device(torch.randn(model.frames, *model.shape, generator=generator))
            x = model.adapter.path(torch.zeros_like(noise), noise, own.first_sigma)
            carried = {"noise": Carried(noise)} if engine.settings.rule.noise == "own" else {}
            with self._denoiser.ticks:
                done = own.push(Group(x, (prompt,) * model.frames, (index,) * model.frames, carried), model.velocity)
                images = model.codec.decode(x if done is None else done.x0)
            yield images
        given = 2 * torch.rand(model.frames, 3, model.height, model.width, generator=generator) - 1
        with self._denoiser.ticks:
            images = model.codec.decode(model.encode(given))
        yield images

    def example(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """What the modules get in a tick: the network's arguments, latents for the decoder, images for the encoder."""
        model, prompt = self._model, self._denoiser.prepared().prompt
        for one in self._inputs.conditioners:
            prompt = one.example(prompt)
        images = torch.zeros(model.frames, 3, model.height, model.width, device=model.device)
        latents = torch.zeros(model.frames, *model.shape, device=model.device, dtype=model.dtype)
        return self.rows().example(prompt), latents, images

    def rows(self, idx: int | None = None) -> Rows:
        """The rows of the batch, or those of stage idx."""
        engine = self._denoiser.running()
        self._model.adapter.check_offers("stages")
        if idx is None and engine.rows is not None:
            return engine.rows
        return Rows(engine.settings, idx or 0, (idx or 0) + 1)
