"""The embedded model: its folder, its licences, and that plain diffusers draws what is asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from streamflow.pretrained import EXAMPLE_PROMPTS, embedded, embedded_tiny_vae  # noqa: E402

REFERENCE = Path(__file__).parent / "data" / "emoji_reference.npz"
LIMIT_MIB = 80
TWIN_PSNR = 25.0  # dB; 29.0 on the 3d images (evaluation.json)


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusion3Pipeline

    loaded = StableDiffusion3Pipeline.from_pretrained(embedded())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def noise(seed: int) -> torch.Tensor:
    return torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def nearest(image: torch.Tensor) -> str:
    """The label of the 3d training image nearest to `image` [3, 128, 128] at 16x16."""
    with np.load(REFERENCE) as reference:
        pixels, labels = reference["pixels"].astype(np.float32) / 255, reference["labels"]
    small = torch.nn.functional.avg_pool2d(image, 8).flatten().numpy()
    return str(labels[((pixels - small) ** 2).sum(1).argmin()])


def test_loads_in_float32_and_without_t5(pipe):
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert {p.dtype for p in getattr(pipe, name).parameters()} == {torch.float32}, name
    assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None
    assert pipe.tokenizer.model_max_length <= 32


def test_size_and_licences():
    folder = Path(embedded())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    assert size <= LIMIT_MIB, f"{size:.1f} MiB"
    notice = (folder / "NOTICE").read_text()
    assert "Copyright (c) Microsoft Corporation" in notice and "Apache License, Version 2.0" in notice
    assert "licen" in (folder / "README.md").read_text().lower()


def test_default_size_is_128(pipe):
    assert pipe.default_sample_size * pipe.vae_scale_factor == 128


@pytest.mark.parametrize("arguments", [{}, {"max_sequence_length": 0}], ids=["256 zero tokens", "none"])
@pytest.mark.parametrize(
    ("prompt", "label"), [("a red apple, 3d render", "red apple"), ("a sunflower, 3d render", "sunflower")]
)
def test_four_steps_without_guidance_are_recognised(pipe, prompt, label, arguments):
    few = {"num_inference_steps": 4, "guidance_scale": 0, "output_type": "pt"}
    image = pipe(prompt, latents=noise(0), **few, **arguments).images[0]
    assert image.shape == (3, 128, 128)
    assert nearest(image) == label


@torch.no_grad()
def test_the_twin_decodes_the_same_latents(pipe):
    from diffusers import AutoencoderTiny

    twin = AutoencoderTiny.from_pretrained(embedded_tiny_vae())
    latent = pipe(EXAMPLE_PROMPTS[0], num_inference_steps=2, guidance_scale=0, max_sequence_length=0, latents=noise(1),
                  output_type="latent").images  # fmt: skip
    of_pipe = pipe.vae.decode(latent / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    of_twin = twin.decode(latent / twin.config.scaling_factor + twin.config.shift_factor).sample
    error = ((of_pipe.clamp(-1, 1) - of_twin.clamp(-1, 1)) / 2).square().mean()
    assert -10 * torch.log10(error) >= TWIN_PSNR


def test_sixteen_example_prompts():
    assert len(set(EXAMPLE_PROMPTS)) == 16
