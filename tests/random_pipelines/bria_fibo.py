"""Small random pipelines of Bria FIBO, for `random_pipelines.random_pipeline`."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLWan, BriaFiboEditPipeline, BriaFiboPipeline, BriaFiboTransformer2DModel
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from random_pipelines import euler, tokenizer
from random_pipelines.transformers import WIDTH, _language_model

VOCABULARY = 128001  # the pipelines encode an empty text as the token 128000


def bria_fibo(scheduler: dict | None = None, cls: Any = BriaFiboPipeline, **changes: Any) -> Any:
    """A tiny random FIBO pipeline."""
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 2 * WIDTH,
        "text_encoder_dim": WIDTH,
        "axes_dims_rope": (4, 4, 8),
    }
    sizes = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}  # as Wan 2.2
    pipe = cls(
        transformer=BriaFiboTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1, is_residual=True, **sizes),
        text_encoder=SmolLM3ForCausalLM(SmolLM3Config(**_language_model(vocab_size=VOCABULARY))),
        tokenizer=tokenizer(),
    )
    pipe.vae.quant_conv.weight.data *= 20.0  # else all images have nearly the same latents
    pipe.default_sample_size = 4
    return pipe


def bria_fibo_edit(scheduler: dict | None = None, **changes: Any) -> BriaFiboEditPipeline:
    """A tiny random FIBO Edit pipeline."""
    return bria_fibo(scheduler, BriaFiboEditPipeline, **changes)
