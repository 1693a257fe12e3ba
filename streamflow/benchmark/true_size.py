"""Pipelines of the size of well-known models, with random weights, made where they are to run: nothing to download. For
benchmarks, since speed does not depend on weights. Text encoders are left out; embeddings of the right shapes stand for
a prompt (`prompt_arguments`). Knows sizes; measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    ConfigMixin,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

PICTURE_STD = 0.4  # of a random tiny VAE's pictures, in [-1, 1]: neither grey nor clipped, so that differences show


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):
    """InstaFlow's Euler steps as a diffusers scheduler: t_i = 1000 (1 - i / N), and x gains `output / N` a step (gnobitab/
    InstaFlow code/pipeline_rf.py). With it `StableDiffusionPipeline` itself draws what a rectified UNet draws."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.set_timesteps(50)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """N steps from noise to picture."""
        self.num_inference_steps = num_inference_steps
        most = float(self.config.num_train_timesteps)
        timesteps = [(1.0 - i / num_inference_steps) * most for i in range(num_inference_steps)]
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """A flow's network takes x as it is."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """x at the next noise level, alone in a tuple."""
        return ((sample.float() + 1.0 / self.num_inference_steps * model_output).to(model_output.dtype),)


# Schedulers for families whose flow no scheduler of diffusers walks: with them the pipeline's own call draws it.
SCHEDULERS: dict[str, Callable[[], Any]] = {"instaflow": RectifiedFlowScheduler, "sdxl": RectifiedFlowScheduler}


@dataclass(frozen=True)
class Size:
    """One model: how its pipeline is made of (network, vae), the configs of both, and the shapes of a prompt's embeddings,
    by the pipeline's own argument names, batch included. `family`: where the pipeline's class does not tell. `make_vae`: of
    its config, an AutoencoderKL where None. `tiny`: the tiny twin's config, where it is not the usual one."""

    pipeline: Callable[[nn.Module, nn.Module], Any]
    network: type[nn.Module]
    config: Mapping[str, Any]
    vae: Mapping[str, Any]
    embeds: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    family: str | None = None
    make_vae: Callable[..., nn.Module] | None = None
    tiny: Mapping[str, Any] = field(default_factory=dict)


def _stable_diffusion(unet: nn.Module, vae: nn.Module) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        scheduler=RectifiedFlowScheduler(),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_3(transformer: nn.Module, vae: nn.Module) -> StableDiffusion3Pipeline:
    texts = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **texts)


def _flux_schnell(transformer: nn.Module, vae: nn.Module) -> FluxPipeline:
    texts = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **texts)


def _stable_diffusion_xl(unet: nn.Module, vae: nn.Module) -> StableDiffusionXLPipeline:
    texts = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2")}
    return StableDiffusionXLPipeline(unet=unet, vae=vae, scheduler=RectifiedFlowScheduler(), add_watermarker=False, **texts)


def _sana(transformer: nn.Module, vae: nn.Module) -> SanaPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None)


_NO_QUANT_CONV = {"use_quant_conv": False, "use_post_quant_conv": False}

SIZES: dict[str, Size] = {
    "sd15": Size(
        _stable_diffusion,
        UNet2DConditionModel,
        {"sample_size": 64, "cross_attention_dim": 768},
        {"latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215},
        {"prompt_embeds": (1, 77, 768)},
        torch.float16,
        "instaflow",
    ),
    "sd3-medium": Size(
        _stable_diffusion_3,
        SD3Transformer2DModel,
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        {"latent_channels": 16, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609, **_NO_QUANT_CONV},
        {"prompt_embeds": (1, 77 + 256, 4096), "pooled_prompt_embeds": (1, 2048)},
        torch.bfloat16,
    ),
    "flux-schnell": Size(
        _flux_schnell,
        FluxTransformer2DModel,
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": False,
            "axes_dims_rope": (16, 56, 56),
        },
        {"latent_channels": 16, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159, **_NO_QUANT_CONV},
        {"prompt_embeds": (1, 256, 4096), "pooled_prompt_embeds": (1, 768)},
        torch.bfloat16,
    ),
    "sdxl": Size(
        _stable_diffusion_xl,
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False},
        {"prompt_embeds": (1, 77, 2048), "pooled_prompt_embeds": (1, 1280)},
        torch.float16,
        "sdxl",
    ),
    "sana": Size(
        _sana,
        SanaTransformer2DModel,
        {},  # diffusers' defaults are those of Sana 1.6B
        {
            "latent_channels": 32,
            "scaling_factor": 0.41407,
            "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
        },
        {"prompt_embeds": (1, 300, 2304), "prompt_attention_mask": (1, 300)},
        torch.bfloat16,
        make_vae=AutoencoderDC,
        tiny={
            **{f"{side}_block_out_channels": (64,) * 6 for side in ("encoder", "decoder")},
            "num_encoder_blocks": (1, 3, 3, 3, 3, 3),
            "num_decoder_blocks": (3, 3, 3, 3, 3, 1),
        },
    ),
}


