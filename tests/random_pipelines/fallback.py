"""Small random pipelines without an adapter, for `random_pipelines.random_pipeline`."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLHunyuanImage,
    BriaPipeline,
    BriaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PRXPipeline,
    SanaPipeline,
    UniPCMultistepScheduler,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from random_pipelines import _clip, euler, kl, t5, tokenizer
from random_pipelines.transformers import WIDTH, _flux2_vae, _language_model, sana


def auraflow(scheduler: dict | None = None, **changes: Any) -> AuraFlowPipeline:
    """A tiny random AuraFlow pipeline."""
    config = {
        "sample_size": 8,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 64,
    }
    return AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=1.73),
        vae=kl(4, scaling_factor=0.13025),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def cogview4(scheduler: dict | None = None, **changes: Any) -> CogView4Pipeline:
    """A tiny random CogView4 pipeline."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 8,
        "condition_dim": 4,
        "rope_axes_dim": (16, 16),
    }
    return CogView4Pipeline(
        transformer=CogView4Transformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        vae=kl(4),
        text_encoder=Qwen3Model(Qwen3Config(**_language_model())),
        tokenizer=tokenizer(),
    )


def hidream(scheduler: dict | None = None, **changes: Any) -> HiDreamImagePipeline:
    """A tiny random HiDream pipeline."""
    config = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_channels": [32, WIDTH],
        "text_emb_dim": 64,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (32, 32),
        "llama_layers": (0, 1),
        "force_inference_output": True,
    }
    pipe = HiDreamImagePipeline(
        transformer=HiDreamImageTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0),
        vae=kl(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(32, projection=True, tokens=128),
        tokenizer=tokenizer(),
        text_encoder_2=_clip(32, projection=True, tokens=128),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(),
        text_encoder_4=LlamaModel(LlamaConfig(**_language_model(), attn_implementation="eager")),
        tokenizer_4=tokenizer(),
    )
    pipe.default_sample_size = 8
    return pipe


def hunyuan_image(scheduler: dict | None = None, **changes: Any) -> HunyuanImagePipeline:
    """A tiny random HunyuanImage pipeline."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "text_embed_dim": WIDTH,
        "text_embed_2_dim": 32,
        "rope_axes_dim": (4, 4),
    }
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
        scaling_factor=0.75,
    )
    pipe = HunyuanImagePipeline(
        transformer=HunyuanImageTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=5.0),
        vae=vae,
        text_encoder=Qwen3Model(Qwen3Config(**_language_model(3))),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
        ocr_guider=AdaptiveProjectedMixGuidance(),
    )
    pipe.tokenizer_max_length = 40
    return pipe


def kandinsky5(scheduler: dict | None = None, **changes: Any) -> Kandinsky5T2IPipeline:
    """A tiny random Kandinsky 5 pipeline."""
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": WIDTH,
        "in_text_dim2": 32,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (4, 6, 6),
    }
    pipe = Kandinsky5T2IPipeline(
        transformer=Kandinsky5Transformer3DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0),
        vae=kl(4, scaling_factor=0.3611),
        text_encoder=Qwen3Model(Qwen3Config(**_language_model())),
        tokenizer=tokenizer(),
        text_encoder_2=_clip(32, projection=False),
        tokenizer_2=tokenizer(),
    )
    pipe.resolutions = [(64, 64)]
    return pipe


def prx(scheduler: dict | None = None, **changes: Any) -> PRXPipeline:
    """A tiny random PRX pipeline."""
    config = {
        "in_channels": 4,
        "context_in_dim": WIDTH,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "axes_dim": [8, 8],
    }
    return PRXPipeline(
        transformer=PRXTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0),
        vae=kl(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Gemma2Model(Gemma2Config(**_language_model())),
        tokenizer=tokenizer(),
    )


def omnigen(scheduler: dict | None = None, **changes: Any) -> OmniGenPipeline:
    """A tiny random OmniGen pipeline."""
    config = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_layers": 1,
        "pad_token_id": 0,
        "vocab_size": 300,
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 256,
        "pos_embed_max_size": 32,
        "time_step_dim": 8,
        "rope_scaling": {"long_factor": [1, 1, 1, 1], "short_factor": [1, 1, 1, 1]},
    }
    return OmniGenPipeline(
        transformer=OmniGenTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, invert_sigmas=True, num_train_timesteps=1),
        vae=kl(4, scaling_factor=0.13025),
        tokenizer=tokenizer(),
    )


def bria(scheduler: dict | None = None, **changes: Any) -> BriaPipeline:
    """A tiny random Bria pipeline."""
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": [4, 4, 8],
    }
    return BriaPipeline(
        transformer=BriaTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0),
        vae=kl(4, shift_factor=0.0609),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def ernie(scheduler: dict | None = None, **changes: Any) -> ErnieImagePipeline:
    """A tiny random Ernie Image pipeline."""
    config = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 1,
        "ffn_hidden_size": 64,
        "in_channels": 32,
        "out_channels": 32,
        "text_in_dim": WIDTH,
        "rope_axes_dim": (4, 6, 6),
    }
    return ErnieImagePipeline(
        transformer=ErnieImageTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0),
        vae=_flux2_vae(8),
        text_encoder=Qwen3Model(Qwen3Config(**_language_model())),
        tokenizer=tokenizer(),
    )


def lumina(scheduler: dict | None = None, **changes: Any) -> LuminaPipeline:
    """A tiny random Lumina pipeline."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "cross_attention_dim": WIDTH,
    }
    return LuminaPipeline(
        transformer=LuminaNextDiT2DModel(**{**config, **changes}),
        scheduler=euler(scheduler),
        vae=kl(4, scaling_factor=0.13025),
        text_encoder=Gemma2Model(Gemma2Config(**_language_model())),
        tokenizer=tokenizer(),
    )


def ovis(scheduler: dict | None = None, **changes: Any) -> OvisImagePipeline:
    """A tiny random Ovis Image pipeline."""
    config = {
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 4, 8),
    }
    return OvisImagePipeline(
        transformer=OvisImageTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, use_dynamic_shifting=True),
        vae=kl(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**_language_model())),
        tokenizer=tokenizer(),
    )


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def sana_dpm(**changes: Any) -> SanaPipeline:
    """Sana as it ships: with a solver of second order."""
    pipe = sana(**changes)
    pipe.register_modules(scheduler=DPMSolverMultistepScheduler(**FLOW))
    return pipe


def sana_unipc(**changes: Any) -> SanaPipeline:
    """A tiny random Sana pipeline with UniPC's solver."""
    pipe = sana(**changes)
    pipe.register_modules(scheduler=UniPCMultistepScheduler(**FLOW))
    return pipe
