"""StreamDiffusionWrapper for flows: a model by its name, prepared and warm, in one object. Every argument of
StreamDiffusion's does what it says, or is refused with the reason; so does every attribute that is assigned. The names that
livepeer's fork added are forwards. Knows how the parts are put together, and holds none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

import PIL.Image
import torch
from torch import Tensor, nn

from streamflow import models, pretrained
from streamflow._validation import whole_number
from streamflow.conditioning.blending import METHODS, parts
from streamflow.conditioning.control_makers import ControlMaker, check_maker
from streamflow.image_utils import Images, Maker, as_rgb, open_image, postprocess_image
from streamflow.models.loading import control_source, default_device, default_dtype, load_control, prompt_defaults
from streamflow.pipeline import StreamFlow
from streamflow.stream import forwards
from streamflow.stream.forwards import Attribute
from streamflow.stream.planner import Planner
from streamflow.stream.request import Seeds, Texts

if TYPE_CHECKING:
    import numpy as np

    from streamflow.models.protocols import Function

    Output = Tensor | np.ndarray | PIL.Image.Image | list[PIL.Image.Image]
    from streamflow.app.config import Settings
    from streamflow.models.protocols import Arguments, Call, Pipeline

logger = logging.getLogger(__name__)
CHOICES = {"mode": ("img2img", "txt2img"), "output_type": ("pil", "np", "pt", "latent")}

# What livepeer's fork has and StreamFlow does not, by the names of its arguments and methods.
_CONTROL = (
    "control nets are diffusers models here: pass control_net= and control_maker=, or call "
    "wrapper.stream.add_control(name, model), then stream(image, control={...})"
)
_CACHED = "cached attention over earlier frames (V2V) is not offered; StreamFlow(..., feedback=...) holds a video still"
_HOOKS = "images are pre- and postprocessed by the caller, before and after each call"
_MEMORY = "engines are built for what a stream needs, and torch raises an error where memory is short"
NOT_HERE = {
    **dict.fromkeys(("use_controlnet", "controlnet_config", "controlnets", "update_control_image"), _CONTROL),
    **dict.fromkeys(("update_control_image_efficient", "get_last_processed_image", "cleanup_controlnets"), _CONTROL),
    **dict.fromkeys(("use_cached_attn", "cache_maxframes", "cache_interval", "cached_attention", "stream_v2v"), _CACHED),
    **dict.fromkeys((f"{what}_{when}processing_config" for what in ("image", "latent") for when in ("pre", "post")), _HOOKS),
    **dict.fromkeys((f"{what}_{when}processing" for what in ("image", "latent") for when in ("pre", "post")), _HOOKS),
    **dict.fromkeys(("check_gpu_memory_for_engine", "cleanup_engines_and_rebuild"), _MEMORY),
    "compile_engines_only": "python -m streamflow.acceleration.tensorrt --build-only builds engines without a stream",
    "enable_pytorch_fallback": "accelerate('tensorrt', fallback='eager') goes on without an engine",
    "sampler": "a flow's noise levels are its scheduler's: assign wrapper.stream.scheduler",
    "scheduler": "a flow's noise levels are its scheduler's: assign wrapper.stream.scheduler",
}

# The keys of an entry of livepeer's `ipadapter_config`: those that are read, and those that ask for what there is not.
IPADAPTER = (
    "ipadapter_model_path",
    "image_encoder_path",
    "style_image",
    "style_image_key",
    "scale",
    "enabled",
    "type",
    "num_image_tokens",  # which the adapter says itself
)
_FACES = "FaceID needs a face detector: pass its embeddings, wrapper.stream.image_prompts.set(ImageEmbeds(...))"
NOT_OF_IPADAPTER = {
    **dict.fromkeys(("is_faceid", "insightface_model_name"), _FACES),
    "weight_type": "an adapter has one scale for all blocks",
}

_STREAM = "assign wrapper.stream.{}"
_PREPARE = "call prepare({0}=...) or update({0}=...)"
_FILTER = "call wrapper.stream.enable_similar_image_filter(...) or disable_similar_image_filter()"
READ_ONLY = {
    **{
        name: _PREPARE.format(name)
        for name in ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "delta")
    },
    **{name: _STREAM.format(name) for name in ("cfg_type", "do_add_noise", "scheduler")},
    **dict.fromkeys(("enable_similar_image_filter", "similar_image_filter_threshold"), _FILTER),
    "similar_image_filter_max_skip_frame": _FILTER,
    "batch_size": "it follows from t_index_list and frame_buffer_size: update(t_index_list=...)",
    "t_index_list": "call update(t_index_list=...)",
    "sd_turbo": "it is whether the model's name holds 'turbo'",
    "acceleration": "call wrapper.stream.accelerate(...)",
}
SETTABLE = (
    "mode",
    "output_type",
    "seed",
    "use_denoising_batch",
    "use_safety_checker",
    "safety_checker",
    "skip_diffusion",
    "warmup",
)
WARM = 10  # images that warm an accelerated stream up


class StreamFlowWrapper:
    """A stream of a model that is loaded, adapted, accelerated and prepared here.

    Args, in StreamDiffusionWrapper's order:
        model_id_or_path: "embedded", a hub id, a folder or a .safetensors file (`streamflow.models.load`).
        t_index_list: as `StreamFlow`'s; None: all steps, and the wrapper is prepared with the first call at the latest.
        lora_dict: LoRAs, hub id or file, and how strong each is. They stay adapters: `stream.set_adapters` changes them.
        mode: "img2img" or "txt2img": what calling the wrapper does, and what it warms up.
        output_type: of what calls return: "pil", "np" or "pt" in [0, 1], or "latent", StreamDiffusion's name for the
            images in [-1, 1] as they leave the stream.
        lcm_lora_id: unused without use_lcm_lora, which is refused: a flow needs no LCM-LoRA.
        vae_id: hub id or folder of a tiny VAE in the place of the model's VAE; unused with use_tiny_vae=False.
        device: None: a GPU where there is one. dtype: None: float32 on a CPU, bfloat16 elsewhere.
        frame_buffer_size, width, height, do_add_noise, use_denoising_batch, cfg_type: as `StreamFlow`'s.
        warmup: images drawn and thrown away after the first preparation. None: 10 where the acceleration in force is not
            "none", else 0.
        acceleration: as `StreamFlow.accelerate`'s; "tensorrt" keeps its engines in `engine_dir`; "xformers" is "none", since
            torch's own attention has taken its place, which is logged.
        device_ids: more devices, "cuda:1" or 1: the decode and the denoising are spread over all of them.
        split: what the devices share: "rows" of every step (`parallel.shard_denoiser`), or whole "frames" in turn
            (`parallel.interleave`), for small networks; images come later. "auto": what suits the network, measured at the
            first `prepare` (`parallel.spread`), with `target_rate` images a second to hold.
        use_tiny_vae: True: `vae_id`, or the family's own tiny VAE. None: the same where the family has one, else the model's
            VAE, which is logged. False: the model's VAE.
        enable_similar_image_filter, similar_image_filter_threshold, similar_image_filter_max_skip_frame: as StreamFlow's.
        seed: of all noise, in every `prepare`; -1 stands for a random one, which is logged.
        use_safety_checker: every image goes through a safety checker, and `nsfw_fallback_img` (black) takes the place of
            those that it objects to.
        like: (width, height) of an image. Without `width` and `height`, the size has the proportions of that image.
        prepare: arguments of the preparation in this constructor; by default the prompt "" and 50 steps, as
            StreamDiffusionWrapper's.
        safety_checker: (checker, feature extractor), `StableDiffusionSafetyChecker` and `CLIPImageProcessor`. None: the
            pipe's own, or those that StreamDiffusionWrapper loads from the hub.
        skip_diffusion: calls return their image in the stream's size, and nothing is drawn. Can be assigned.
        offload_text_encoders: they stay on the CPU, and their layers are copied to the GPU one by one when a prompt is
            encoded (`streamflow.acceleration.memory.place`). With `acceleration_options={"quantize": ..., "keep_plain":
            False}` the network is moved to the GPU likewise, and quantised on the way.
        family, acceleration_options, stream_options: StreamFlow's, beyond StreamDiffusion's. Where the image of a call is a
            reference and mode is "img2img", `noise` is "constant" by default, so that a still image stays still.
        references: reference images of all frames, by name or in order, images or paths (`StreamFlow.set_reference`).
        ipadapter_config: image prompts in livepeer's form, a mapping or several: `ipadapter_model_path` and
            `image_encoder_path` (files and folders, on disk or on the hub), `style_image` (an image or a path), `scale`.
            `use_ipadapter=False` leaves it unused. `stream.image_prompts` has more.
        control_net: a control net, named "control", that steers every image: hub id or folder of a diffusers model. None:
            the pipe's own, where a control_maker is given. control_scale: how strongly it acts.
        control_maker: makes the control images from the images (`StreamFlow.set_control_maker`); in mode "img2img".
            control_maker_model: of "depth", "soft-edge" and "pose", a hub id or a folder.
        default_strength: of image to image, where neither `t_index_list` nor `prepare` says where frames start; unused where
            the image of a call is a reference.
        not_here: other names that livepeer's fork knows raise NotImplementedError with the reason.

    StreamDiffusionWrapper's attributes can be read: device, dtype, width, height, mode, output_type, frame_buffer_size,
    batch_size, use_denoising_batch, use_safety_checker, sd_turbo, stream, and with a checker safety_checker,
    feature_extractor and nsfw_fallback_img. Assigning one acts at the next call, or raises AttributeError with the remedy.

    Raises:
        ValueError, TypeError, NotImplementedError, FileNotFoundError, OSError: for what cannot be, before anything is loaded
            where that is possible.
    """

    mode: str = "img2img"
    """What calling the wrapper does, "img2img" or "txt2img"."""
    output_type: str = "pil"
    """What calls return: "pil", "np", "pt" or "latent"."""
    width = Attribute[int]("stream", "width", "Of images, in pixels.")
    height = Attribute[int]("stream", "height", "Of images, in pixels.")
    frame_buffer_size = Attribute[int]("stream", "frame_bff_size", "F, how many frames enter and leave together.")
    batch_size = Attribute[int]("stream", "batch_size", StreamFlow.batch_size)
    use_denoising_batch = Attribute[bool]("stream", "use_denoising_batch", StreamFlow.use_denoising_batch)
    close = forwards.method("stream", StreamFlow.close)
    _constructed = False

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
        warmup: int | None = None,
        acceleration: str = "auto",
        do_add_noise: bool = False,
        device_ids: Sequence[int | str] | None = None,
        use_lcm_lora: bool = False,
        use_tiny_vae: bool | None = None,
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
        prepare: Arguments | None = None,
        safety_checker: tuple[nn.Module, Function] | None = None,
        skip_diffusion: bool = False,
        family: str | None = None,
        split: Literal["rows", "frames", "auto"] = "rows",
        target_rate: float | None = None,
        references: Mapping[str, Images | str] | Sequence[Images | str] = (),
        use_ipadapter: bool | None = None,
        ipadapter_config: Arguments | Sequence[Arguments] | None = None,
        control_net: str | None = None,
        control_maker: Maker | str | None = None,
        control_maker_model: str | None = None,
        control_scale: float = 1.0,
        default_strength: float | None = None,
        offload_text_encoders: bool = False,
        acceleration_options: Arguments | None = None,
        stream_options: Arguments | None = None,
        **not_here: Any,
    ) -> None:
        _refuse(type(self).__name__, not_here)
        self.mode, self.output_type = mode, output_type
        if use_lcm_lora:
            raise NotImplementedError(
                "a rectified flow draws in few steps by itself, so no LCM-LoRA is loaded: pass use_lcm_lora=False"
            )
        if acceleration == "xformers":
            logger.info("acceleration 'xformers': torch's own attention is used, and nothing else is accelerated")
            acceleration = "none"
        if acceleration == "sfast":
            raise ValueError("acceleration 'sfast': stable-fast is no longer maintained: choose 'auto', or 'none'")
        if warmup is not None:
            warmup = whole_number("warmup", warmup, 0)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype such as torch.float16, not {dtype!r}")
        if target_rate is not None:
            _check_rate(target_rate, split)
        self._seed, self.warmup, self.skip_diffusion = Planner.seed(seed), warmup, skip_diffusion
        if not isinstance(references, Mapping):
            references = {f"reference_{i}": one for i, one in enumerate(references)}
        references = {name: _opened(one) for name, one in references.items()}
        self.ipadapter_config = _read_ipadapters(use_ipadapter, ipadapter_config)
        self.device = device or default_device()
        maker = open_maker(mode, self.device, control_net, control_maker, control_maker_model)
        weights = {"dtype": dtype or default_dtype(self.device), "family": family}
        pipe = _load(model_id_or_path, self.device, weights, offload_text_encoders, acceleration_options or {})
        if like is not None and width is None and height is None:
            width, height = models.adapter_for(pipe, family).size_like(*like)
        self._model = str(model_id_or_path)
        self._defaults = prompt_defaults(pipe) if _is_embedded(self._model) else {}
        options = dict(stream_options or {})
        is_reference = models.takes_references(pipe, family) and options.get("image_as") != "start"
        if is_reference and mode == "img2img":
            options.setdefault("noise", "constant")
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
            **options,
        )
        for name, image in references.items():
            self.stream.set_reference(name, image)
        self._load_ipadapters()
        if maker is not None:
            use_control(self.stream, control_net, maker, control_scale)
        _adapt(self.stream, lora_dict or {})
        _choose_vae(self.stream, vae_id, use_tiny_vae)
        devices = _decode_on(self.stream, device_ids)
        if split != "auto":
            _denoise_on(self.stream, devices, split)
        if enable_similar_image_filter:
            self.stream.enable_similar_image_filter(similar_image_filter_threshold, similar_image_filter_max_skip_frame)
        options = dict(acceleration_options or {})
        if acceleration == "tensorrt" and engine_dir is not None:
            options.setdefault("engine_dir", engine_dir)
        self._when_prepared: Callable[[], object] | None = None
        self.stream.accelerate(acceleration, **options)
        if split == "auto" and devices:
            self.stream.accelerate("none")  # until it is spread
            self._when_prepared = partial(_denoise_as_measured, self.stream, devices, target_rate, acceleration, options)
        self._uses_checker = False
        if safety_checker is not None:
            self.safety_checker, self.feature_extractor = safety_checker
            self.nsfw_fallback_img = PIL.Image.new("RGB", (self.width, self.height))
        if use_safety_checker:
            self._load_checker()
        if default_strength is not None and mode == "img2img" and t_index_list is None and not is_reference:
            prepare = {"strength": default_strength, **(prepare or {})}
        if prepare:
            self.prepare(**prepare)
        elif prepare is not None or t_index_list is not None:
            self._prepare_itself()
        self._constructed = True

    @classmethod
    def from_settings(cls, settings: Settings, **changes: Any) -> Self:
        """The wrapper of these settings (`streamflow.app.config.Settings`), prepared and warm. `changes`: other arguments of
        the wrapper."""
        return cls(**{**settings.wrapper_arguments(), **changes})

    # -- StreamDiffusionWrapper's attributes ------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: object) -> None:
        if self._constructed and (remedy := _remedy(name)):
            raise AttributeError(f"{name} of a {type(self).__name__} cannot be assigned: {remedy}")
        if name in CHOICES:
            _check(value, CHOICES[name], name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> NoReturn:
        if name in NOT_HERE:
            raise AttributeError(f"{type(self).__name__} has no {name}: {NOT_HERE[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype."""
        return self.stream.adapter.base.dtype

    @property
    def sd_turbo(self) -> bool:
        """Whether the model's name holds "turbo". Nothing depends on it: one stage is drawn in one step, as any number
        is."""
        return "turbo" in self._model

    @property
    def seed(self) -> Seeds:
        """Of all noise. Assigning it is `update(seed=...)`, and later calls of `prepare` keep it."""
        return self._seed

    @seed.setter
    def seed(self, value: Seeds) -> None:
        self.update(seed=value)

    @property
    def use_safety_checker(self) -> bool:
        """Whether finished images go through the safety checker. Assigning True loads one where there is none yet."""
        return self._uses_checker

    @use_safety_checker.setter
    def use_safety_checker(self, value: bool) -> None:
        if value:
            self._load_checker()
        else:
            self._uses_checker = False

    def _load_checker(self) -> None:
        from streamflow.models.safety_checker import load

        if "safety_checker" not in vars(self):
            self.safety_checker, self.feature_extractor = load(self.stream.pipe)
        if "nsfw_fallback_img" not in vars(self):
            self.nsfw_fallback_img = PIL.Image.new("RGB", (self.width, self.height))
        self._uses_checker = True

    @property
    def use_ipadapter(self) -> bool:
        """Whether there are adapters for image prompts."""
        return bool(self.stream.image_prompts.adapters)

    def _load_ipadapters(self) -> None:
        styles, prompts = {}, self.stream.image_prompts
        for one in self.ipadapter_config:
            path, scale, encoder = one["ipadapter_model_path"], one.get("scale", 1.0), one.get("image_encoder_path")
            (name,) = prompts.load(path, one.get("style_image_key"), scale=scale, image_encoder=encoder)
            if one.get("style_image") is not None:
                styles[name] = _opened(one["style_image"])
        if styles:
            prompts.set(styles)

    # -- StreamDiffusionWrapper's calls -----------------------------------------------------------------------------------

    def prepare(
        self,
        prompt: Texts = "",
        negative_prompt: str = "",
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        delta: float = 1.0,
        prompt_interpolation_method: str | None = None,
        seed_list: Sequence[tuple[int, float]] | None = None,
        seed_interpolation_method: str = "linear",
        **arguments: Any,
    ) -> None:
        """As `StreamFlow.prepare`, with the wrapper's seed unless one is given; the first time, warm up.

        prompt_interpolation_method, seed_list, seed_interpolation_method: livepeer's names for `blend` and for seeds with
            weights (`update_stream_params`).
        """
        if prompt_interpolation_method is not None:
            arguments["blend"] = prompt_interpolation_method
        if seed_list is not None:
            arguments["seed"] = _mixed_seeds(seed_list, seed_interpolation_method)
        if arguments.get("generator") is None:
            arguments.setdefault("seed", self._seed)
        arguments = {**self._defaults, **arguments}
        given = prompt, negative_prompt, num_inference_steps, guidance_scale, delta
        self.stream.prepare(*given, **arguments)
        if self._when_prepared is not None:
            spread_now, self._when_prepared = self._when_prepared, None
            spread_now()
        if self.warmup is None:
            self.warmup = 0 if self.stream.acceleration == "none" else WARM
        if self.warmup:
            self._warm_up()

    def _prepare_itself(self) -> None:
        try:
            self.prepare()
        except ValueError as error:
            raise ValueError(
                f"{error} (the wrapper prepares itself when it is made, by default with the prompt '' and 50 steps: pass "
                f"prepare={{'prompt': ..., 'num_inference_steps': ...}} for other arguments)"
            ) from error

    def _warm_up(self) -> None:
        count, self.warmup = self.warmup or 0, 0
        generator = self.stream.generator
        if generator is not None:  # which warming up leaves as it is
            self.stream.generator = torch.Generator()
        blank = torch.zeros(1, 3, self.stream.height, self.stream.width)
        images = [blank] * self.stream.frame_bff_size
        for _ in range(count):
            self.stream(torch.cat(images)) if self.mode == "img2img" else self.stream.txt2img()
        self.stream.reset()
        if generator is not None:
            self.stream.generator = generator

    def __call__(self, image: Images | str | None = None, prompt: Texts | None = None) -> Output:
        """`img2img(image, prompt)` in mode "img2img", else `txt2img(prompt)`."""
        if self.mode == "txt2img":
            if image is not None:
                raise ValueError("mode is 'txt2img', and an image was given: make the wrapper with mode='img2img'")
            return self.txt2img(prompt)
        if image is None:
            raise ValueError("mode is 'img2img', and no image was given: make the wrapper with mode='txt2img'")
        return self.img2img(image, prompt)

    def txt2img(self, prompt: Texts | None = None) -> Output:
        """The next image, or `frame_buffer_size` of them as a list; with a prompt, of it from here on."""
        if self.skip_diffusion:
            raise ValueError(
                "skip_diffusion returns the image of a call, and txt2img has none: assign skip_diffusion = False"
            )
        self._take(prompt)
        return self._out(self.stream.txt2img())

    def img2img(self, image: Images | str, prompt: Texts | None = None) -> Output:
        """An image (PIL, array, tensor or path), or `frame_buffer_size` of them, restyled."""
        if self.skip_diffusion:
            return self._out(self.preprocess_image(image))
        self._take(prompt)
        return self._out(self.stream(_opened(image)))

    def update(self, **changes: Any) -> int:
        """As `StreamFlow.update`: any of prompt, negative_prompt, guidance_scale, delta, seed, strength, t_index_list,
        num_inference_steps, from any thread."""
        seed = Planner.seed(changes.get("seed"))
        number = self.stream.update(**{**changes, "seed": seed})
        self._seed = self._seed if seed is None else seed
        return number

    def preprocess_image(self, image: Images | str) -> Tensor:
        """An image (or a path) as `[1, 3, height, width]` in [-1, 1], which calls take as it is."""
        return self.stream.preprocess(_opened(image))

    def postprocess_image(self, image_tensor: Tensor, output_type: str = "pil") -> Output:
        """Images `[n, 3, H, W]` in [-1, 1] as this type; one alone is not in a list."""
        _check(output_type, CHOICES["output_type"], "output_type")
        out = postprocess_image(image_tensor.as_subclass(Tensor), output_type)
        return out if self.stream.frame_bff_size > 1 else out[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- livepeer's names -------------------------------------------------------------------------------------------------

    def update_prompt(
        self,
        prompt: Texts,
        negative_prompt: str | None = None,
        prompt_interpolation_method: str = "slerp",
        clear_blending: bool = True,
        warn_about_conflicts: bool = True,
    ) -> None:
        """As `StreamFlow.update_prompt`; several prompts with weights are blended by `prompt_interpolation_method`. A new
        prompt always takes the place of a blend, so the last two arguments, which the fork has for that, change nothing."""
        blend = {} if isinstance(prompt, str) else {"blend": prompt_interpolation_method}
        self._prepared()
        self.stream.update_prompt(prompt, negative_prompt, **blend)

    def update_stream_params(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        delta: float | None = None,
        t_index_list: Sequence[int] | None = None,
        seed: int | None = None,
        prompt_list: Sequence[tuple[str, float]] | None = None,
        negative_prompt: str | None = None,
        prompt_interpolation_method: str = "slerp",
        normalize_prompt_weights: bool | None = None,
        seed_list: Sequence[tuple[int, float]] | None = None,
        seed_interpolation_method: str = "linear",
        normalize_seed_weights: bool | None = None,
        use_safety_checker: bool | None = None,
        ipadapter_config: Arguments | None = None,
        **not_here: Any,
    ) -> None:
        """`update` under livepeer's names; None leaves a value as it is. `num_inference_steps` without a `t_index_list`
        keeps the steps at their places in the schedule: [0, 16, 32, 45] of 50 become [0, 3, 5, 7] of 9. Of
        `ipadapter_config` the scale and the style image act.

        Raises:
            ValueError, TypeError: as `StreamFlow.update`; a seed beside a seed_list; normalize_seed_weights=False, since
                noise of another variance is no noise of the flow. NotImplementedError: what there is not, with the reason.
        """
        _refuse("update_stream_params", not_here)
        if seed is not None and seed_list is not None:
            raise ValueError("pass seed or seed_list, not both")
        if normalize_seed_weights is False:
            raise ValueError(
                "normalize_seed_weights=False changes the noise's variance, which a flow draws as blur or grain"
            )
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "delta": delta,
            "t_index_list": t_index_list,
            "prompt": None if prompt_list is None else list(prompt_list),
            "blend": None if prompt_list is None else prompt_interpolation_method,
            "normalize": normalize_prompt_weights,
            "negative_prompt": negative_prompt,
            "seed": seed if seed_list is None else _mixed_seeds(seed_list, seed_interpolation_method),
        }
        self._prepared()
        if num_inference_steps is not None and t_index_list is None:
            given["t_index_list"] = self._same_places(num_inference_steps)
        self.update(**{name: value for name, value in given.items() if value is not None})
        if use_safety_checker is not None:
            self.use_safety_checker = use_safety_checker
        if ipadapter_config:
            self._update_ipadapter(ipadapter_config)

    def update_style_image(self, image: Images | str) -> None:
        """The image prompt of all frames that enter from now on: an image or a path, for the first adapter."""
        name = next(iter(self.stream.image_prompts.adapters), None)
        if name is None:
            raise RuntimeError("there is no adapter for image prompts: make the wrapper with ipadapter_config={...}")
        self.stream.image_prompts.set({name: _opened(image)})

    def _update_ipadapter(self, config: Arguments) -> None:
        _check_ipadapter(config)
        if config.get("scale") is not None:
            self.stream.image_prompts.set_scale(config["scale"])
        if config.get("style_image") is not None:
            self.update_style_image(config["style_image"])

    def _same_places(self, steps: int) -> list[int] | None:
        """The steps in force at the same places in a schedule of another length; None where no list of them is given."""
        requested = self.stream.requested()
        given = requested.request.t_index_list is not None and requested.request.strength is None
        if not given or not isinstance(steps, int) or steps < 1:
            return None  # `update` says what is wrong with `steps`
        last = max(1, len(requested.schedule) - 1)
        return list(dict.fromkeys(round(i * (steps - 1) / last) for i in requested.stages.indices))

    def clear_caches(self) -> None:
        """Forget the prompts that are kept encoded; those in force stay."""
        self.stream.forget_prompts()

    def cleanup_gpu_memory(self) -> None:
        """`close`, and give the memory that torch holds beyond its tensors back to the GPU."""
        self.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def get_stream_state(self, include_caches: bool = False) -> Call:
        """What is drawn and how, in plain values, under livepeer's keys; caches: how many prompts are kept encoded."""
        self._prepared()
        stream, requested = self.stream, self.stream.requested()
        request, seed = requested.request, requested.noise.seed
        read = ("width", "height", "latent_width", "latent_height", "batch_size", "use_denoising_batch")
        return {
            **{name: getattr(stream, name) for name in read},
            "cfg_type": request.cfg_type,
            "guidance_scale": requested.guidance_scale,
            "delta": request.delta,
            "device": stream.device.type,
            "dtype": str(self.dtype),
            "model_type": type(stream.adapter).__name__,
            "is_sdxl": "XL" in type(stream.pipe).__name__,
            "is_turbo": self.sd_turbo,
            "prompt_list": [] if request.prompt is None else list(parts(request.prompt)),
            "seed_list": [] if seed is None else list(parts(seed)),
            "normalize_prompt_weights": request.normalize,
            "normalize_seed_weights": True,
            "negative_prompt": request.negative_prompt or "",
            "t_index_list": list(requested.stages.indices),
            "current_seed": seed,
            "num_inference_steps": request.num_inference_steps,
            "controlnet_config": [
                {"model_id": name, "conditioning_scale": scale, "preprocessor_params": {}, "enabled": True}
                for name, scale in stream.controls.items()
            ],
            "ipadapter_config": _ipadapter_state(stream),
            **({"caches": {"cached_prompts": stream.cached_prompts}} if include_caches else {}),
        }

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _prepared(self) -> None:
        """Prepare with the defaults, unless the wrapper is prepared."""
        if not self.stream.prepared:
            self.prepare()

    def _take(self, prompt: Texts | None) -> None:
        self._prepared()
        if prompt is not None:
            self.stream.update_prompt(prompt)

    def _out(self, images: Tensor) -> Output:
        if self._uses_checker:
            from streamflow.models.safety_checker import replace_unsafe

            images = replace_unsafe(images, self.safety_checker, self.feature_extractor, self.nsfw_fallback_img)
        return self.postprocess_image(images, self.output_type)


