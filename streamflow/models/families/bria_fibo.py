"""Bria FIBO and FIBO Edit: a token is one latent pixel; the network takes a hidden state of the text encoder for each of its
blocks, and t in 0..1000; true guidance in one call, with the shorter text padded and masked; the VAE of Wan 2.2, with a mean
and a deviation per channel (diffusers pipelines/bria_fibo/pipeline_bria_fibo.py and pipeline_bria_fibo_edit.py, `__call__`).

The embeddings of a prompt are one tensor: the pipeline's `encoder_hidden_states`, and beside them its `text_encoder_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from diffusers.pipelines.bria_fibo.pipeline_bria_fibo_edit import _vae_safe_dims
from torch import Tensor
from torch.nn.functional import interpolate, pad

from streamflow.conditioning.reference import Grid, ReferenceRule, Size
from streamflow.models.adapter import FlowAdapter, TransformerVelocity
from streamflow.models.codec import Codec, Normalized, SingleFrames
from streamflow.models.pipe_parts import base_network
from streamflow.models.probe import Recording
from streamflow.models.protocols import VAE, Arguments, Call, Network


class BriaFiboVelocity(TransformerVelocity):
    """x `[rows, tokens, 48]`, t `[rows]` in 0..1000, embeddings `[rows, text, (2 + blocks) width]`, ids `[tokens, 3]`;
    references: more tokens, whose velocity is left out; attention_mask `[rows, text]`, used where `padded` is given; extra:
    more arguments of the network."""

    def __init__(self, transformer: Network):
        super().__init__(transformer)
        config = base_network(transformer).config
        self.widths = config.joint_attention_dim, config.text_encoder_dim

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        txt_ids: Tensor,
        img_ids: Tensor,
        attention_mask: Tensor | None = None,
        padded: Tensor | None = None,
        references: Tensor | None = None,
        reference_ids: Tensor | None = None,
        **extra: object,
    ) -> Tensor:
        hidden = x
        if references is not None and reference_ids is not None:
            hidden, img_ids = torch.cat((x, references), 1), torch.cat((img_ids, reference_ids))
        masks = {}
        if attention_mask is not None and padded is not None:
            masks = {"attention_mask": pad(attention_mask, (0, hidden.shape[1]), value=True)[:, None, None]}
        embeds, width = self.widths
        layers = encoder_hidden_states[..., embeds:].unflatten(-1, (-1, width)).movedim(2, 0)
        out = self.transformer(
            hidden_states=hidden,
            timestep=t.to(x.dtype),
            encoder_hidden_states=encoder_hidden_states[..., :embeds].contiguous(),
            text_encoder_layers=list(layers.contiguous().unbind()),
            joint_attention_kwargs=masks,
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
            **extra,
        )[0]
        return out if references is None else out[:, : x.shape[1]]


class BriaFibo(FlowAdapter):
    """`padded`, whose value is not read, is there where the pipeline masks tokens: where the prompt and the negative prompt
    have different lengths."""

    Velocity = BriaFiboVelocity
    row_inputs = ("encoder_hidden_states", "attention_mask")
    shared_inputs = ("txt_ids", "img_ids", "padded")
    embeds = {"prompt_embeds": "encoder_hidden_states"}
    vae_channels = "z_dim"
    since = "0.41"
    note = "`prompt_embeds` holds the text encoder's layers too; `do_patching` refused"
    text_pipeline = "BriaFiboPipeline"

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """`(tokens, channels)`."""
        return (height // self.factor) * (width // self.factor), self.latent_channels

    def codec(self, vae: VAE, height: int, width: int) -> Codec:
        self.check_vae(vae)
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(values, device=vae.device).view(-1, 1, 1) for values in statistics)
        return Codec(SingleFrames(vae), _Pack(mean, std), _Unpack(mean, std, height // self.factor, width // self.factor))

    def latent_mask(self, mask: Tensor, height: int, width: int) -> Tensor:
        """As `FlowAdapter`'s, as tokens."""
        small = interpolate(mask, (height // self.factor, width // self.factor))
        return _tokens(small.expand(-1, self.latent_channels, -1, -1))

    def check_arguments(self, arguments: Arguments) -> None:
        super().check_arguments(arguments)
        if arguments.get("do_patching"):
            raise NotImplementedError(
                f"do_patching is not supported: {type(self.pipe).__name__} makes no position ids of patches for latents "
                f"that it is given, which is how frames get their noise"
            )

    def _record(self, arguments: Call, steps: int, height: int, width: int, guided: bool) -> Recording:
        name = "joint_attention_kwargs"  # the pipeline writes its mask into the caller's dict
        return super()._record({**arguments, name: dict(arguments.get(name) or {})}, steps, height, width, guided)

    def _inputs(self, call: Arguments) -> dict[str, Tensor]:
        more = dict(call["joint_attention_kwargs"])
        mask: Tensor | None = more.pop("attention_mask", None)
        rest = {name: value for name, value in call.items() if name != "text_encoder_layers"}
        inputs = super()._inputs({**rest, "joint_attention_kwargs": more})
        embeds, x = call["encoder_hidden_states"], call[self.sample]
        inputs["encoder_hidden_states"] = torch.cat((embeds, *call["text_encoder_layers"]), -1)
        if len(embeds) > 1 or mask is not None:
            ones = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            inputs["attention_mask"] = ones if mask is None else mask[:, 0, 0, : embeds.shape[1]]
        if mask is not None:
            inputs["padded"] = torch.zeros(1, dtype=x.dtype, device=x.device)
        return inputs


class BriaFiboEdit(BriaFibo):
    """The pipeline's images are references, whose tokens follow the noise. Prompts are JSON texts."""

    shared_inputs = (*BriaFibo.shared_inputs, "reference_ids")
    reference = "streamflow.models.families.bria_fibo:BriaFiboReferences"
    note = "prompts are the pipeline's JSON texts; `mask` refused: paint the reference grey; `do_patching` refused"
    text_pipeline = "BriaFiboEditPipeline"
    default_size: int = 1024  # type: ignore[assignment]

    def check_arguments(self, arguments: Arguments) -> None:
        if arguments.get("mask") is not None:
            raise NotImplementedError(
                "mask is not supported: the pipeline only paints the reference grey where it is white, so paint each image, "
                "stream(paste_mask_on_image(mask, image)), with the function of the pipeline's module"
            )
        super().check_arguments(arguments)


class BriaFiboReferences(ReferenceRule):
    """At their own size in whole tokens, at most about 1024 x 1024 pixels. Reference i of 0, 1, ... is at time i + 1."""

    def sizes(self, adapter: FlowAdapter, size: Size, arguments: Arguments) -> tuple[Size, Size]:
        width, height = _vae_safe_dims(*size)
        return (width, height), (width, height)

    def ids(self, grids: Sequence[Grid], like: Tensor) -> Tensor:
        """`[n, 3]`: time, row and column (`prepare_reference_latents`)."""
        return _ids(tuple(grids), like.device, like.dtype)


@lru_cache(maxsize=64)  # a copy to a GPU would wait for what runs there
def _ids(grids: tuple[Grid, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    ids = [
        torch.cartesian_prod(torch.tensor([time]), torch.arange(height), torch.arange(width))
        for time, (height, width) in enumerate(grids, 1)
    ]
    return torch.cat(ids).to(device, dtype)


def _tokens(z: Tensor) -> Tensor:
    """Latents `[n, 48, h, w]` to tokens `[n, h w, 48]`."""
    return z.flatten(2).transpose(1, 2)


class _Pack(Normalized):
    """From the VAE's latents `[n, 48, 1, h, w]` to tokens."""

    def forward(self, z: Tensor) -> Tensor:
        return _tokens(super().forward(z.squeeze(2)))


class _Unpack(Normalized):
    """From tokens to the VAE's latents `[n, 48, height, width]`."""

    def __init__(self, mean: Tensor, std: Tensor, height: int, width: int):
        super().__init__(mean, std)
        self.size = height, width

    def forward(self, latents: Tensor) -> Tensor:
        return self.undo(latents.transpose(1, 2).unflatten(2, self.size))

    def undo(self, latents: Tensor) -> Tensor:
        """To the VAE's own scale, by a division, as the pipeline does."""
        return latents / (1.0 / self.std.to(latents.dtype)) + self.mean.to(latents.dtype)
