"""StreamDiffusionWrapper for flows: a model by its name, prepared and warm, in one object. Every argument of
StreamDiffusion's does what it says, or is refused with the reason. Knows how the parts are put together, and holds none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import PIL.Image
import torch
from torch import Tensor

from streamflow import models
from streamflow.config import Settings
from streamflow.image_utils import postprocess_image
from streamflow.pipeline import StreamFlow

OUTPUTS = ("pil", "np", "pt", "latent")
MODES = ("img2img", "txt2img")
NOT_HERE = {
    "xformers": "torch's own attention has taken its place: choose 'auto', or 'none'",
    "sfast": "stable-fast is no longer kept up: choose 'auto' (torch.compile with a CUDA graph), or 'none'",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class StreamFlowWrapper:
    """A stream of a model that is loaded, adapted and accelerated here.

    Args, in StreamDiffusionWrapper's order:
        model_id_or_path: "embedded", a hub id, a folder or a .safetensors file (`streamflow.models.load`).
        t_index_list: as `StreamFlow`'s; None: all steps.
        lora_dict: LoRAs, hub id or file, and how strong each is. They stay adapters: `stream.set_adapters` changes them.
        mode: "img2img" or "txt2img": what calling the wrapper does, and what it warms up.
        output_type: of what calls return: "pil", "np" or "pt" in [0, 1], or "latent", StreamDiffusion's name for the
            pictures in [-1, 1] as they leave the stream.
        lcm_lora_id, use_lcm_lora: refused where set: a flow needs no LCM-LoRA.
        vae_id: hub id or folder of a tiny VAE in the place of the model's VAE.
        device: None: a GPU where there is one. dtype: None: float32 on a CPU, bfloat16 elsewhere.
        frame_buffer_size, width, height, do_add_noise, use_denoising_batch, cfg_type: as `StreamFlow`'s.
        warmup: pictures drawn and thrown away after the first `prepare`.
        acceleration: as `StreamFlow.accelerate`'s; "tensorrt" keeps its engines in `engine_dir`.
        device_ids: more devices, "cuda:1" or 1: the decode and the denoising rows are spread over all of them.
        use_tiny_vae: the family's own tiny VAE, where `vae_id` names none.
        enable_similar_image_filter, similar_image_filter_threshold, similar_image_filter_max_skip_frame: as StreamFlow's.
        seed: of all noise, in every `prepare`.
        use_safety_checker: every picture goes through the pipeline's safety checker, where the family has one.
        like: width and height of a picture, whose proportions the size takes where neither width nor height is given.
        family, acceleration_options, stream_options: StreamFlow's, beyond StreamDiffusion's.

    Raises:
        ValueError, TypeError, NotImplementedError, FileNotFoundError: for what cannot be, before anything is loaded where
            that can be told.
    """

    def __init__(
        self,
        model_id_or_path: str = "embedded",
        t_index_list: Sequence[int] | None = None,
        lora_dict: Mapping[str, float] | None = None,
        mode: Literal["img2img", "txt2img"] = "img2img",
        output_type: Literal["pil", "pt", "np", "latent"] = "pil",
        lcm_lora_id: str | None = None,
        vae_id: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        frame_buffer_size: int = 1,
        width: int | None = None,
        height: int | None = None,
        warmup: int = 10,
        acceleration: str = "auto",
        do_add_noise: bool = False,
        device_ids: Sequence[int | str] | None = None,
        use_lcm_lora: bool = False,
        use_tiny_vae: bool = False,
        enable_similar_image_filter: bool = False,
        similar_image_filter_threshold: float = 0.98,
        similar_image_filter_max_skip_frame: int = 10,
        use_denoising_batch: bool = True,
        cfg_type: Literal["none", "full", "self", "initialize"] = "self",
        seed: int = 2,
        use_safety_checker: bool = False,
        engine_dir: str | Path | None = "engines",
        *,
        like: tuple[int, int] | None = None,
        family: str | None = None,
        acceleration_options: Mapping[str, Any] | None = None,
        stream_options: Mapping[str, Any] | None = None,
    ) -> None:
        _check(mode, MODES, "mode")
        _check(output_type, OUTPUTS, "output_type")
        if use_lcm_lora or lcm_lora_id is not None:
            raise NotImplementedError(
                "a rectified flow draws in few steps by itself: leave lcm_lora_id and use_lcm_lora out"
            )
        if acceleration in NOT_HERE:
            raise ValueError(f"acceleration {acceleration!r}: {NOT_HERE[acceleration]}")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"warmup must be an integer of 0 or more, not {warmup!r}")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype such as torch.float16, not {dtype!r}")
        self.mode, self.output_type, self.seed, self.warmup = mode, output_type, seed, warmup
        device = torch.device(device or _first_device())
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        pipe = models.load(model_id_or_path, device=device, dtype=dtype, family=family)
        self._checker = _safety_checker(pipe) if use_safety_checker else None
        if like is not None and width is None and height is None:
            width, height = models.adapter_for(pipe, family).size_like(*like)
        self._defaults = {"max_sequence_length": 0} if model_id_or_path == "embedded" else {}  # it has no T5
        self.stream = StreamFlow(
            pipe,
            t_index_list,
            width=width,
            height=height,
            do_add_noise=do_add_noise,
            use_denoising_batch=use_denoising_batch,
            frame_buffer_size=frame_buffer_size,
            cfg_type=cfg_type,
            family=family,
            **(stream_options or {}),
        )
        _adapt(self.stream, lora_dict or {})
        if vae_id is not None or use_tiny_vae:
            self.stream.use_tiny_vae(vae_id)
        _spread(self.stream, device_ids)
        if enable_similar_image_filter:
            self.stream.enable_similar_image_filter(similar_image_filter_threshold, similar_image_filter_max_skip_frame)
        options = dict(acceleration_options or {})
        if acceleration == "tensorrt" and engine_dir is not None:
            options.setdefault("engine_dir", engine_dir)
        self.stream.accelerate(acceleration, **options)

    @classmethod
    def from_settings(cls, settings: Settings, **changes: Any) -> Self:
        """The wrapper of these settings, prepared and warm. `changes`: other arguments of the wrapper."""
        s, similar = settings, settings.similar_image_filter
        arguments: dict[str, Any] = {
            "lora_dict": s.loras,
            "mode": s.mode,
            "vae_id": s.tiny_vae if isinstance(s.tiny_vae, str) else None,
            "device": s.device,
            "dtype": DTYPES[s.dtype] if s.dtype else None,
            "frame_buffer_size": s.frame_buffer_size,
            "width": s.width,
            "height": s.height,
            "warmup": s.warmup,
            "acceleration": s.acceleration.kind,
            "acceleration_options": s.acceleration.options,
            "do_add_noise": s.do_add_noise,
            "device_ids": s.devices or None,
            "use_tiny_vae": s.tiny_vae is True,
            "use_denoising_batch": s.use_denoising_batch,
            "cfg_type": s.cfg_type,
            "seed": s.seed,
            "family": s.family,
            "engine_dir": None,
        }
        if similar is not None:
            arguments["enable_similar_image_filter"] = True
            arguments |= {f"similar_image_filter_{name}": value for name, value in similar.model_dump().items()}
        self = cls(s.model, s.t_index_list, **{**arguments, **changes})
        prompt = s.prompt if isinstance(s.prompt, str) else list(s.prompt)
        strength = {} if s.strength is None else {"strength": s.strength}
        self.prepare(prompt, s.negative_prompt, s.num_inference_steps, s.guidance_scale, s.delta, **strength)
        return self

    # -- StreamDiffusionWrapper's calls -----------------------------------------------------------------------------------

    def prepare(
        self,
        prompt: Any,
        negative_prompt: str = "",
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        delta: float = 1.0,
        **arguments: Any,
    ) -> None:
        """As `StreamFlow.prepare`, with the wrapper's seed unless one is given; the first time, warm up."""
        if "generator" not in arguments:
            arguments.setdefault("seed", self.seed)
        arguments = {**self._defaults, **arguments}
        self.stream.prepare(prompt, negative_prompt, num_inference_steps, guidance_scale, delta, **arguments)
        if self.warmup:
            self._warm_up()

    def _warm_up(self) -> None:
        count, self.warmup = self.warmup, 0
        blank = torch.zeros(1, 3, self.stream.height, self.stream.width)
        pictures = [blank] * self.stream.frame_bff_size
        for _ in range(count):
            self.stream(torch.cat(pictures)) if self.mode == "img2img" else self.stream.txt2img()
        self.stream.reset()

    def __call__(self, image: Any = None, prompt: Any = None) -> Any:
        """`img2img(image, prompt)` in mode "img2img", else `txt2img(prompt)`."""
        if self.mode == "txt2img":
            if image is not None:
                raise ValueError("mode is 'txt2img', and an image was given: make the wrapper with mode='img2img'")
            return self.txt2img(prompt)
        if image is None:
            raise ValueError("mode is 'img2img', and no image was given: make the wrapper with mode='txt2img'")
        return self.img2img(image, prompt)

    def txt2img(self, prompt: Any = None) -> Any:
        """The next picture, or `frame_buffer_size` of them as a list; with a prompt, of it from here on."""
        self._take(prompt)
        return self._out(self.stream.txt2img())

    def img2img(self, image: Any, prompt: Any = None) -> Any:
        """A picture (PIL, array, tensor or path), or `frame_buffer_size` of them, restyled."""
        self._take(prompt)
        return self._out(self.stream(_opened(image)))

    def update(self, **changes: Any) -> int:
        """As `StreamFlow.update`: any of prompt, negative_prompt, guidance_scale, delta, seed, strength, t_index_list,
        num_inference_steps, from any thread."""
        self.seed = changes.get("seed") if changes.get("seed") is not None else self.seed
        return self.stream.update(**changes)

    def preprocess_image(self, image: Any) -> Tensor:
        """A picture (or a path) as `[1, 3, height, width]` in [-1, 1], which calls take as it is."""
        return self.stream.preprocess(_opened(image))

    def postprocess_image(self, image_tensor: Tensor, output_type: str = "pil") -> Any:
        """Pictures `[n, 3, H, W]` in [-1, 1] as this type; one alone is not in a list."""
        _check(output_type, OUTPUTS, "output_type")
        out = postprocess_image(image_tensor, output_type)
        return out if self.stream.frame_bff_size > 1 else out[0]

    def close(self) -> None:
        """As `StreamFlow.close`."""
        self.stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _take(self, prompt: Any) -> None:
        if prompt is not None:
            self.stream.update_prompt(prompt)

    def _out(self, pictures: Tensor) -> Any:
        if self._checker is not None:
            pictures = self._checker(pictures)
        return self.postprocess_image(pictures, self.output_type)