@cache
def _remedy(name: str) -> str | None:
    """What to do instead of assigning this attribute; None where assigning acts."""
    if name in READ_ONLY or name in NOT_HERE:
        return READ_ONLY.get(name) or NOT_HERE[name]
    arguments = {*signature(StreamFlowWrapper.__init__).parameters} - {"self", "prepare", "not_here", *SETTABLE}
    return f"make a new StreamFlowWrapper with {name}=..." if name in arguments else None


def _check(value: object, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(known)}")


def _refuse(what: str, names: Arguments) -> None:
    """Raise TypeError for unknown arguments, and NotImplementedError for arguments of the fork that are not offered here and
    are not empty."""
    for name, value in names.items():
        if name not in NOT_HERE:
            raise TypeError(f"{what} takes no argument {name!r}")
        if value:
            raise NotImplementedError(f"{name}={value!r}: {NOT_HERE[name]}")


def _read_ipadapters(use: bool | None, config: Arguments | Sequence[Arguments] | None) -> tuple[Arguments, ...]:
    """The entries of an `ipadapter_config` that are enabled. ValueError, NotImplementedError: what cannot be."""
    if use and not config:
        raise ValueError("use_ipadapter=True needs ipadapter_config={'ipadapter_model_path': ..., ...}")
    entries = [config] if isinstance(config, Mapping) else list(config or ())
    entries = [] if use is False else [one for one in entries if one.get("enabled", True)]
    for one in entries:
        _check_ipadapter(one)
        if not one.get("ipadapter_model_path"):
            raise ValueError(f"ipadapter_config {dict(one)} has no ipadapter_model_path")
    return tuple(entries)


