"""Flux.2 Klein with cached references: their keys and values are computed in a frame's first step, at time 0, and the later
steps attend to them (diffusers pipelines/flux2/pipeline_flux2_klein_kv.py, `__call__`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache, apply_rotary_emb
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamflow.models.families.flux2 import Flux2, Flux2Velocity
from streamflow.models.pipe_parts import base_network
from streamflow.models.protocols import Network
from streamflow.models.row_by_row import RowByRow

_EAGER = threading.Lock()


class Flux2CachedVelocity(Flux2Velocity):
    """As `Flux2Velocity`, with the keys and values of the references, reference_kv `[rows, blocks, 2, n, heads, head_dim]`,
    in the place of their tokens."""

    def forward(self, x: Tensor, t: Tensor, reference_kv: Tensor | None = None, **cond: Tensor) -> Tensor:
        if reference_kv is None:
            return super().forward(x, t, **cond)
        transformer: Any = self.transformer
        cache = Flux2KVCache(len(transformer.transformer_blocks), len(transformer.single_transformer_blocks))
        cache.num_ref_tokens = reference_kv.shape[3]
        for i, layer in enumerate((*cache.double_block_caches, *cache.single_block_caches)):
            layer.store(reference_kv[:, i, 0], reference_kv[:, i, 1])
        return super().forward(x, t, **cond, kv_cache=cache, kv_cache_mode="cached")


class _OwnCalls(nn.Module):
    """The calls of the pipeline itself, for one row: a frame's first step computes the references too."""

    def __init__(self, velocity: Flux2CachedVelocity):
        super().__init__()
        self.velocity = velocity

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        references: Tensor | None = None,
        reference_ids: Tensor | None = None,
        reference_time: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:
        if references is None or reference_ids is None or reference_time is None or not torch.equal(t, reference_time):
            return self.velocity(x, t, **cond)
        tokens, network = x.flatten(2).transpose(1, 2), self.velocity.transformer
        text = cond["encoder_hidden_states"], cond["txt_ids"]
        out, _ = _extracted(network, references, reference_ids, tokens, cond["img_ids"], *text, t)
        return out.transpose(1, 2).reshape(x.shape)


class Flux2KleinKV(Flux2):
    """A distilled Klein, without guidance."""

    Velocity = Flux2CachedVelocity
    row_inputs = ("encoder_hidden_states",)
    reference = "streamflow.models.references:Flux2CachedReferences"
    since = "0.38"
    note = "references are computed once, when a frame enters; distilled: `full` refused"
    text_pipeline = "Flux2KleinKVPipeline"

    def row_by_row(self, guided: bool) -> nn.Module:
        return RowByRow(_OwnCalls(cast("Flux2CachedVelocity", self.velocity)), shared=self.shared_inputs)


def _extracted(
    network: nn.Module,
    tokens: Tensor,
    ids: Tensor,
    x: Tensor,
    image_ids: Tensor,
    text: Tensor,
    text_ids: Tensor,
    time: Tensor,
) -> tuple[Tensor, Flux2KVCache]:
    """The pipeline's call of a frame's first step: (velocity of the tokens of x, keys and values of the references)."""
    return network(
        hidden_states=torch.cat((tokens, x), 1),
        timestep=time.to(x.dtype) / 1000,
        guidance=None,
        encoder_hidden_states=text,
        txt_ids=text_ids,
        img_ids=torch.cat((ids, image_ids), 1),
        return_dict=False,
        kv_cache_mode="extract",
        num_ref_tokens=tokens.shape[1],
    )


