"""Small random video pipelines, of diffusers' own test sizes."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
    HeliosDMDScheduler,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)

from random_pipelines import t5, tokenizer

NETWORK = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
}


def wan_vae() -> AutoencoderKLWan:
    """A VAE of 8 x 8 pixels and 4 frames a latent."""
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def _helios_parts(changes: dict[str, Any]) -> dict[str, Any]:
    network = HeliosTransformer3DModel(
        **{
            **NETWORK,
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": False,
            **changes,
        }
    )
    return {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": wan_vae(), "transformer": network}


def helios(**changes: Any) -> HeliosPipeline:
    """Helios. Images are multiples of 16 pixels."""
    scheduler = HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    return HeliosPipeline(**_helios_parts(changes), scheduler=scheduler)


def helios_pyramid(**changes: Any) -> HeliosPyramidPipeline:
    """Helios with three sizes of latents, not distilled. Images are multiples of 64 pixels."""
    return HeliosPyramidPipeline(**_helios_parts(changes), scheduler=HeliosScheduler(gamma=0.33))


def helios_distilled(**changes: Any) -> HeliosPyramidPipeline:
    """The same, distilled."""
    return HeliosPyramidPipeline(**_helios_parts(changes), scheduler=HeliosDMDScheduler(gamma=0.33), is_distilled=True)


def anyflow_far(**changes: Any) -> AnyFlowFARPipeline:
    """AnyFlow's causal network. Images are multiples of 32 pixels; a chunk is one latent frame."""
    network = AnyFlowFARTransformer3DModel(
        **{
            "compressed_patch_size": (1, 4, 4),
            "full_chunk_limit": 3,
            **NETWORK,
            "rope_max_seq_len": 32,
            "chunk_partition": (1, 1),
            **changes,
        }
    )
    scheduler = FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    parts = {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": wan_vae(), "transformer": network}
    return AnyFlowFARPipeline(**parts, scheduler=scheduler)


def _skyreels_parts(changes: dict[str, Any]) -> dict[str, Any]:
    network = SkyReelsV2Transformer3DModel(**{**NETWORK, "rope_max_seq_len": 32, **changes})
    scheduler = UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    parts = {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": wan_vae()}
    return {**parts, "transformer": network, "scheduler": scheduler}


def skyreels(**changes: Any) -> SkyReelsV2DiffusionForcingPipeline:
    """SkyReels with diffusion forcing. Images are multiples of 16 pixels."""
    return SkyReelsV2DiffusionForcingPipeline(**_skyreels_parts(changes))


def skyreels_image(**changes: Any) -> SkyReelsV2DiffusionForcingImageToVideoPipeline:
    """The same, from an image."""
    return SkyReelsV2DiffusionForcingImageToVideoPipeline(**_skyreels_parts(changes))


def skyreels_video(**changes: Any) -> SkyReelsV2DiffusionForcingVideoToVideoPipeline:
    """The same, from a video."""
    return SkyReelsV2DiffusionForcingVideoToVideoPipeline(**_skyreels_parts(changes))
