"""Qwen-Image: packed latents and time t / 1000 as Flux, true guidance in a second call, then brought back to the length that
the prompt's own velocity has, token by token; a video VAE with a mean and a deviation per channel (diffusers
pipelines/qwenimage/pipeline_qwenimage.py, `__call__`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamflow.flow.guidance import Weight, renormalized
from streamflow.flow.schedule import Schedule
from streamflow.models.adapter import FlowAdapter
from streamflow.models.codec import Codec, Normalized
from streamflow.models.families.flux import Packed, pack, unpack


class QwenImageVelocity(nn.Module):
    """x `[rows, tokens, 64]`, t `[rows]` in 0..1000; `grid` `[h, w]` says by its shape how many tokens lie beside and above
    each other, its values are not read; `residuals`: arguments made by control nets."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        grid: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        residuals: Mapping[str, Any] | None = None,
    ) -> Tensor:
        return self.transformer(
            hidden_states=x,
            timestep=t.to(x.dtype) / 1000,
            encoder_hidden_states=encoder_hidden_states,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            img_shapes=[[(1, *grid.shape)]],  # the network reads the first row's
            return_dict=False,
            **(residuals or {}),
        )[0]


class QwenImage(Packed, FlowAdapter):
    """w is `true_cfg_scale`; a network with guidance embedded in it is refused by its argument's name."""

    Velocity = QwenImageVelocity
    row_inputs = ("encoder_hidden_states", "encoder_hidden_states_mask")
    shared_inputs = ("grid",)
    widths = {"encoder_hidden_states": "joint_attention_dim"}
    embeds = {"prompt_embeds": "encoder_hidden_states"}
    guidance_argument = "true_cfg_scale"
    guidance_in_one_call = False
    control = "streamflow.models.controlnets:QwenImageControl"
    vae_channels = "z_dim"
    since = "0.37"
    note = "guidance needs a negative prompt"
    text_pipeline = "QwenImagePipeline"
    image_pipeline = "QwenImageImg2ImgPipeline"
    exportable = False  # complex numbers, which ONNX has not

    def weight(self, scale: float, arguments: Mapping[str, Any], schedule: Schedule) -> Weight:
        return Weight(scale, renormalized)

    def codec(self, vae: nn.Module, height: int, width: int) -> Codec:
        self.check_vae(vae)
        given = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(one, device=vae.device).view(-1, 1, 1) for one in given)
        size = height // self.multiple, width // self.multiple
        return Codec(_StillPictures(vae), _Pack(mean, std), _Unpack(mean, std, *size))

    def _inputs(self, call: Mapping[str, Any]) -> dict[str, Tensor]:
        ((_, height, width),) = call["img_shapes"][0]
        x = call[self.sample]
        grid = torch.zeros(height, width, device=x.device, dtype=x.dtype)
        return super()._inputs({**{name: value for name, value in call.items() if name != "img_shapes"}, "grid": grid})


class _StillPictures(nn.Module):
    """A video VAE for single frames: pictures and latents without a dimension of time."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.config, self.dtype = vae.config, vae.dtype

    def encode(self, pictures: Tensor) -> Any:
        return self.vae.encode(pictures.unsqueeze(2))

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.vae.decode(z.unsqueeze(2), return_dict=return_dict)[0].squeeze(2),)


class _Pack(Normalized):
    """From the VAE's latents `[n, 16, 1, h, w]` to tokens."""

    def forward(self, z: Tensor) -> Tensor:
        return pack(super().forward(z.squeeze(2)))


class _Unpack(Normalized):
    """From tokens to the VAE's latents `[n, 16, 2 height, 2 width]`."""

    def __init__(self, mean: Tensor, std: Tensor, height: int, width: int):
        super().__init__(mean, std)
        self.height, self.width = height, width

    def forward(self, latents: Tensor) -> Tensor:
        return self.undo(unpack(latents, self.height, self.width))
