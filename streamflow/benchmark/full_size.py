"""Pipelines of the size of published models, with random weights, made on the device: nothing to download. For benchmarks,
since speed does not depend on weights. Text encoders are left out; embeddings of the right shapes replace a prompt
(`prompt_arguments`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

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

from streamflow.models.protocols import Arguments, Call, Function, Pipeline

IMAGE_STD = 0.4  # of a random tiny VAE's images, in [-1, 1]: neither grey nor clipped, so that differences show
NOT_MADE = ("text_encoder", "tokenizer", "image_encoder", "safety_checker", "feature_extractor")  # starts of parts' names


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):
    """InstaFlow's Euler steps as a diffusers scheduler: t_i = 1000 (1 - i / N), and x gains `output / N` a step (gnobitab/
    InstaFlow code/pipeline_rf.py). With it `StableDiffusionPipeline` itself draws images of a rectified UNet."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.set_timesteps(50)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """N steps from noise to image."""
        self.num_inference_steps = num_inference_steps
        most = float(self.config["num_train_timesteps"])
        timesteps = [(1.0 - i / num_inference_steps) * most for i in range(num_inference_steps)]
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32, device=device)

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        """x itself, which a flow's network takes as it is."""
        return sample

    def step(self, model_output: Tensor, timestep: object, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """x at the next noise level, alone in a tuple."""
        return ((sample.float() + 1.0 / self.num_inference_steps * model_output).to(model_output.dtype),)


# Schedulers for families whose flow no scheduler of diffusers draws: with them the pipeline's own call draws it.
SCHEDULERS: dict[str, Function] = {"instaflow": RectifiedFlowScheduler, "sdxl": RectifiedFlowScheduler}


@dataclass(frozen=True)
class Size:
    """One model. config, vae, tiny: the configs of its network, its VAE and its tiny VAE, where they are not diffusers'
    defaults. embeds: the shapes of a prompt's embeddings, by the pipeline's argument names, with the batch dimension.
    scheduler: makes the scheduler. family: where the pipeline's class does not determine it. options: more arguments of the
    pipeline's class. make_vae: makes the VAE of its config."""

    pipeline: Function
    network: type[nn.Module]
    config: Arguments
    vae: Arguments
    embeds: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    scheduler: Function
    family: str | None = None
    options: Arguments = field(default_factory=dict)
    make_vae: Function = AutoencoderKL
    tiny: Arguments = field(default_factory=dict)

    def assemble(self, network: nn.Module, vae: nn.Module) -> Pipeline:
        """The pipeline of these parts, without text encoders."""
        names = inspect.signature(self.pipeline).parameters
        parts: Call = dict.fromkeys(name for name in names if name.startswith(NOT_MADE))
        parts |= {"unet" if "unet" in names else "transformer": network, "vae": vae, "scheduler": self.scheduler()}
        return self.pipeline(**parts, **self.options)


_KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_KL_16_CHANNELS = {**_KL, "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}

SIZES: dict[str, Size] = {
    "sd15": Size(
        pipeline=StableDiffusionPipeline,
        network=UNet2DConditionModel,
        config={"sample_size": 64, "cross_attention_dim": 768},
        vae={**_KL, "latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215},
        embeds={"prompt_embeds": (1, 77, 768)},
        dtype=torch.float16,
        scheduler=RectifiedFlowScheduler,
        family="instaflow",
        options={"requires_safety_checker": False},
    ),
    "sd3-medium": Size(
        pipeline=StableDiffusion3Pipeline,
        network=SD3Transformer2DModel,
        config={"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        vae={**_KL_16_CHANNELS, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        embeds={"prompt_embeds": (1, 77 + 256, 4096), "pooled_prompt_embeds": (1, 2048)},
        dtype=torch.bfloat16,
        scheduler=partial(FlowMatchEulerDiscreteScheduler, shift=3.0),
    ),
    "flux-schnell": Size(
        pipeline=FluxPipeline,
        network=FluxTransformer2DModel,
        config={},
        vae={**_KL_16_CHANNELS, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        embeds={"prompt_embeds": (1, 256, 4096), "pooled_prompt_embeds": (1, 768)},
        dtype=torch.bfloat16,
        scheduler=partial(FlowMatchEulerDiscreteScheduler, shift=1.0),
    ),
    "sdxl": Size(
        pipeline=StableDiffusionXLPipeline,
        network=UNet2DConditionModel,
        config={
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
        vae={**_KL, "latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False},
        embeds={"prompt_embeds": (1, 77, 2048), "pooled_prompt_embeds": (1, 1280)},
        dtype=torch.float16,
        scheduler=RectifiedFlowScheduler,
        family="sdxl",
        options={"add_watermarker": False},
    ),
    "sana": Size(
        pipeline=SanaPipeline,
        network=SanaTransformer2DModel,
        config={},
        vae={
            "latent_channels": 32,
            "scaling_factor": 0.41407,
            "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
        },
        embeds={"prompt_embeds": (1, 300, 2304), "prompt_attention_mask": (1, 300)},
        dtype=torch.bfloat16,
        scheduler=partial(FlowMatchEulerDiscreteScheduler, shift=3.0),
        make_vae=AutoencoderDC,
        tiny={
            **{f"{side}_block_out_channels": (64,) * 6 for side in ("encoder", "decoder")},
            "num_encoder_blocks": (1, 3, 3, 3, 3, 3),
            "num_decoder_blocks": (3, 3, 3, 3, 3, 1),
        },
    ),
}


def size_of(model: str) -> Size:
    """The size of this model. ValueError lists the known models."""
    if model not in SIZES:
        raise ValueError(f"unknown model {model!r} for random weights: known are {', '.join(SIZES)}")
    return SIZES[model]


def full_size(model: str, device: torch.device | str, dtype: torch.dtype | None = None) -> Pipeline:
    """The pipeline of this model, with random weights and without text encoders, on the device. `dtype` None: the dtype that
    the model is published in. The device's random state does not change."""
    size = size_of(model)
    dtype = dtype or size.dtype
    with _making(device, dtype):
        network, vae = size.network(**size.config), size.make_vae(**size.vae)
    pipe = size.assemble(_for_inference(network, dtype), _for_inference(vae, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def full_size_tiny_vae(model: str, device: torch.device | str, dtype: torch.dtype | None = None) -> AutoencoderTiny:
    """An AutoencoderTiny of the size of the published one (TAESD, TAESD3, TAEF1) for this model, with random weights."""
    size = size_of(model)
    dtype = dtype or size.dtype
    with _making(device, dtype):
        vae = AutoencoderTiny(latent_channels=size.vae["latent_channels"], **size.tiny)
        _for_inference(vae, dtype)
        if torch.device(device).type != "meta":
            _spread(vae, size.vae["latent_channels"])
    return vae


def random_module(kind: type[nn.Module], config: Arguments, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A module of this class with random weights, for inference. The device's random state does not change."""
    with _making(device, dtype):
        module = kind(**config)
    return _for_inference(module, dtype)


def prompt_arguments(
    model: str, device: torch.device | str, dtype: torch.dtype | None = None, guided: bool = False
) -> dict[str, Tensor]:
    """Random embeddings in place of a prompt, under the names and in the shapes that the pipeline takes, with masks of ones.
    `guided`: embeddings in place of a negative prompt too."""
    size = size_of(model)
    generator = torch.Generator().manual_seed(0)
    made = {}
    for prefix in ("", "negative_") if guided else ("",):
        for name, shape in size.embeds.items():
            values = torch.ones(shape) if name.endswith("mask") else torch.randn(shape, generator=generator)
            made[prefix + name] = values.to(device, dtype or size.dtype)
    return made


def _for_inference(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself, with its buffers in the dtype too; diffusers' own `to` would warn."""
    return nn.Module.to(module, dtype).eval().requires_grad_(False)


@contextmanager
def _making(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside are on the device in the dtype, and their weights depend on the device alone."""
    device, before = torch.device(device), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@torch.no_grad()
def _spread(vae: AutoencoderTiny, channels: int) -> None:
    """Scale the decoder's last convolution, so that a network without norms draws images with contrast instead of grey."""
    decoder = vae.get_submodule("decoder")
    last = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)][-1]
    assert last.bias is not None, "the last convolution of an AutoencoderTiny has a bias"
    weight = next(decoder.parameters())
    x = torch.randn(1, channels, 16, 16, device=weight.device, dtype=weight.dtype)
    last.weight.mul_(IMAGE_STD / decoder(x).float().std())
    last.bias.sub_(decoder(x).float().mean() / 2)  # the decoder ends with 2 x - 1
