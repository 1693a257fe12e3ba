"""Small IP-Adapters with random weights, in diffusers' file format, and small image encoders, for the random pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from random_pipelines import wake

WIDTH = 24  # of image embeddings
IMAGE = 32  # pixels of an image encoder's input
TOKENS = 4
QUERIES = 3  # of a resampler
StateDict = dict[str, dict[str, Tensor]]


def random_adapter(pipe: Any, seed: int = 0, plus: bool = False, width: int = WIDTH) -> StateDict:
    """The state dict of an adapter for this pipe's network, whose weights depend on `seed` alone. plus: with a resampler in
    the place of the projection (UNets). width: of the image embeddings that it takes."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    make = {"SD3Transformer2DModel": _sd3, "UNet2DConditionModel": _unet}.get(type(network).__name__, _flux)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(network, width, plus) if make is _unet else make(network, width)


def save_adapter(pipe: Any, path: Any, seed: int = 0) -> StateDict:
    """Write an adapter for this pipe in diffusers' file format, `.safetensors`. Returns its state dict."""
    state = random_adapter(pipe, seed)
    flat = {f"{part}.{key}": value.contiguous() for part, own in state.items() for key, value in own.items()}
    save_file(flat, path)
    return state


def with_encoder(pipe: Any, seed: int = 0) -> Any:
    """The pipe, with a small random image encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = siglip_encoder() if hasattr(pipe, "tokenizer_3") else clip_encoder()
    features = siglip_features() if hasattr(pipe, "tokenizer_3") else CLIPImageProcessor(size=IMAGE, crop_size=IMAGE)
    pipe.register_modules(image_encoder=encoder.to(dtype=pipe.dtype), feature_extractor=features)
    return pipe


def clip_encoder() -> nn.Module:
    """A small CLIP image encoder."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE,
        patch_size=16,
    )
    return wake(CLIPVisionModelWithProjection(config))


def siglip_encoder() -> nn.Module:
    """A small SigLIP image encoder."""
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE,
        patch_size=16,
    )
    return wake(SiglipVisionModel(config))


def siglip_features() -> Any:
    """Its image processor."""
    return SiglipImageProcessor(size={"height": IMAGE, "width": IMAGE})


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, Tensor]:
    layer = nn.Linear(inputs, outputs, bias)
    return {f"{name}.{key}": 2 * value.detach() for key, value in layer.state_dict().items()}


def _projection(width: int, out: int) -> dict[str, Tensor]:
    return {**_linear("proj", width, TOKENS * out), "norm.weight": torch.ones(out), "norm.bias": torch.zeros(out)}


def _resampler(width: int, out: int) -> dict[str, Tensor]:
    hidden, inner = 16, 64  # diffusers counts heads of 64
    state = {"latents": torch.randn(1, QUERIES, hidden), **_linear("proj_in", width, hidden)}
    state |= {**_linear("proj_out", hidden, out), "norm_out.weight": torch.ones(out), "norm_out.bias": torch.zeros(out)}
    for i in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            state |= {f"layers.{i}.{norm}.weight": torch.ones(hidden), f"layers.{i}.{norm}.bias": torch.zeros(hidden)}
        sizes = {"0.to_q": (hidden, inner), "0.to_kv": (hidden, 2 * inner), "0.to_out": (inner, hidden)}
        sizes |= {"1.1": (hidden, 4 * hidden), "1.3": (4 * hidden, hidden)}
        for name, (inputs, outputs) in sizes.items():
            state |= _linear(f"layers.{i}.{name}", inputs, outputs, bias=False)
    return state


def _unet(unet: Any, width: int, plus: bool) -> StateDict:
    out = unet.config.cross_attention_dim
    layers: dict[str, Tensor] = {}
    crossed = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for i, name in enumerate(crossed):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for key in ("to_k_ip", "to_v_ip"):
            layers |= _linear(f"{2 * i + 1}.{key}", out, attention.inner_dim, bias=False)
    return {"image_proj": _resampler(width, out) if plus else _projection(width, out), "ip_adapter": layers}


def _flux(transformer: Any, width: int) -> StateDict:
    out, layers = transformer.config.joint_attention_dim, {}
    for i in range(transformer.config.num_layers):
        for key in ("to_k_ip", "to_v_ip"):
            layers |= _linear(f"{i}.{key}", out, transformer.inner_dim)
    return {"image_proj": _projection(width, out), "ip_adapter": layers}


def _sd3(transformer: Any, width: int) -> StateDict:
    config, layers = transformer.config, {}
    inner, hidden = config.num_attention_heads * config.attention_head_dim, 16
    for i in range(len(transformer.attn_processors)):
        processor = SD3IPAdapterJointAttnProcessor2_0(inner, inner, config.attention_head_dim, hidden)
        layers |= {f"{i}.{key}": value for key, value in wake(processor).state_dict().items()}
    projection = IPAdapterTimeImageProjection(width, inner, hidden, heads=1, num_queries=QUERIES, timestep_in_dim=8)
    return {"image_proj": dict(wake(projection).state_dict()), "ip_adapter": layers}