def size_of(model: str) -> Size:
    """The sizes of this model. ValueError lists the known."""
    if model not in SIZES:
        raise ValueError(f"unknown true size {model!r}: known are {', '.join(SIZES)}")
    return SIZES[model]


def true_size(model: str, device: torch.device | str, dtype: torch.dtype | None = None, seed: int = 0) -> Any:
    """The pipeline of this model, with random weights and without text encoders, on the device. `dtype` None: the one that
    the model is published in. The device's random state stays as it was."""
    size = size_of(model)
    with _making(device, dtype or size.dtype, seed):
        parts = network(model), (size.make_vae or _kl)(**size.vae)
    pipe = size.pipeline(*(_finished(part, dtype or size.dtype) for part in parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network(model: str) -> nn.Module:
    """The network alone, on torch's default device in its default dtype; under `torch.device("meta")` it takes no memory."""
    size = size_of(model)
    return size.network(**size.config)


def true_tiny_vae(
    model: str, device: torch.device | str, dtype: torch.dtype | None = None, seed: int = 0
) -> AutoencoderTiny:
    """An AutoencoderTiny as large as the published twin (TAESD, TAESD3, TAEF1) of this model's VAE, with random weights."""
    size = size_of(model)
    dtype = dtype or size.dtype
    with _making(device, dtype, seed):
        vae = _finished(AutoencoderTiny(latent_channels=size.vae["latent_channels"], **size.tiny), dtype)
        if torch.device(device).type != "meta":
            _spread(vae.decoder, size.vae["latent_channels"])
    return vae


def prompt_arguments(
    model: str, device: torch.device | str, dtype: torch.dtype | None = None, guided: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Random embeddings in place of a prompt, under the names and in the shapes that the pipeline takes, masks all ones;
    `guided`: and in place of a negative prompt."""
    size = size_of(model)
    generator = torch.Generator().manual_seed(seed)
    names = list(size.embeds) + [f"negative_{name}" for name in size.embeds] * guided
    shapes = [size.embeds[name.removeprefix("negative_")] for name in names]
    masks = [name.endswith("mask") for name in names]
    drawn = [torch.ones(n) if mask else torch.randn(n, generator=generator) for n, mask in zip(shapes, masks, strict=True)]
    return {name: x.to(device, dtype or size.dtype) for name, x in zip(names, drawn, strict=True)}


def _finished(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """For inference, with buffers such as position tables in the dtype too. Not diffusers' own `to`, which warns."""
    return nn.Module.to(module, dtype).eval().requires_grad_(False)


def _kl(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **config,
    )


@contextmanager
def _making(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Modules made inside lie on the device in the dtype, and their weights are a function of the seed and the device."""
    device, before = torch.device(device), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@torch.no_grad()
def _spread(decoder: nn.Module, channels: int) -> None:
    """Scale the last convolution, so that a network without norms draws pictures with contrast, not flat grey."""
    last = [m for m in decoder.modules() if isinstance(m, nn.Conv2d)][-1]
    weight = next(decoder.parameters())
    x = torch.randn(1, channels, 16, 16, device=weight.device, dtype=weight.dtype)
    found = decoder(x).float()
    last.weight.mul_(PICTURE_STD / found.std())
    last.bias.sub_(decoder(x).float().mean() / 2)  # the decoder ends with 2 x - 1