def _check_ipadapter(entry: Arguments) -> None:
    """ValueError for unknown keys, NotImplementedError for keys that ask for what there is not."""
    unknown = set(entry) - {*IPADAPTER, *NOT_OF_IPADAPTER}
    if unknown:
        raise ValueError(f"ipadapter_config has no key {', '.join(sorted(unknown))}; it has {', '.join(IPADAPTER)}")
    asked = {**entry, "is_faceid": entry.get("is_faceid") or "faceid" in str(entry.get("type"))}
    for name, why in NOT_OF_IPADAPTER.items():
        if asked.get(name):
            raise NotImplementedError(f"ipadapter_config with {name}: {why}")


def _ipadapter_state(stream: StreamFlow) -> Call | None:
    """The first adapter, in livepeer's form; None without adapters."""
    for name, scale in stream.image_prompts.adapters.items():
        return {"scale": scale, "enabled": True, "has_style_image": name in stream.image_prompts.fixed}
    return None


def _mixed_seeds(seed_list: Sequence[tuple[int, float]], method: str) -> list[tuple[int, float]]:
    """Seeds with weights. Their noises are mixed to variance one, which "linear" and "slerp" both come to."""
    _check(method, tuple(METHODS), "seed_interpolation_method")
    return list(seed_list)


def _load(model: str, device: str | torch.device, weights: Arguments, offload: bool, options: Arguments) -> Pipeline:
    """The pipeline of a model on a device. offload: its text encoders stay on the CPU. options: of the acceleration."""
    quantize = None if options.get("keep_plain", True) else options.get("quantize")
    if not offload and quantize is None:
        return models.load(model, device=device, **weights)
    from streamflow.acceleration.memory import place

    pipe = models.load(model, **weights)
    return place(pipe, device, quantize=quantize, offload_text_encoders=offload, family=weights["family"])


