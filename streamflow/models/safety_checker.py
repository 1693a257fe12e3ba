"""The safety checker of StreamDiffusionWrapper: CLIP features of every finished image, compared with those of unsafe
concepts. Knows images in [-1, 1]; no stream."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor
from transformers import CLIPImageProcessor

from streamflow.image_utils import normalize_image, postprocess_image

CHECKER = "CompVis/stable-diffusion-safety-checker"
FEATURES = "openai/clip-vit-base-patch32"


def load(pipe: Any) -> tuple[Any, Any]:
    """(checker, feature extractor): the pipe's own where it has both, else the hub's that StreamDiffusionWrapper loads.

    Raises:
        OSError: the hub cannot be reached, with how to pass them.
    """
    own = getattr(pipe, "safety_checker", None), getattr(pipe, "feature_extractor", None)
    if all(own):
        return own
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
def replace_unsafe(images: Tensor, checker: Any, features: Any, fallback: PIL.Image.Image) -> Tensor:
    """Images `[n, 3, H, W]` in [-1, 1], each of them that the checker objects to replaced by `fallback`, stretched to
    them."""
    parameter = next(checker.parameters())
    given = features(postprocess_image(images), return_tensors="pt").pixel_values.to(parameter.device, parameter.dtype)
    _, unsafe = checker(clip_input=given, images=images.clone())
    if not any(unsafe):
        return images
    instead = normalize_image(fallback, *images.shape[-2:]).as_subclass(Tensor).to(images.device, images.dtype)
    mask = torch.tensor(unsafe, device=images.device).reshape(-1, 1, 1, 1)
    return torch.where(mask, instead, images)
