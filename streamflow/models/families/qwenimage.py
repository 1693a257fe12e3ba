"""Qwen-Image: packed latents and time t / 1000 as Flux, true guidance in a second call, rescaled token by token to the
length of the prompt's own velocity; a video VAE with a mean and a deviation per channel (diffusers
pipelines/qwenimage/pipeline_qwenimage.py and pipeline_qwenimage_edit.py, `__call__`)."""

from __future__ import annotations

import PIL.Image
import torch
from torch import Tensor

from streamflow.flow.guidance import Weight, renormalized
from streamflow.flow.schedule import Schedule
from streamflow.models.adapter import TransformerVelocity
from streamflow.models.codec import Codec, Normalized, SingleFrames
from streamflow.models.families.flux import Packed, pack, unpack
from streamflow.models.probe import Recording
from streamflow.models.protocols import VAE, Arguments, Call


class QwenImageVelocity(TransformerVelocity):
    """x `[rows, tokens, 64]`, t `[rows]` in 0..1000; `grid` `[h, w]`: its shape is the number of tokens along the height and
    the width, its values are not read; references `[rows, n, 64]`: more tokens, whose velocity is left out; reference_grids
    `[0, h, w, h, w, ...]`: its shape is theirs; cond: the network's own arguments."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        grid: Tensor,
        references: Tensor | None = None,
        reference_grids: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:
        shapes, hidden = [(1, *grid.shape)], x
        if references is not None and reference_grids is not None:
            sides = reference_grids.shape[1:]
            shapes += [(1, *sides[i : i + 2]) for i in range(0, len(sides), 2)]
            hidden = torch.cat((x, references), 1)
        out = self.transformer(
            hidden_states=hidden,
            timestep=t.to(x.dtype) / 1000,
            img_shapes=[shapes],  # the network reads the first row's
            return_dict=False,
            **cond,
        )[0]
        return out if references is None else out[:, : x.shape[1]]


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
        return Codec(SingleFrames(vae), _Pack(mean, std), _Unpack(mean, std, *size))

    def _inputs(self, call: Arguments) -> dict[str, Tensor]:
        ((_, height, width),) = call["img_shapes"][0]
        x = call[self.sample]
        grid = torch.zeros(height, width, device=x.device, dtype=x.dtype)
        return super()._inputs({**{name: value for name, value in call.items() if name != "img_shapes"}, "grid": grid})


class QwenImageEdit(QwenImage):
    """The pipeline's image is a reference, which the language model sees too."""

    row_inputs = (*QwenImage.row_inputs, "references")
    shared_inputs = ("grid", "reference_grids")
    reference = "streamflow.models.references:QwenImageEditReferences"
    control = None
    note = "guidance needs a negative prompt; its language model encodes every frame"
    text_pipeline = "QwenImageEditPipeline"

    def _record(self, arguments: Call, steps: int, height: int, width: int, guided: bool) -> Recording:
        blank = PIL.Image.new("RGB", (width, height))  # for the schedule: no frame is drawn with it
        return super()._record({"image": blank, **arguments}, steps, height, width, guided)

    def _inputs(self, call: Arguments) -> dict[str, Tensor]:
        (own, *others), x = call["img_shapes"][0], call[self.sample]
        inputs = super()._inputs({**call, "img_shapes": [[own]]})
        grids = torch.empty(0, *(side for _, *sides in others for side in sides), device=x.device, dtype=x.dtype)
        return {**inputs, "references": x[:, own[1] * own[2] :], "reference_grids": grids}


class QwenImageEditPlus(QwenImageEdit):
    """One image or several."""

    reference = "streamflow.models.references:QwenImageEditPlusReferences"
    text_pipeline = "QwenImageEditPlusPipeline"


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