def _is_embedded(model: str) -> bool:
    return model == "embedded" or Path(model).expanduser().resolve() == pretrained.FOLDER.resolve()


def _opened(image: Images | str) -> Images:
    """An image that a path names, or that is a PIL image, in mode RGB, as StreamDiffusionWrapper converts it."""
    if isinstance(image, (str, Path)):
        image = open_image(image)
    if isinstance(image, PIL.Image.Image):
        return as_rgb(image) if image.mode.startswith(("I", "F")) else image.convert("RGB")
    if isinstance(image, (list, tuple)):
        return [_opened(one) for one in image]
    return image


def check_control(mode: str, net: str | None, maker: Maker | str | None, model: str | None) -> None:
    """Raise ValueError for a control net, a maker and a model of the maker that do not fit together or to the mode, and
    FileNotFoundError for a control net that is a folder which does not exist."""
    if maker is None and (net or model):
        raise ValueError(
            f"{'a control net' if net else 'a model of a control maker'}, {net or model!r}, needs a control maker such as "
            f"'canny', which makes the control images from the input images. A control net whose images come with each call "
            f"is added by wrapper.stream.add_control(name, net)"
        )
    if maker is not None and mode != "img2img":
        raise ValueError(
            f"a control maker makes control images from input images, and mode {mode!r} has none: choose mode 'img2img'"
        )
    if net is not None:
        control_source(net)
    if isinstance(maker, str):
        check_maker(maker, model)
    elif model is not None:
        raise ValueError(
            f"the model {model!r} is for a control maker that is given by its name, not {maker!r}: leave it out"
        )


