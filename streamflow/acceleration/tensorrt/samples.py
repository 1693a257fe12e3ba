"""Parts of a pipeline without a stream: what the self-test and the tests build engines of."""

from __future__ import annotations

from typing import Any

import torch

from streamflow.acceleration import Parts
from streamflow.conditioning.prompt import stack

PROMPT = "a red apple, 3d render"


def parts_of(pipe: Any, family: str | None = None, rows: int = 2, size: int | None = None, **arguments: Any) -> Parts:
    """A pipeline's velocity, decoder and encoder, with inputs as a stream of `rows` rows and pictures of `size` pixels a
    side (None: the pipeline's own) gives them. `arguments`: more of the pipeline's own."""
    from streamflow.models import adapter_for

    adapter = adapter_for(pipe, family)
    size = adapter.default_size if size is None else size
    schedule, prompt = adapter.read({"prompt": PROMPT, **arguments}, 4, size, size, guided=False)
    device, dtype, shape = pipe.device, adapter.net.dtype, adapter.latent_shape(size, size)
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, *shape, generator=draw).to(device, dtype)
    times = schedule.timesteps[torch.arange(rows) % len(schedule)].to(device, torch.float32)
    pictures = torch.rand(rows, 3, size, size, generator=draw).to(device) * 2 - 1
    inputs = {"x": latents, "t": times, **stack((prompt.cond,) * rows)}
    return Parts.of(adapter, adapter.codec(pipe.vae, size, size), inputs, latents, pictures)