def keys_and_values(
    network: Network,
    tokens: Tensor,
    ids: Tensor,
    x: Tensor,
    image_ids: Tensor,
    text: Tensor,
    text_ids: Tensor,
    time: Tensor,
    exact: bool,
) -> Tensor:
    """The keys and values of references' tokens `[1, n, channels]`, `[1, blocks, 2, n, heads, head_dim]`. exact: from a call
    with all tokens of x and of the text, as the pipeline's; otherwise with one of each, on which they do not depend."""
    if not exact:
        x, image_ids, text, text_ids = x[:, :1], image_ids[:, :1], text[:, :1], text_ids[:, :1]
    _, cache = _extracted(network, tokens, ids, x, image_ids, text, text_ids, time)
    pairs = [layer.get() for layer in (*cache.double_block_caches, *cache.single_block_caches)]
    return torch.stack([one for pair in pairs for one in pair], 1).unflatten(1, (len(pairs), 2))


def with_new_tokens(network: Network, tokens: Tensor, ids: Tensor, kv: Tensor, changed: Tensor) -> Tensor:
    """Keys and values of references of which the tokens `changed`, `[k]`, are new. These attend to the kept keys and values
    of the others, which stay as they are: an approximation, since the others would attend to the new ones."""
    changed = changed.to(kv.device)
    rest = torch.ones(tokens.shape[1], dtype=torch.bool, device=kv.device)
    rest[changed] = False
    base: Any = base_network(network)
    cache = Flux2KVCache(len(base.transformer_blocks), len(base.single_transformer_blocks))
    cache.num_ref_tokens = int(kv.shape[3] - len(changed))
    for i, layer in enumerate((*cache.double_block_caches, *cache.single_block_caches)):
        layer.store(kv[:, i, 0][:, rest], kv[:, i, 1][:, rest])
    none = torch.zeros(1, 0, base.config.joint_attention_dim, device=tokens.device, dtype=tokens.dtype)
    # Compiled blocks would be compiled anew for the hooks of every call. The stance is the process's.
    with _EAGER, torch.compiler.set_stance("force_eager"), _Projections(base) as seen:
        network(
            hidden_states=tokens[:, changed],
            timestep=torch.zeros(1, device=tokens.device, dtype=tokens.dtype),
            guidance=None,
            encoder_hidden_states=none,
            txt_ids=ids[:, :0],
            img_ids=ids[:, changed],
            return_dict=False,
            kv_cache=cache,
            kv_cache_mode="cached",
        )
    made, rope = kv.clone(), base.pos_embed(ids[0, changed])
    for i, (key, value) in enumerate(seen.pairs()):
        made[:, i, 0, changed] = cast(Tensor, apply_rotary_emb(key, rope, sequence_dim=1))
        made[:, i, 1, changed] = value
    return made


class _Projections:
    """A context that records every block's keys, before their rotation, and values, `[1, n, heads, head_dim]`."""

    def __init__(self, network: Any) -> None:
        self._double = [block.attn for block in network.transformer_blocks]
        self._single = [block.attn for block in network.single_transformer_blocks]
        self._keys: dict[nn.Module, Tensor] = {}
        self._outputs: dict[nn.Module, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> _Projections:
        for attention in (*self._double, *self._single):
            self._record(attention.norm_k, self._keys, attention)
        for attention in self._double:
            self._record(attention.to_qkv if attention.fused_projections else attention.to_v, self._outputs, attention)
        for attention in self._single:
            self._record(attention.to_qkv_mlp_proj, self._outputs, attention)
        return self

    def _record(self, layer: nn.Module, found: dict[nn.Module, Tensor], attention: nn.Module) -> None:
        thread = threading.get_ident()

        def record(module: nn.Module, inputs: object, output: Tensor) -> None:
            if threading.get_ident() != thread:
                return  # another stream of this pipe
            assert isinstance(output, Tensor), "a layer of an attention returns one tensor"
            found[attention] = output

        self._hooks.append(layer.register_forward_hook(record))

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(keys, values) of each block, double ones first."""
        for attention in (*self._double, *self._single):
            key, output, width = self._keys[attention], self._outputs[attention], attention.inner_dim
            value = output if output.shape[-1] == width else output[..., 2 * width : 3 * width]
            yield key, value.unflatten(-1, (-1, attention.head_dim))