def open_maker(
    mode: str, device: str | torch.device, net: str | None, maker: Maker | str | None, model: str | None
) -> Maker | None:
    """The maker of control images, its model loaded; None without one. Raises as `check_control` and `ControlMaker`."""
    check_control(mode, net, maker, model)
    return ControlMaker(maker, model, device) if isinstance(maker, str) else maker


def use_control(stream: StreamFlow, net: str | nn.Module | None, maker: Maker, scale: float) -> None:
    """Steer by this control net, or by the one that there is, with images from this maker."""
    if net is not None:
        if stream.controls:
            raise ValueError(f"the pipeline has a control net of its own, and {net!r} was given: leave it out")
        stream.add_control("control", load_control(net, stream.adapter) if isinstance(net, str) else net)
    if len(stream.controls) != 1:
        there = ", ".join(stream.controls) or "none"
        raise ValueError(
            f"a control maker is for a model with one control net, and there are {there}: give the control net, or call "
            f"wrapper.stream.set_control_maker(name, maker) for each"
        )
    (name,) = stream.controls
    stream.set_control_maker(name, maker)
    stream.set_control_scale(name, scale)


def _choose_vae(stream: StreamFlow, vae_id: str | None, wanted: bool | None) -> None:
    from streamflow.models.tiny_vae import known_place

    place = vae_id or known_place(stream.pipe, stream.adapter.tiny_vae)
    if wanted is None and place is None:
        logger.info("no tiny VAE is known for %s: the model's own decodes", type(stream.pipe).__name__)
    if wanted or (wanted is None and place is not None):
        try:
            stream.use_tiny_vae(vae_id)
        except OSError as error:
            raise OSError(
                f"the tiny VAE {place} could not be loaded: pass vae_id=, the folder of one, or use_tiny_vae=False for the "
                f"model's own VAE"
            ) from error


