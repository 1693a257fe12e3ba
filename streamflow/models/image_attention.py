"""Attention with image prompts: diffusers' processors and projections of IP-Adapters, with a scale for each row.

What diffusers passes from the network's arguments through the projection to the processors are an adapter's image tokens.
Here they come with their scales, float32 `[rows]`, which multiply each row by the bits of diffusers' own number. Tokens
without scales are what the pipe's own calls pass, and diffusers' code then computes as it does without a stream.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from streamflow.conditioning.image_prompt import Scaled
from streamflow.flow.convention import times

Place = tuple[Any, int]  # a processor of diffusers, and which of its adapters is meant


def _scaled(given: object) -> bool:
    """Whether these image tokens come with scales."""
    return isinstance(given, (list, tuple)) and len(given) > 0 and isinstance(given[0], tuple)


def _heads(attn: Any, value: Tensor) -> Tensor:
    """`[rows, tokens, width]`, or `[rows, images, tokens, width]`, to `[rows, heads, tokens, width of a head]`."""
    return value.view(len(value), -1, attn.heads, value.shape[-1] // attn.heads).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of `[rows, heads, tokens, ...]`, with the heads side by side."""
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def _of(cls: type, given: nn.Module) -> Any:
    """A processor of this class with the modules and settings of another one."""
    made: Any = object.__new__(cls)
    kept = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(given).items()}
    vars(made).update(kept)
    return made.eval().requires_grad_(False)


class UNetImageAttention(IPAdapterAttnProcessor2_0):
    """Cross-attention to the text, and to each adapter's image tokens."""

    @classmethod
    def of(cls, given: Sequence[Place], plain: object) -> Self:
        """The processor for these adapters."""
        made = _of(cls, given[0][0])
        made.num_tokens = [one.num_tokens[i] for one, i in given]
        _several(made, given)
        return made

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        images: Any = None
        text = encoder_hidden_states
        if isinstance(encoder_hidden_states, tuple):
            text, images = encoder_hidden_states
        if not _scaled(images):
            own: Any = super()
            return own.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks)
        if attention_mask is not None:
            rows, tokens = text.shape[:2]
            mask = attn.prepare_attention_mask(attention_mask, tokens, rows)
            attention_mask = mask.view(rows, attn.heads, -1, mask.shape[-1])
        query = _heads(attn, attn.to_q(hidden_states))
        out = _attend(query, _heads(attn, attn.to_k(text)), _heads(attn, attn.to_v(text)), attention_mask)
        for (tokens, by_row), to_k, to_v in zip(images, self.to_k_ip, self.to_v_ip, strict=True):
            seen = _attend(query, _heads(attn, to_k(tokens)), _heads(attn, to_v(tokens)))
            out = out + times(seen, by_row)
        return attn.to_out[1](attn.to_out[0](out))


class SD3ImageAttention(SD3IPAdapterJointAttnProcessor2_0):
    """Joint attention, and attention of the image tokens of the frame to themselves and to those of the image prompt."""

    @classmethod
    def of(cls, given: Sequence[Place], plain: object) -> Self:
        """The processor for this adapter."""
        return _of(cls, given[0][0])

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Any = None,
        temb: Tensor | None = None,
    ) -> Any:
        if not isinstance(ip_hidden_states, tuple):
            own: Any = super()
            return own.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, ip_hidden_states, temb)
        plain = [_heads(attn, project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v)]
        joint = [norm(one) if norm else one for norm, one in zip((attn.norm_q, attn.norm_k, None), plain, strict=True)]
        if encoder_hidden_states is not None:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            texts = [_heads(attn, project(encoder_hidden_states)) for project in projections]
            norms = attn.norm_added_q, attn.norm_added_k, None
            texts = [norm(one) if norm else one for norm, one in zip(norms, texts, strict=True)]
            joint = [torch.cat(pair, dim=2) for pair in zip(joint, texts, strict=True)]
        out = _attend(*joint)
        image = out[:, : hidden_states.shape[1]]
        tokens, by_row = ip_hidden_states
        tokens = self.norm_ip(tokens, temb=temb)
        key = torch.cat((self.norm_k(plain[1]), self.norm_ip_k(_heads(attn, self.to_k_ip(tokens)))), dim=2)
        value = torch.cat((plain[2], _heads(attn, self.to_v_ip(tokens))), dim=2)
        image = image + times(_attend(self.norm_q(plain[0]), key, value), by_row)
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        text = out[:, hidden_states.shape[1] :]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


class FluxImageAttention(FluxIPAdapterAttnProcessor):
    """The attention that the network has without an adapter, `plain`, and that of the frame's tokens to each adapter's image
    tokens, which the block adds at its end. Chroma has the same."""

    plain: Any

    @classmethod
    def of(cls, given: Sequence[Place], plain: object) -> Self:
        """The processor for these adapters, in the place of `plain`."""
        made = _of(cls, given[0][0])
        _several(made, given)
        made.plain = FluxAttnProcessor() if isinstance(plain, FluxIPAdapterAttnProcessor) else plain
        return made

    @property
    def _attention_backend(self) -> Any:  # which diffusers sets
        return self.plain._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.plain._attention_backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
    ) -> Any:
        given = attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        if ip_hidden_states is not None and not _scaled(ip_hidden_states):
            own: Any = super()
            return own.__call__(*given, ip_hidden_states, ip_adapter_masks)
        out = self.plain(*given)
        if ip_hidden_states is None:
            return out
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, heads))
        seen = torch.zeros_like(hidden_states)
        for (tokens, by_row), to_k, to_v in zip(ip_hidden_states, self.to_k_ip, self.to_v_ip, strict=True):
            key, value = (project(tokens).flatten(1, -2).unflatten(-1, heads) for project in (to_k, to_v))
            one = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
            seen = seen + times(one.flatten(2).to(query.dtype), by_row)
        return *out, seen


def _several(made: Any, given: Sequence[Place]) -> None:
    """Give a processor the layers of these adapters."""
    made.scale = [one.scale[i] for one, i in given]
    made.to_k_ip = nn.ModuleList([one.to_k_ip[i] for one, i in given])
    made.to_v_ip = nn.ModuleList([one.to_v_ip[i] for one, i in given])


class ImageProjections(MultiIPAdapterImageProjection):
    """The projections of several adapters: embeddings with scales become tokens with scales."""

    def forward(self, image_embeds: Any) -> Any:
        if not _scaled(image_embeds):
            return super().forward(image_embeds)
        embeds, scales = zip(*image_embeds, strict=True)
        return list(zip(super().forward(list(embeds)), scales, strict=True))


class TimedImageProjection(nn.Module):
    """Stable Diffusion 3's projection, which depends on the time."""

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.projection = projection

    def forward(self, image_embeds: Tensor | Scaled, timestep: Tensor) -> tuple[Any, Tensor]:
        if not isinstance(image_embeds, tuple):
            return self.projection(image_embeds, timestep)
        embeds, scale = image_embeds
        tokens, temb = self.projection(embeds, timestep)
        return (tokens, scale), temb
