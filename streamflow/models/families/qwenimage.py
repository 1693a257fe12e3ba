"""Qwen-Image: packed latents and time t / 1000 as Flux, true guidance in a second call, rescaled token by token to the
length of the prompt's own velocity; a video VAE with a mean and a deviation per channel (diffusers
pipelines/qwenimage/pipeline_qwenimage.py, `__call__`)."""

from __future__ import annotations

import torch
from torch import Tensor

from streamflow.flow.guidance import Weight, renormalized
from streamflow.flow.schedule import Schedule
from streamflow.models.adapter import TransformerVelocity
from streamflow.models.codec import Codec, Normalized
from streamflow.models.families.flux import Packed, pack, unpack
from streamflow.models.protocols import VAE, Arguments


class QwenImageVelocity(TransformerVelocity):
    """x `[rows, tokens, 64]`, t `[rows]` in 0..1000; `grid` `[h, w]`: its shape is the number of tokens along the height and
    the width, its values are not read; cond: the network's own arguments."""

    def forward(self, x: Tensor, t: Tensor, grid: Tensor, **cond: Tensor) -> Tensor:
        shapes = [[(1, *grid.shape)]]  # the network reads the first row's
        return self.transformer(
            hidden_states=x, timestep=t.to(x.dtype) / 1000, img_shapes=shapes, return_dict=False, **cond
        )[0]


class QwenImage(Packed):
    """w is `true_cfg_scale`. A network with embedded guidance is refused."""

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

    def weight(self, scale: float, arguments: Arguments, schedule: Schedule) -> Weight:
        return Weight(scale, renormalized)

    def codec(self, vae: VAE, height: int, width: int) -> Codec:
        self.check_vae(vae)
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(values, device=vae.device).view(-1, 1, 1) for values in statistics)
        size = height // self.multiple, width // self.multiple
        return Codec(_SingleFrames(vae), _Pack(mean, std), _Unpack(mean, std, *size))

    def _inputs(self, call: Arguments) -> dict[str, Tensor]:
        ((_, height, width),) = call["img_shapes"][0]
        x = call[self.sample]
        grid = torch.zeros(height, width, device=x.device, dtype=x.dtype)
        return super()._inputs({**{name: value for name, value in call.items() if name != "img_shapes"}, "grid": grid})


class _SingleFrames(VAE):
    """A video VAE for single frames: images and latents without a dimension of time."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae
        self.config, self.dtype = vae.config, vae.dtype

    def encode(self, images: Tensor) -> object:
        return self.vae.encode(images.unsqueeze(2))

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