def _adapt(stream: StreamFlow, loras: Mapping[str, float]) -> None:
    names = {stream.load_lora(where): weight for where, weight in loras.items()}
    if names:
        stream.set_adapters(names)


def _check_rate(target_rate: float, split: str) -> None:
    from streamflow.parallel.split import check_rate

    if split != "auto":
        raise ValueError(f"target_rate={target_rate!r} is for split='auto', and split is {split!r}: leave it out")
    check_rate(target_rate)


def _decode_on(stream: StreamFlow, device_ids: Sequence[int | str] | None) -> list[torch.device]:
    """The decode over these devices and the stream's own. Returns all of them; none where none are named."""
    from streamflow.parallel import shard_vae

    named = [torch.device("cuda", one) if isinstance(one, int) else torch.device(one) for one in device_ids or ()]
    if not named:
        return []
    devices = named if stream.device in named else [stream.device, *named]
    stream.vae = shard_vae(stream.vae, devices)
    return devices


def _denoise_on(stream: StreamFlow, devices: Sequence[torch.device], split: str) -> None:
    """The denoising over these devices by "rows" or "frames"."""
    from streamflow.parallel.split import SPLITS

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose 'rows', 'frames' or 'auto'")
    if devices:
        SPLITS[split](stream, devices)


def _denoise_as_measured(
    stream: StreamFlow, devices: Sequence[torch.device], target_rate: float | None, acceleration: str, options: Arguments
) -> None:
    """The denoising over these devices by the split that suits the network of a prepared stream, accelerated."""
    from streamflow.parallel import spread

    spread(stream, devices, target_rate)
    stream.accelerate(acceleration, **options)
