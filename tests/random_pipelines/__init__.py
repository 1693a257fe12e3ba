"""Small pipelines of diffusers with random weights and real tokenizers, for tests: nothing to download."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

TOKENS = 77
CHAT = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }} {% endfor %}"

# The function that makes the pipeline of a family. Other files are imported when they are used.
MAKERS = {
    "sd3": f"{__name__}:_sd3",
    "flux": f"{__name__}:_flux",
    "schnell": f"{__name__}:_schnell",
    "instaflow": f"{__name__}:_instaflow",
    "flux-kontext": f"{__name__}:_flux_kontext",
    "sdxl": f"{__name__}:_sdxl",
    "sana": "random_pipelines.transformers:sana",
    "perflow": "random_pipelines.perflow:perflow",
    "perflow-sdxl": "random_pipelines.perflow:perflow_sdxl",
    "sana-sprint": "random_pipelines.perflow:sana_sprint",
    "chroma": "random_pipelines.transformers:chroma",
    "flux2": "random_pipelines.transformers:flux2",
    "flux2-klein": "random_pipelines.transformers:flux2_klein",
    "flux2-klein-kv": "random_pipelines.transformers:flux2_klein_kv",
    "qwenimage": "random_pipelines.transformers:qwenimage",
    "qwenimage-edit": "random_pipelines.transformers:qwenimage_edit",
    "qwenimage-edit-plus": "random_pipelines.transformers:qwenimage_edit_plus",
    "lumina2": "random_pipelines.transformers:lumina2",
    "zimage": "random_pipelines.transformers:zimage",
    "bria-fibo": "random_pipelines.bria_fibo:bria_fibo",
    "bria-fibo-edit": "random_pipelines.bria_fibo:bria_fibo_edit",
    "auraflow": "random_pipelines.fallback:auraflow",
    "cogview4": "random_pipelines.fallback:cogview4",
    "hidream": "random_pipelines.fallback:hidream",
    "hunyuan-image": "random_pipelines.fallback:hunyuan_image",
    "kandinsky5": "random_pipelines.fallback:kandinsky5",
    "prx": "random_pipelines.fallback:prx",
    "omnigen": "random_pipelines.fallback:omnigen",
    "bria": "random_pipelines.fallback:bria",
    "ernie": "random_pipelines.fallback:ernie",
    "lumina": "random_pipelines.fallback:lumina",
    "ovis": "random_pipelines.fallback:ovis",
    "sana-dpm": "random_pipelines.fallback:sana_dpm",
    "sana-unipc": "random_pipelines.fallback:sana_unipc",
    "anyflow-far": "random_pipelines.video:anyflow_far",
    "helios": "random_pipelines.video:helios",
    "helios-pyramid": "random_pipelines.video:helios_pyramid",
    "helios-distilled": "random_pipelines.video:helios_distilled",
    "skyreels": "random_pipelines.video:skyreels",
    "skyreels-image": "random_pipelines.video:skyreels_image",
    "skyreels-video": "random_pipelines.video:skyreels_video",
}


def random_pipeline(family: str, seed: int = 0, **changes: Any) -> Any:
    """A pipeline of this family, float32 on the CPU, whose weights depend on `seed` alone.

    family: a key of `MAKERS`; "schnell" is flux without guidance embedding, at shift 1.
    changes: entries of the network's config to replace; `scheduler`, a dict, replaces entries of the scheduler's.
    """
    if family not in MAKERS:
        raise ValueError(f"unknown family {family!r}: choose one of {', '.join(MAKERS)}")
    module, _, name = MAKERS[family].partition(":")
    make = getattr(import_module(module), name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = make(**changes)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                wake(part)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_tiny_vae(channels: int, blocks: int = 4, seed: int = 0) -> AutoencoderTiny:
    """An AutoencoderTiny with this many latent channels and `2 ** (blocks - 1)` pixels a latent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = (8,) * blocks
        return AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=(1,) * blocks,
            num_decoder_blocks=(1,) * blocks,
        ).eval()


def wake(part: torch.nn.Module) -> torch.nn.Module:
    """The network in inference mode. Parameters that are zero, which would hide faults, get small random values."""
    part.eval().requires_grad_(False)
    for parameter in part.parameters():
        if not parameter.any():
            parameter.normal_(std=0.05)
    return part


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, so any text works. A chat is encoded as its texts in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|start|>", "<|end|>", *alphabet])}
    encoder = Tokenizer(models.BPE(vocabulary, [], unk_token="<|end|>"))
    encoder.normalizer = normalizers.Lowercase()
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 0), ("<|end|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=encoder,
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_max_length=TOKENS,
        chat_template=CHAT,
    )


def _clip(width: int, projection: bool, tokens: int = TOKENS) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5() -> T5EncoderModel:
    """A tiny T5 encoder."""
    return T5EncoderModel(
        T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    )


def euler(scheduler: dict | None, **config: Any) -> FlowMatchEulerDiscreteScheduler:
    """The Euler scheduler of flows."""
    return FlowMatchEulerDiscreteScheduler(**{**config, **(scheduler or {})})


def kl(channels: int, **config: Any) -> AutoencoderKL:
    """A tiny KL VAE."""
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        **config,
    )


def _sd3(scheduler: dict | None = None, **changes: Any) -> StableDiffusion3Pipeline:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 48,
        "pos_embed_max_size": 16,
    }
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0),
        vae=kl(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_clip(16, projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=_clip(32, projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _flux(scheduler: dict | None = None, **changes: Any) -> FluxPipeline:
    config = {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0, use_dynamic_shifting=True),
        vae=kl(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(16, projection=False),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )
    pipe.default_sample_size = 8
    return pipe


def _flux_kontext(scheduler: dict | None = None, **changes: Any) -> FluxPipeline:
    from diffusers import FluxKontextPipeline  # diffusers 0.33 has none

    pipe = FluxKontextPipeline(**_flux(scheduler, **changes).components)
    pipe.default_sample_size = 8
    return pipe


def _schnell(**changes: Any) -> FluxPipeline:
    return _flux(**{"guidance_embeds": False, "scheduler": {"shift": 1.0, "use_dynamic_shifting": False}, **changes})


def _unet(**config: Any) -> UNet2DConditionModel:
    shared = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**shared, **config})


def _instaflow(**changes: Any) -> StableDiffusionPipeline:
    from diffusers import PNDMScheduler

    config = {"cross_attention_dim": 32, "attention_head_dim": 8}
    return StableDiffusionPipeline(
        unet=_unet(**{**config, **changes}),
        scheduler=PNDMScheduler(),
        vae=kl(4, scaling_factor=0.18215),
        text_encoder=_clip(32, projection=False),
        tokenizer=tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(**changes: Any) -> StableDiffusionXLPipeline:
    from streamflow.benchmark.full_size import RectifiedFlowScheduler

    config = {
        "cross_attention_dim": 48,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }
    return StableDiffusionXLPipeline(
        unet=_unet(**{**config, **changes}),
        scheduler=RectifiedFlowScheduler(),
        vae=kl(4, scaling_factor=0.13025),
        text_encoder=_clip(16, projection=False),
        tokenizer=tokenizer(),
        text_encoder_2=_clip(32, projection=True),
        tokenizer_2=tokenizer(),
        add_watermarker=False,
    )
