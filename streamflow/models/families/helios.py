"""Helios and its pyramid: 33 frames a chunk, drawn under the latents of the last chunks and of the first frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamflow._validation import check_bool
from streamflow.models.protocols import Arguments
from streamflow.models.video import Drawn, History, VideoAdapter, VideoPlan, check_count, check_pixels

# A call continues a video where it is given the latents of that video, without more noise on them.
CONTINUES = {"add_noise_to_image_latents": False, "add_noise_to_video_latents": False, "is_amplify_first_chunk": False}
STARTS = frozenset(
    "image image_latents fake_image_latents video video_latents image_noise_sigma_min image_noise_sigma_max "
    "video_noise_sigma_min video_noise_sigma_max".split()
)


class Helios(VideoAdapter):
    """`HeliosPipeline` and `HeliosPyramidPipeline`.

    The pipeline keeps all that it has drawn, and reads the last `sum(history_sizes)` latent frames of it and the latent of
    the first frame. Here only these are kept. Each chunk is a call with them as `video_latents` and `image_latents`.
    """

    fps = 24.0
    read = ("image_latents",)
    changeable = frozenset(
        "prompt negative_prompt prompt_embeds negative_prompt_embeds max_sequence_length guidance_scale attention_kwargs "
        "num_inference_steps sigmas pyramid_num_inference_steps_list use_zero_init zero_steps".split()
    )

    def check(self, call: Arguments) -> None:
        for name in ("keep_first_frame", "is_skip_first_chunk"):
            check_bool(name, call[name])
        if not call["keep_first_frame"]:
            raise ValueError("keep_first_frame=False cannot be drawn: diffusers' own Helios pipelines fail with it")
        if call["sigmas"] is not None and not isinstance(call["sigmas"], np.ndarray):
            raise ValueError("sigmas is a numpy array: diffusers' HeliosScheduler takes no list")
        _check_sizes("history_sizes", call["history_sizes"], 3)
        given = call["image_latents"] is not None, call["fake_image_latents"] is not None
        if call["image"] is None and call["add_noise_to_image_latents"] and any(given) and not all(given):
            raise ValueError("image_latents and fake_image_latents belong together: pass image=, or both of them")
        self._check_latents(call)
        self._check_images(call)
        if "pyramid_num_inference_steps_list" in call:
            self._check_pyramid(call)

    def draw(self, plan: VideoPlan, history: History, generator: torch.Generator) -> Drawn:
        call = self._with_defaults(plan.call)
        frames, kept = call["num_latent_frames_per_chunk"], sum(call["history_sizes"])
        arguments = dict(plan.call)
        if history.chunks:
            arguments = {name: value for name, value in arguments.items() if name not in STARTS}
            arguments.update(
                {name: value for name, value in CONTINUES.items() if name in self.parameters}, **history.tensors
            )
        drawn, found = self._call({**arguments, "num_frames": 1}, generator)
        latents, first = drawn[:, :, -frames:], found["image_latents"]
        if (history.chunks == 0 and first is None) or (history.chunks == 1 and call["is_skip_first_chunk"]):
            first = latents[:, :, :1]
        last = drawn[:, :, -kept:]
        if last.shape[2] < kept:  # before the first frame, the history is zeros
            last = torch.cat([last.new_zeros(*last.shape[:2], kept - last.shape[2], *last.shape[3:]), last], dim=2)
        tensors = {"image_latents": first.clone(), "video_latents": last.clone()}
        images = (frames - 1) * self.pipe.vae_scale_factor_temporal + 1
        return Drawn(latents.clone(), self.scaled(), images, History(history.chunks + 1, tensors))

    def _with_defaults(self, call: Arguments) -> dict[str, Any]:
        return {name: one.default for name, one in self.parameters.items()} | dict(call)

    def _check_latents(self, call: Arguments) -> None:
        factor = self.pipe.vae_scale_factor_spatial
        height, width = call["height"] // factor, call["width"] // factor
        for name, frames in (("image_latents", 1), ("fake_image_latents", 1), ("video_latents", None)):
            latents = call[name]
            if latents is None:
                continue
            shape = [1, self.pipe.transformer.config.in_channels, frames or "T", height, width]
            found = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            if not isinstance(found, list) or len(found) != 5 or found != [*shape[:2], frames or found[2], *shape[3:]]:
                raise ValueError(f"{name} is a tensor {shape}, not {found}".replace("'", ""))
            if not torch.isfinite(latents).all():
                raise ValueError(f"{name} holds NaN or infinite values")

    def _check_images(self, call: Arguments) -> None:
        """Have the pipeline's own processor read the image or the video, which the first chunk reads again."""
        size, processor = {"height": call["height"], "width": call["width"]}, self.pipe.video_processor
        if call["image"] is not None:
            image = processor.preprocess(call["image"], **size)
            check_pixels("image", image, len(image))
        if call["video"] is not None:
            video = processor.preprocess_video(call["video"], **size)
            check_pixels("video", video, len(video))
            least = (call["num_latent_frames_per_chunk"] - 1) * self.pipe.vae_scale_factor_temporal + 1
            if video.shape[2] < least:
                raise ValueError(f"video has {video.shape[2]} frames, and a chunk is {least}: pass {least} or more")

    def _check_pyramid(self, call: Arguments) -> None:
        for name in ("is_amplify_first_chunk", "use_zero_init"):
            check_bool(name, call[name])
        check_count("zero_steps", call["zero_steps"], 0)
        steps = call["pyramid_num_inference_steps_list"]
        _check_sizes("pyramid_num_inference_steps_list", steps, self.pipe.scheduler.config.stages)
        patch = self.pipe.transformer.config.patch_size
        for name, cells in zip(("height", "width"), patch[1:], strict=True):
            unit = self.pipe.vae_scale_factor_spatial * cells * 2 ** (len(steps) - 1)
            if call[name] % unit:
                raise ValueError(f"{name} {call[name]} is no multiple of {unit}, as a pyramid of {len(steps)} stages needs")
        try:
            self.pipe.sample_block_noise(1, 1, 1, *patch[1:], patch, self.device, torch.Generator(self.device))
        except torch.linalg.LinAlgError as error:
            scheduler = self.pipe.scheduler
            raise ValueError(
                f"the scheduler's gamma {scheduler.config.gamma:.6g} gives a singular covariance on {self.device}: "
                f"pipe.scheduler = {type(scheduler).__name__}.from_config(pipe.scheduler.config, gamma=0.33) does not"
            ) from error


def _check_sizes(name: str, value: object, count: int) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        raise ValueError(f"{name} is a list of {count} numbers, not {value!r}")
    for one in value:
        check_count(name, one, unit="integers")
