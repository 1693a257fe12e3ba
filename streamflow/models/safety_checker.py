"""The safety checker of StreamDiffusionWrapper: CLIP features of every finished image, compared with those of unsafe
concepts. Knows images in [-1, 1]; no stream."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from streamflow.image_utils import normalize_image, postprocess_image
from streamflow.models.protocols import Function, Pipeline

CHECKER = "CompVis/stable-diffusion-safety-checker"
FEATURES = "openai/clip-vit-base-patch32"


def load(pipe: Pipeline) -> tuple[nn.Module, Function]:
    """(checker, feature extractor): the pipe's own where it has both, else those that StreamDiffusionWrapper loads.

    Raises:
        OSError: the hub cannot be reached, with how to pass them.
    """
    checker: Any = getattr(pipe, "safety_checker", None)
    features: Any = getattr(pipe, "feature_extractor", None)
    if checker and features:
        return checker, features
    try:
        checker = StableDiffusionSafetyChecker.from_pretrained(CHECKER)
        return checker.to(pipe.device), CLIPImageProcessor.from_pretrained(FEATURES)
    except OSError as error:
        raise OSError(
            f"the safety checker {CHECKER} and the feature extractor {FEATURES} could not be loaded: pass both, "
            f"safety_checker=(StableDiffusionSafetyChecker.from_pretrained(folder), "
            f"CLIPImageProcessor.from_pretrained(folder)), or use_safety_checker=False"
        ) from error


@torch.no_grad()
def replace_unsafe(images: Tensor, checker: nn.Module, features: Function, fallback: PIL.Image.Image) -> Tensor:
    """Images `[n, 3, H, W]` in [-1, 1]; those that the checker finds unsafe are replaced by `fallback`, resized to them."""
    parameter = next(checker.parameters())
    pixels = features(postprocess_image(images), return_tensors="pt").pixel_values.to(parameter.device, parameter.dtype)
    _, unsafe = checker(clip_input=pixels, images=images.clone())
    if not any(unsafe):
        return images
    height, width = images.shape[-2:]
    replacement = normalize_image(fallback, height, width).as_subclass(Tensor).to(images.device, images.dtype)
    mask = torch.tensor(unsafe, device=images.device).reshape(-1, 1, 1, 1)
    return torch.where(mask, replacement, images)
