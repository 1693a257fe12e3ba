"""Flux.1 dev, schnell, Kontext and other models of their pipelines: latents are packed 2x2 into tokens, time is
t / 1000 after a cast to the latents' dtype, guidance is a number embedded in the network (dev), and true guidance is a
second call (diffusers pipelines/flux/pipeline_flux.py and pipeline_flux_kontext.py, `__call__`)."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.nn.functional import interpolate

from streamflow.models.adapter import FlowAdapter, TransformerVelocity
from streamflow.models.codec import Codec
from streamflow.models.probe import Recording
from streamflow.models.protocols import VAE, Arguments, Call


class FluxVelocity(TransformerVelocity):
    """x `[rows, tokens, 64]`, t `[rows]` in 0..1000, ids `[tokens, 3]`; references: more tokens, whose velocity is left out;
    extra: more arguments of the network."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        txt_ids: Tensor,
        img_ids: Tensor,
        guidance: Tensor | None = None,
        references: Tensor | None = None,
        reference_ids: Tensor | None = None,
        **extra: object,
    ) -> Tensor:
        tokens = x.shape[1]
        if references is not None and reference_ids is not None:
            x, img_ids = torch.cat((x, references), 1), torch.cat((img_ids, reference_ids))
        out = self.transformer(
            hidden_states=x,
            timestep=t.to(x.dtype) / 1000,
            guidance=guidance,
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
            **extra,
        )[0]
        return out if references is None else out[:, :tokens]


class Packed(FlowAdapter):
    """The base class of families whose pipeline packs latents 2x2 into tokens."""

    @property
    def multiple(self) -> int:
        return self.factor * 2  # a token is two latents wide

    @property
    def latent_channels(self) -> int:
        return self.base.config.in_channels // 4  # a token holds four latents

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """`(tokens, channels)`."""
        return (height // self.multiple) * (width // self.multiple), self.base.config.in_channels

    def codec(self, vae: VAE, height: int, width: int) -> Codec:
        self.check_vae(vae)
        return Codec(vae, pack, partial(unpack, height=height // self.multiple, width=width // self.multiple))

    def latent_mask(self, mask: Tensor, height: int, width: int) -> Tensor:
        """As `FlowAdapter`'s, packed, the same for all channels of a token."""
        small = interpolate(mask, (height // self.factor, width // self.factor))
        return pack(small.expand(-1, self.latent_channels, -1, -1))


class Flux(Packed):
    """`guidance_scale` is the embedded guidance, one of the prompt's row inputs; w is `true_cfg_scale`."""

    Velocity = FluxVelocity
    row_inputs = ("encoder_hidden_states", "pooled_projections", "guidance")
    shared_inputs = ("txt_ids", "img_ids")
    widths = {"encoder_hidden_states": "joint_attention_dim", "pooled_projections": "pooled_projection_dim"}
    guidance_argument = "true_cfg_scale"
    guidance_in_one_call = False
    control = "streamflow.models.controlnets:FluxControl"
    image_prompt = "streamflow.models.image_prompts:FluxImagePrompts"
    tiny_vae = "madebyollin/taef1"
    note = "`guidance_scale` is embedded, `true_cfg_scale` is the weight of `full`"
    text_pipeline = "FluxPipeline"
    image_pipeline = "FluxImg2ImgPipeline"


class FluxKontext(Flux):
    """The pipeline's image is a reference, whose tokens follow the noise."""

    shared_inputs = ("txt_ids", "img_ids", "reference_ids")
    reference = "streamflow.models.references:KontextReferences"
    control = None
    since = "0.34"
    note = "`_auto_resize=False` keeps the reference's size; `max_area` is the stream's own"
    text_pipeline = "FluxKontextPipeline"

    def check_arguments(self, arguments: Arguments) -> None:
        if "max_area" in arguments:
            raise TypeError("max_area cannot be passed on: it is the width times the height of the stream")
        super().check_arguments(arguments)

    def _record(self, arguments: Call, steps: int, height: int, width: int, guided: bool) -> Recording:
        return super()._record({**arguments, "max_area": height * width}, steps, height, width, guided)


def pack(z: Tensor) -> Tensor:
    """Latents `[n, 16, 2 height, 2 width]` to tokens `[n, height width, 64]`."""
    return FluxPipeline._pack_latents(z, *z.shape)


def unpack(latents: Tensor, height: int, width: int) -> Tensor:
    """Tokens of an image of height x width tokens back to latents."""
    return FluxPipeline._unpack_latents(latents, 2 * height, 2 * width, vae_scale_factor=1)
