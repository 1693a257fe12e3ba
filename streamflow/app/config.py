"""The settings of a run in one frozen, typed object, read from and written to YAML. All mistakes in a file are reported at
once, each with its key's path. Knows names, types and ranges. A model checks the image size itself when it is loaded.
"""

from __future__ import annotations

import json
import os
import stat
import textwrap
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from streamflow._files import Json, read_text, read_yaml, replacing
from streamflow._validation import Section
from streamflow.app.server.settings import Server
from streamflow.live.remote.settings import Control
from streamflow.live.settings import LiveSettings

WIDTH = 110  # of the comments in a file
START = {"strength": 0.5}  # of image to image, where neither `strength` nor `t_index_list` is given


class ConfigError(ValueError):
    """Raised for invalid settings: one line for each mistake, with the key's path."""


class Acceleration(Section):
    """How the network and the VAE are made faster."""

    kind: Literal["none", "auto", "cuda-graph", "compile", "tensorrt", "onnxruntime", "openvino", "max"] = Field(
        default="auto",
        description="kind of acceleration; auto is compile with a CUDA graph on a GPU, else none; max measures the fastest",
    )
    options: Json = Field(default={}, description="options of the acceleration, such as quantize: fp8")

    @field_validator("options")
    @classmethod
    def _finite(cls, options: Json) -> Json:
        json.dumps(options, default=str, allow_nan=False)  # ValueError: NaN or infinity
        return options


class SimilarImages(Section):
    """Input images that look like the last one are not drawn again."""

    threshold: float = Field(default=0.98, ge=0, le=1, description="from which likeness on (0 to 1) an image may be skipped")
    max_skip_frame: int = Field(default=10, ge=0, description="at most so many in a row")


class ControlNetSettings(Section):
    """A control net that steers each image by a control image made from the input image."""

    net: str | None = Field(default=None, description="hub id or folder; empty: the one that the model's pipeline has")
    maker: str | None = Field(
        default=None, description="makes the control image: canny, lineart, depth, soft-edge or pose; empty: no control net"
    )
    maker_model: str | None = Field(default=None, description="the model of depth, soft-edge and pose: a hub id or a folder")
    scale: float = Field(default=1.0, description="how strongly the net acts")

    @field_validator("net", "maker", "maker_model")
    @classmethod
    def _none_if_empty(cls, text: str | None) -> str | None:
        return text or None


class VideoModel(Section):
    """What a video model draws."""

    image: str | None = Field(default=None, description="image file that the video goes on from, where the model takes one")
    video: str | None = Field(default=None, description="video file that it goes on from, where the model takes one")
    arguments: Json = Field(
        default={}, description="more arguments of the pipeline's call: {pyramid_num_inference_steps_list: [2, 2, 2]}"
    )


class Settings(Section):
    """A model, what it draws, and how. The names are those of `StreamFlow` and `prepare` where these have them."""

    model: str = Field(
        default="embedded",
        description="a built-in model (embedded, or embedded-video), a hub id, a folder, or a .safetensors file (with a "
        "family)",
    )
    family: str | None = Field(default=None, description="a rectified-flow family, where the pipeline's class does not tell")
    device: str | None = Field(default=None, description="device: cuda, cuda:1, cpu or mps; empty: a GPU where there is one")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None, description="dtype of the weights; empty: float32 on a CPU, bfloat16 elsewhere"
    )
    devices: tuple[str, ...] = Field(default=(), description="more devices: the VAE and the denoising are spread over all")
    split: Literal["rows", "frames", "auto"] = Field(
        default="rows",
        description="what devices share: rows of every step, or whole frames, which come later; auto: as measured",
    )
    mode: Literal["txt2img", "img2img"] = Field(default="txt2img", description="images from text alone, or from images")
    prompt: str | tuple[tuple[str, float], ...] = Field(
        default="a red apple, 3d render", description="prompt, or several with weights: [[a cat, 0.6], [a dog, 0.4]]"
    )
    negative_prompt: str = Field(default="", description="what not to draw; needs guidance")
    num_inference_steps: int = Field(default=4, ge=1, description="number of steps")
    t_index_list: tuple[int, ...] | None = Field(
        default=None, description="indices of the steps that are taken, 0 the noisiest; empty: all, or by strength"
    )
    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="how much an image is changed, above 0; 1 ignores the image; instead of t_index_list",
    )
    cfg_type: Literal["none", "full", "self", "initialize"] = Field(default="none", description="kind of guidance")
    guidance_scale: float | None = Field(default=None, description="weight of the guidance; empty: the pipeline's own")
    delta: float = Field(default=1.0, description="moderates the guidance weight of self and initialize")
    seed: int = Field(default=2, ge=0, le=2**64 - 1, description="seed of all noise")
    width: int | None = Field(default=None, ge=1, description="width in pixels; empty: the model's own")
    height: int | None = Field(default=None, ge=1, description="height in pixels; empty: the model's own")
    frame_buffer_size: int = Field(default=1, ge=1, description="frames that enter and leave together")
    use_denoising_batch: bool = Field(default=True, description="false draws frame by frame: lower rate, lower latency")
    do_add_noise: bool = Field(default=False, description="put noise back at every step instead of stepping by Euler")
    tiny_vae: bool | str = Field(default=False, description="true: the family's own tiny VAE; or a hub id or folder of one")
    references: tuple[str, ...] = Field(
        default=(), description="image files that an edit model sees with every image: [style.png, palette.png]"
    )
    loras: dict[str, float] = Field(default={}, description="LoRAs, by hub id or file, and the strength of each")
    controlnet: ControlNetSettings = Field(default=ControlNetSettings(), description=ControlNetSettings.__doc__)
    offload_text_encoders: bool = Field(
        default=False, description="text encoders stay on the CPU, and run on the GPU layer by layer: less GPU memory"
    )
    acceleration: Acceleration = Field(default=Acceleration(), description=Acceleration.__doc__)
    similar_image_filter: SimilarImages | None = Field(default=None, description=SimilarImages.__doc__)
    warmup: int | None = Field(
        default=None,
        ge=0,
        description="images drawn and thrown away at the start; empty: 10 if something is accelerated, else 0",
    )
    video: VideoModel = Field(default=VideoModel(), description=VideoModel.__doc__)
    live: LiveSettings = Field(default=LiveSettings(), description=LiveSettings.__doc__)
    control: Control = Field(default=Control(), description=Control.__doc__)
    server: Server = Field(default=Server(), description=Server.__doc__)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.t_index_list is not None and self.strength is not None:
            raise ValueError("t_index_list and strength both say where to start: leave one out")
        if self.strength is not None and self.mode == "txt2img":
            raise ValueError("strength is of mode img2img, and mode is txt2img")
        if self.negative_prompt and self.cfg_type == "none":
            raise ValueError("negative_prompt needs guidance, and cfg_type is none: choose full, self or initialize")
        return self

    def wrapper_arguments(self) -> Json:
        """The arguments of `StreamFlowWrapper` that these settings stand for."""
        from streamflow.models.loading import DTYPES
        from streamflow.wrapper import StreamFlowWrapper

        similar = self.similar_image_filter
        filtered = {} if similar is None else similar.model_dump()
        prepare = self._named_as_in(StreamFlowWrapper.prepare)
        if not isinstance(self.prompt, str):
            prepare["prompt"] = list(self.prompt)
        if self.strength is not None:
            prepare["strength"] = self.strength
        return {
            **self._named_as_in(StreamFlowWrapper),
            **{f"similar_image_filter_{name}": value for name, value in filtered.items()},
            "enable_similar_image_filter": similar is not None,
            "dtype": None if self.dtype is None else DTYPES[self.dtype],
            "model_id_or_path": self.model,
            "lora_dict": self.loras,
            "control_net": self.controlnet.net,
            "control_maker": self.controlnet.maker,
            "control_maker_model": self.controlnet.maker_model,
            "control_scale": self.controlnet.scale,
            "vae_id": self.tiny_vae if isinstance(self.tiny_vae, str) else None,
            "use_tiny_vae": bool(self.tiny_vae),
            "acceleration": self.acceleration.kind,
            "acceleration_options": self.acceleration.options,
            "device_ids": self.devices or None,
            "engine_dir": None,
            "default_strength": START["strength"],
            "prepare": prepare,
        }

    def _named_as_in(self, call: Callable[..., object]) -> Json:
        """The settings that are arguments of this call, by the same names."""
        return self.model_dump(include=set(signature(call).parameters))


