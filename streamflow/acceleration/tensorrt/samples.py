"""Parts of a pipeline without a stream: what the self-test and the tests build engines of."""

from __future__ import annotations

from typing import Any

import torch

from streamflow.acceleration import Part, Parts

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
    cond = {name: value.repeat(rows, *[1] * (value.dim() - 1)) for name, value in prompt.cond.rows.items()}
    codec = adapter.codec(pipe.vae, size, size)
    pictures = torch.rand(rows, 3, size, size, generator=draw).to(device) * 2 - 1
    velocity = Part(
        *("velocity", adapter.velocity, {"x": latents, "t": times, **cond, **prompt.cond.shared}),
        positional=2,
        shared=frozenset(adapter.shared_inputs),
        free_size=getattr(adapter, "free_size", False),
        exportable=adapter.exportable,
    )
    free = latents.dim() == 4
    decoder = Part("decoder", codec.decoder, {"latents": latents}, free_size=free)
    return Parts(velocity, decoder, Part("encoder", codec.encoder, {"pictures": pictures}, free_size=free))