def _check(value: str, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(known)}")


def _first_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _opened(image: Any) -> Any:
    return PIL.Image.open(image).convert("RGB") if isinstance(image, (str, Path)) else image


def _adapt(stream: StreamFlow, loras: Mapping[str, float]) -> None:
    names = {stream.load_lora(where): weight for where, weight in loras.items()}
    if names:
        stream.set_adapters(names)


def _spread(stream: StreamFlow, device_ids: Sequence[int | str] | None) -> None:
    """The decode and the denoising rows over these devices and the stream's own."""
    if not device_ids:
        return
    from streamflow.parallel import shard_denoiser, shard_vae

    named = [torch.device("cuda", one) if isinstance(one, int) else torch.device(one) for one in device_ids]
    devices = named if stream.device in named else [stream.device, *named]
    stream.vae = shard_vae(stream.vae, devices)
    shard_denoiser(stream, devices)


def _safety_checker(pipe: Any) -> Any:
    """What makes every picture that the pipeline's checker objects to black."""
    if getattr(pipe, "safety_checker", None) is None:
        raise ValueError(f"this {type(pipe).__name__} has no safety checker: load one that has, or use_safety_checker=False")

    def check(pictures: Tensor) -> Tensor:
        checked, _ = pipe.run_safety_checker(pictures, pipe.device, pictures.dtype)
        return checked

    return check
