"""Flux.2 Klein with cached references: their keys and values are computed in a frame's first step, at time 0, and the later
steps attend to them (diffusers pipelines/flux2/pipeline_flux2_klein_kv.py, `__call__`)."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache
from torch import Tensor, nn

from streamflow.models.families.flux2 import Flux2, Flux2Velocity
from streamflow.models.row_by_row import RowByRow


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
        tokens = x.flatten(2).transpose(1, 2)
        out = self.velocity.transformer(
            hidden_states=torch.cat((references, tokens), 1),
            timestep=t.to(x.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=cond["encoder_hidden_states"],
            txt_ids=cond["txt_ids"],
            img_ids=torch.cat((reference_ids, cond["img_ids"]), 1),
            return_dict=False,
            kv_cache_mode="extract",
            num_ref_tokens=references.shape[1],
        )[0]
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
