"""Small random pipelines of the transformer families whose text encoder is a language model, for
`random_pipelines.random_pipeline`."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    MistralConfig,
    MistralModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3Model,
)

from random_pipelines import euler, kl, t5, tokenizer

WIDTH = 16  # of the language models


def _language_model(layers: int = 2, **config: Any) -> dict[str, Any]:
    """The config of a small language model."""
    return {
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        **config,
    }


def chroma(scheduler: dict | None = None, **changes: Any) -> ChromaPipeline:
    """A tiny random Chroma pipeline."""
    config = {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "approximator_num_channels": 32,
        "approximator_hidden_dim": 32,
        "approximator_layers": 1,
    }
    pipe = ChromaPipeline(
        transformer=ChromaTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0, use_dynamic_shifting=True),
        vae=kl(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )
    pipe.default_sample_size = 8
    return pipe


def _deep_compression_vae(channels: int) -> AutoencoderDC:
    sizes = {f"{side}_block_out_channels": (16, 16, 32, 32) for side in ("encoder", "decoder")}
    depths = {f"{side}_layers_per_block": (1, 1, 1, 1) for side in ("encoder", "decoder")}
    attention = {f"{side}_qkv_multiscales": ((), (), (), ()) for side in ("encoder", "decoder")}
    return AutoencoderDC(latent_channels=channels, scaling_factor=0.41407, **sizes, **depths, **attention)


def sana(scheduler: dict | None = None, **changes: Any) -> SanaPipeline:
    """A tiny random Sana pipeline."""
    config = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": WIDTH,
        "sample_size": 32,
    }
    return SanaPipeline(
        transformer=SanaTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0),
        vae=_deep_compression_vae(8),
        text_encoder=Gemma2Model(Gemma2Config(**_language_model())),
        tokenizer=tokenizer(),
    )


def _flux2_vae(channels: int) -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        latent_channels=channels,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def _flux2_parts(text_encoder: Any, scheduler: dict | None, **changes: Any) -> dict[str, Any]:
    config = {
        "in_channels": 32,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * WIDTH,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return {
        "transformer": Flux2Transformer2DModel(**{**config, **changes}),
        "scheduler": euler(scheduler, shift=3.0, use_dynamic_shifting=True),
        "vae": _flux2_vae(8),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer(),
    }


def flux2(scheduler: dict | None = None, **changes: Any) -> Flux2Pipeline:
    """A tiny random Flux.2 pipeline."""
    text = MistralModel(MistralConfig(**_language_model(30)))  # the pipeline reads its layers 10, 20 and 30
    pipe = Flux2Pipeline(**_flux2_parts(text, scheduler, **changes))
    pipe.default_sample_size = 8
    return pipe


def flux2_klein(scheduler: dict | None = None, is_distilled: bool = False, **changes: Any) -> Flux2KleinPipeline:
    """A tiny random Flux.2 Klein pipeline."""
    text = Qwen3Model(Qwen3Config(**_language_model(27)))  # the pipeline reads its layers 9, 18 and 27
    parts = _flux2_parts(text, scheduler, **{"guidance_embeds": False, **changes})
    pipe = Flux2KleinPipeline(**parts, is_distilled=is_distilled)
    pipe.default_sample_size = 8
    return pipe


def flux2_klein_kv(scheduler: dict | None = None, **changes: Any) -> DiffusionPipeline:
    """A tiny random Flux.2 Klein pipeline with cached references."""
    from diffusers import Flux2KleinKVPipeline

    text = Qwen3Model(Qwen3Config(**_language_model(27)))
    pipe = Flux2KleinKVPipeline(**_flux2_parts(text, scheduler, **{"guidance_embeds": False, **changes}))
    pipe.default_sample_size = 8
    return pipe


def qwenimage(scheduler: dict | None = None, **changes: Any) -> QwenImagePipeline:
    """A tiny random Qwen-Image pipeline."""
    config = {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 4, 8),
    }
    shift = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9, "max_image_seq_len": 8192}
    pipe = QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, **shift),
        vae=AutoencoderKLQwenImage(base_dim=8, z_dim=16, num_res_blocks=1),
        text_encoder=Qwen3Model(Qwen3Config(**_language_model())),
        tokenizer=tokenizer(),
    )
    pipe.default_sample_size = 8
    return pipe


def _vision_language_model() -> Qwen2_5_VLForConditionalGeneration:
    text = {**_language_model(), "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=PLACEHOLDERS.index("<|image_pad|>") + 258)
    )


PLACEHOLDERS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]


def _processor() -> Qwen2VLProcessor:
    """The processor of a vision-language model, whose images are at most 56 pixels wide and high."""
    tokens = tokenizer()
    tokens.add_tokens(PLACEHOLDERS, special_tokens=True)
    processor = Qwen2VLProcessor.__new__(Qwen2VLProcessor)  # its constructor needs torchvision, for videos
    processor.image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56})
    processor.tokenizer, processor.chat_template = tokens, None
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id, processor.video_token_id = tokens.convert_tokens_to_ids("<|image_pad|>"), None
    return processor


def _qwenimage_edit(cls: Any, scheduler: dict | None, changes: dict[str, Any]) -> Any:
    processor = _processor()
    parts = {**qwenimage(scheduler, **changes).components, "text_encoder": _vision_language_model()}
    pipe = cls(**{**parts, "tokenizer": processor.tokenizer}, processor=processor)
    pipe.default_sample_size = 8
    return pipe


def qwenimage_edit(scheduler: dict | None = None, **changes: Any) -> QwenImageEditPipeline:
    """A tiny random Qwen-Image-Edit pipeline."""
    return _qwenimage_edit(QwenImageEditPipeline, scheduler, changes)


def qwenimage_edit_plus(scheduler: dict | None = None, **changes: Any) -> QwenImageEditPlusPipeline:
    """A tiny random Qwen-Image-Edit pipeline for several images."""
    return _qwenimage_edit(QwenImageEditPlusPipeline, scheduler, changes)


def lumina2(scheduler: dict | None = None, **changes: Any) -> Lumina2Pipeline:
    """A tiny random Lumina 2 pipeline."""
    config = {
        "sample_size": 8,
        "in_channels": 16,
        "hidden_size": 32,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (512, 64, 64),
        "cap_feat_dim": WIDTH,
    }
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, use_dynamic_shifting=True),
        vae=kl(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Gemma2Model(Gemma2Config(**_language_model())),
        tokenizer=tokenizer(),
    )


def zimage(scheduler: dict | None = None, **changes: Any) -> ZImagePipeline:
    """A tiny random Z-Image pipeline."""
    config = {
        "in_channels": 16,
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": WIDTH,
        "axes_dims": [4, 6, 6],
        "axes_lens": [1024, 64, 64],
    }
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(**{**config, **changes}),
        scheduler=euler(scheduler, shift=3.0),
        vae=kl(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**_language_model())),
        tokenizer=tokenizer(),
    )
