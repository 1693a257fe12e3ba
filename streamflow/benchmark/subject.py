"""The model that is measured: a pipeline, the arguments of its prompt, and its tiny VAE, each made once."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from streamflow import models, pretrained
from streamflow.benchmark.settings import Settings
from streamflow.benchmark.timing import wait
from streamflow.models.loading import DTYPES, prompt_defaults
from streamflow.models.protocols import Arguments, Call, Pipeline
from streamflow.pipeline import StreamFlow

PROMPT = "a red apple, 3d render"
GUIDANCE = 4.0  # the weight under cfg_type "full"; its value does not change the speed
COMPARED = 4  # frames whose images are compared


@dataclass(eq=False)
class Subject:
    """pipe: on its device, in its dtype. arguments: of its `__call__`, for the prompt and the negative prompt. tiny: an
    AutoencoderTiny, or None. seconds: the time it took to load."""

    settings: Settings
    pipe: Pipeline
    arguments: Arguments
    tiny: nn.Module | None = None
    family: str | None = None
    seconds: float = 0.0
    _references: dict[bool, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of the pipeline."""
        return self.pipe.device

    def under(self, settings: Settings) -> Subject:
        """The same model under other settings."""
        return replace(self, settings=settings, _references={})

    @property
    def guided(self) -> bool:
        """Whether every row has a second one for guidance."""
        return self.settings.cfg_type == "full"

    @property
    def prompt(self) -> Call:
        """The arguments of the prompt, and where it is used those of the negative prompt."""
        return {name: x for name, x in self.arguments.items() if self.guided or not name.startswith("negative_")}

    def with_vae(self, tiny: bool) -> Pipeline:
        """The pipe with its own VAE or with the tiny one; the network is shared."""
        if not tiny:
            return self.pipe
        twin = copy.copy(self.pipe)
        vars(twin)["vae"] = self.tiny
        return twin

    def stream(self, tiny: bool, batched: bool = True, skipped: int = 0) -> StreamFlow:
        """A prepared stream of the settings' steps; `batched=False` draws frame by frame. The schedule has `skipped` more
        steps, the noisiest, which are left out, as in image-to-image."""
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
        scale = stream.adapter.guidance_argument
        guidance: Call = {scale: GUIDANCE} if scale and self.guided else {}
        stream.prepare(num_inference_steps=skipped + s.steps, **self.prompt, **guidance)
        return stream

    def call(self, stream: StreamFlow) -> Call:
        """The arguments of the pipeline's own call that draws the images of this stream."""
        call = {"height": stream.height, "width": stream.width, "num_inference_steps": self.settings.steps, **self.prompt}
        if scale := stream.adapter.guidance_argument:
            call[scale] = GUIDANCE if self.guided else 1.0  # 1.0 switches the pipeline's guidance off
        return call

    def draw(self, pipe: Pipeline, latents: Tensor, stream: StreamFlow) -> Tensor:
        """The pipeline's own call from this noise: `[n, 3, H, W]` in [0, 1]."""
        return pipe(latents=latents, output_type="pt", **self.call(stream)).images

    def reference(self, tiny: bool) -> Tensor:
        """The first frames of the plain pipeline, one by one: float32 `[COMPARED, 3, H, W]` in [0, 1] on the CPU. Drawn
        once, and not while the network is accelerated."""
        if tiny not in self._references:
            with self.stream(tiny) as stream:
                pipe = self.with_vae(tiny)
                drawn = [self.draw(pipe, stream.frame_noise(k), stream) for k in range(COMPARED)]
            reference = torch.cat(drawn).float().cpu()
            if not reference.isfinite().all():
                raise ValueError(f"the plain pipeline's images are not finite in {pipe.dtype}: pass another --dtype")
            self._references[tiny] = reference
        return self._references[tiny]


def load(settings: Settings) -> Subject:
    """The model of the settings. ValueError or OSError where it is unknown or cannot be loaded."""
    began = time.perf_counter()
    subject = _full_size(settings) if settings.random_weights else _pretrained(settings)
    subject.pipe.set_progress_bar_config(disable=True)
    wait(subject.device)
    subject.seconds = time.perf_counter() - began
    return subject


def _full_size(s: Settings) -> Subject:
    from streamflow.benchmark import full_size as sizes

    size = sizes.size_of(s.model)
    if s.tiny_vae:
        raise ValueError(
            "--tiny-vae is for loaded models: with --random-weights there is a random tiny VAE of the published size"
        )
    dtype = DTYPES[s.dtype] if s.dtype else size.dtype if s.torch_device.type != "cpu" else torch.float32
    return Subject(
        settings=s,
        pipe=sizes.full_size(s.model, s.torch_device, dtype),
        arguments=sizes.prompt_arguments(s.model, s.torch_device, dtype, guided=True),
        tiny=sizes.full_size_tiny_vae(s.model, s.torch_device, dtype),
        family=s.family or size.family,
    )


def _pretrained(s: Settings) -> Subject:
    from streamflow.benchmark.full_size import SCHEDULERS, SIZES

    if s.model in SIZES:
        raise ValueError(f"{s.model!r} is a size for --random-weights: add that, or pass the hub id or folder of a model")
    dtype = DTYPES[s.dtype or ("float32" if s.torch_device.type == "cpu" else "float16")]
    pipe = models.load(s.model, dtype=dtype, family=s.family)
    family = s.family or models.PIPELINES.get(type(pipe).__name__)
    if family in SCHEDULERS:
        pipe.scheduler = SCHEDULERS[family]()
    tiny = s.tiny_vae or (pretrained.embedded_tiny_vae() if s.model == "embedded" else None)
    vae = models.load_tiny_vae(tiny, s.torch_device, dtype) if tiny else None
    arguments = {"prompt": PROMPT, "negative_prompt": "", **prompt_defaults(pipe)}
    return Subject(settings=s, pipe=pipe.to(s.torch_device), arguments=arguments, tiny=vae, family=family)
