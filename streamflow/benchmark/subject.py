"""The model that is measured: a pipeline, the arguments that stand for its prompt, and its tiny VAE, each made once."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from streamflow import models, pretrained
from streamflow.benchmark.settings import Settings
from streamflow.benchmark.timing import wait
from streamflow.models.loading import DTYPES
from streamflow.pipeline import StreamFlow

PROMPT = "a red apple, 3d render"
GUIDANCE = 4.0  # the weight under cfg_type "full"; what it is does not change the speed
COMPARED = 4  # frames whose pictures are compared


@dataclass(eq=False)
class Subject:
    """pipe: on its device, in its dtype. arguments: of its `__call__`, the prompt's, a negative one included. tiny: an
    AutoencoderTiny, or None. seconds: how long it took to load."""

    settings: Settings
    pipe: Any
    arguments: Mapping[str, Any]
    tiny: nn.Module | None = None
    family: str | None = None
    seconds: float = 0.0
    _references: dict[bool, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return self.pipe.device

    def under(self, settings: Settings) -> Subject:
        """The same model under other settings."""
        return replace(self, settings=settings, _references={})

    @property
    def guided(self) -> bool:
        """Whether every row has a guidance twin."""
        return self.settings.cfg_type == "full"

    @property
    def prompt(self) -> dict[str, Any]:
        """The arguments of the prompt; of the negative one only where it is used."""
        return {name: x for name, x in self.arguments.items() if self.guided or not name.startswith("negative_")}

    def with_vae(self, tiny: bool) -> Any:
        """The pipe with its own VAE or with the tiny one; networks are shared."""
        if not tiny:
            return self.pipe
        twin = copy.copy(self.pipe)
        vars(twin)["vae"] = self.tiny
        return twin

    def stream(self, tiny: bool, batched: bool = True, skipped: int = 0) -> StreamFlow:
        """A prepared stream of the settings' steps; `batched=False` draws frame by frame. The schedule has `skipped` steps
        more, the noisiest, which are left out, as image-to-image does."""
        s = self.settings
        stream = StreamFlow(
            self.with_vae(tiny),
            range(skipped, skipped + s.steps),
            width=s.width,
            height=s.height,
            use_denoising_batch=batched,
            frame_buffer_size=s.frame_buffer_size if batched else 1,
            cfg_type=s.cfg_type,
            family=self.family,
        )
        guidance = self._guidance(stream, stream_call=True)
        stream.prepare(num_inference_steps=skipped + s.steps, **self.prompt, **guidance)
        return stream

    def draw(self, pipe: Any, latents: Tensor, stream: StreamFlow) -> Tensor:
        """The pipeline's own call from this noise: `[n, 3, H, W]` in [0, 1]."""
        size = {"height": stream.height, "width": stream.width, "num_inference_steps": self.settings.steps}
        call = {**self.prompt, **self._guidance(stream, stream_call=False), **size}
        return pipe(latents=latents, output_type="pt", **call).images

    def reference(self, tiny: bool) -> Tensor:
        """The first frames by the plain pipeline, one by one: float32 `[COMPARED, 3, H, W]` in [0, 1] on the CPU. Drawn
        once, and not while the network is accelerated."""
        if tiny not in self._references:
            with self.stream(tiny) as stream:
                pipe = self.with_vae(tiny)
                drawn = [self.draw(pipe, stream.frame_noise(k), stream) for k in range(COMPARED)]
            reference = torch.cat(drawn).float().cpu()
            if not reference.isfinite().all():
                raise ValueError(f"the plain pipeline's pictures are not finite in {pipe.dtype}: pass another --dtype")
            self._references[tiny] = reference
        return self._references[tiny]

    def _guidance(self, stream: StreamFlow, stream_call: bool) -> dict[str, float]:
        """The argument that sets the weight of classifier-free guidance, or that switches it off in the pipeline."""
        name = stream.adapter.guidance_argument
        if self.guided:
            return {name: GUIDANCE}
        return {} if stream_call else {name: 1.0}


def load(settings: Settings) -> Subject:
    """The model that the settings name. ValueError or OSError where it is unknown or cannot be loaded."""
    began = time.perf_counter()
    subject = _true_size(settings) if settings.random_weights else _pretrained(settings)
    subject.pipe.set_progress_bar_config(disable=True)
    wait(subject.device)
    subject.seconds = time.perf_counter() - began
    return subject


def _true_size(s: Settings) -> Subject:
    from streamflow.benchmark import true_size as sizes

    size = sizes.size_of(s.model)
    if s.tiny_vae:
        raise ValueError(
            "--tiny-vae goes with a model that is loaded: with --random-weights there is a random one of its size"
        )
    dtype = DTYPES[s.dtype] if s.dtype else size.dtype if s.torch_device.type != "cpu" else torch.float32
    return Subject(
        s,
        sizes.true_size(s.model, s.torch_device, dtype),
        sizes.prompt_arguments(s.model, s.torch_device, dtype, guided=True),
        sizes.true_tiny_vae(s.model, s.torch_device, dtype),
        s.family or size.family,
    )


def _pretrained(s: Settings) -> Subject:
    from streamflow.benchmark.true_size import SCHEDULERS, SIZES

    if s.model in SIZES:
        raise ValueError(f"{s.model!r} names a size: add --random-weights, or pass the hub id or folder of a model")
    dtype = DTYPES[s.dtype or ("float32" if s.torch_device.type == "cpu" else "float16")]
    pipe = models.load(s.model, dtype=dtype, family=s.family)
    family = s.family or models.PIPELINES.get(type(pipe).__name__)
    if family in SCHEDULERS:
        pipe.scheduler = SCHEDULERS[family]()
    tiny = s.tiny_vae or (pretrained.embedded_tiny_vae() if s.model == "embedded" else None)
    vae = models.load_tiny_vae(tiny, s.torch_device, dtype) if tiny else None
    return Subject(s, pipe.to(s.torch_device), prompt_of(pipe), vae, family)


def prompt_of(pipe: Any) -> dict[str, Any]:
    """A prompt for a pipeline with text encoders. Without a T5, Stable Diffusion 3 would append 256 empty tokens."""
    no_t5 = getattr(pipe, "text_encoder_3", pipe) is None
    return {"prompt": PROMPT, "negative_prompt": ""} | ({"max_sequence_length": 0} if no_t5 else {})
