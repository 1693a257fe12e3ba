"""Small random pipelines of the families with their own solver, for `random_pipelines.random_pipeline`."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

from random_pipelines import _instaflow, _sdxl
from random_pipelines import transformers as random_transformers


def perflow(**changes: Any) -> Any:
    """A tiny random PeRFlow pipeline."""
    return _with_ddim(_instaflow(**changes))


def perflow_sdxl(**changes: Any) -> Any:
    """A tiny random PeRFlow SDXL pipeline."""
    return _with_ddim(_sdxl(**changes))


def sana_sprint(**changes: Any) -> SanaSprintPipeline:
    """A tiny random Sana-Sprint pipeline."""
    plain = random_transformers.sana()
    config = {**plain.transformer.config, "guidance_embeds": True, "timestep_scale": 1000.0, **changes}
    parts = {name: getattr(plain, name) for name in ("vae", "text_encoder", "tokenizer")}
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    return SanaSprintPipeline(transformer=SanaTransformer2DModel(**config), scheduler=SCMScheduler(), **parts)


def _with_ddim(pipe: Any) -> Any:
    pipe.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return pipe