def parse(data: object, kind: type[Settings] = Settings) -> Settings:
    """Settings of plain data, as YAML gives it. Without a mode, that is img2img where a strength or a live source needs
    images. ConfigError lists every mistake."""
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"settings are keys and values, not {type(data).__name__}")
    if "mode" not in data and _needs_images(data):
        data = {**data, "mode": "img2img"}
    try:
        return kind.model_validate_json(json.dumps(data))  # as JSON, in which a list may stand for a tuple
    except ValidationError as error:
        raise ConfigError("\n".join(_mistakes(error))) from None
    except (TypeError, ValueError, RecursionError) as error:  # of json: a date, a list that holds itself
        raise ConfigError(f"a value is of a kind that settings do not have: {error}") from None


def _needs_images(data: Mapping[object, object]) -> bool:
    live = data.get("live")
    return data.get("strength") is not None or (isinstance(live, Mapping) and bool(live.get("source")))


def _mistakes(error: ValidationError) -> Iterator[str]:
    for one in error.errors(include_url=False):
        path = ".".join(str(part) for part in one["loc"]) or "settings"
        given = "" if one["type"] in ("extra_forbidden", "missing", "value_error") else f", not {one['input']!r}"
        says = "there is no such key" if one["type"] == "extra_forbidden" else one["msg"].removeprefix("Value error, ")
        yield f"{path}: {says}{given}"


def load(path: str | Path) -> Settings:
    """Settings of a YAML file. FileNotFoundError; ConfigError names the file and every mistake in it. Aliases, keys that are
    given twice and files of more than 1 MiB are mistakes too."""
    try:
        data = read_yaml(read_text(Path(path)))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    try:
        return parse(data)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{textwrap.indent(str(error), '  ')}") from None


def save(settings: Settings, path: str | Path) -> None:
    """Write a commented YAML file, whole or not at all. An existing file keeps its permissions; of a link, the file that it
    leads to is written. FileExistsError: the path is no regular file, such as a device or a folder."""
    target = Path(os.path.realpath(path))
    if (os.path.exists(path) or os.path.lexists(target)) and not target.is_file():
        raise FileExistsError(f"{path} is there already and is no regular file: choose another path")
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o600
    with replacing(target, mode) as file:
        file.write(commented(settings).encode())


def commented(section: Section, indent: str = "") -> str:
    """A section as YAML, each key under the comment that its field has."""
    lines = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        lines += textwrap.wrap(field.description or "", WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(value, Section):
            lines += [f"{indent}{name}:", commented(value, indent + "  ").rstrip("\n")]
        else:
            lines.append(f"{indent}{name}: {_plain(value)}".rstrip())
        lines += [] if indent else [""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _plain(value: object) -> str:
    """A value in one line of YAML; nothing for None."""
    if value is None:
        return ""
    data = json.loads(json.dumps(value))
    return yaml.safe_dump(data, allow_unicode=True, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
