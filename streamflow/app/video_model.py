"""A video model of the command line: the settings that it takes, and its stream."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Self

import numpy as np
import PIL.Image
import torch

from streamflow import models
from streamflow._files import Json
from streamflow.app.config import Settings, VideoModel
from streamflow.image_utils import as_rgb, cropped, open_image
from streamflow.io.file import FileSource
from streamflow.models.loading import DTYPES, default_device, default_dtype
from streamflow.video import VideoStream
from streamflow.video.acceleration import EXPORTED

# Settings of streams of images, and those of a show of images.
UNUSED = tuple(
    "family split t_index_list strength delta frame_buffer_size use_denoising_batch do_add_noise references loras "
    "controlnet offload_text_encoders similar_image_filter".split()
)
UNUSED_LIVE = tuple("live.source live.policy live.mode live.crossfade".split())
CHANGEABLE = ("prompt", "negative_prompt", "guidance_scale", "num_inference_steps", "seed")  # from chunk to chunk
MOST_FRAMES = 1000  # of a video that another one goes on from


def check_images(*scenes: Settings) -> None:
    """Raise ValueError where settings of a video model are given for a model that draws images."""
    for one in scenes:
        for name in VideoModel.model_fields:
            if getattr(one.video, name) != getattr(VideoModel(), name):
                raise ValueError(f"video.{name}: {one.model} is no video model: leave it out")


def check_video(settings: Settings, unused: Sequence[str] = ()) -> None:
    """Raise ValueError for settings that a video model does not use, one line for each. unused: more of them."""
    default = Settings()
    wrong = [path for path in (*UNUSED, *unused) if _at(settings, path) != _at(default, path)]
    lines = [f"{path}: a video model does not use it: leave it out" for path in wrong]
    if settings.acceleration.kind in EXPORTED:
        lines.append(
            f"acceleration.kind: the networks of video models are not exported, as {settings.acceleration.kind} needs"
        )
    if settings.tiny_vae is True:
        lines.append("tiny_vae: a video model takes the path of a file of TAEHV, such as taew2_1.pth, not true")
    if len(settings.devices) > 1:
        lines.append(f"devices: a video model takes one more device, which decodes, not {len(settings.devices)}")
    if not isinstance(settings.prompt, str):
        lines.append("prompt: a video model draws one text, not several with weights")
    if settings.cfg_type not in ("none", "full"):
        lines.append(f"cfg_type: a video model takes none or full, not {settings.cfg_type}")
    if settings.cfg_type == "none" and (settings.guidance_scale or 0) > 1:
        lines.append(f"guidance_scale: {settings.guidance_scale:g} needs guidance, and cfg_type is none: choose full")
    if lines:
        raise ValueError("\n".join(lines))


def check_live(settings: Settings, others: Sequence[Settings], learn: str | None) -> None:
    """Raise ValueError for what a show of this video model cannot have. others: the scenes that follow. learn: a field."""
    check_video(settings, UNUSED_LIVE)
    for field in (*(one.field for one in settings.control.mappings), *([learn] if learn else [])):
        if field not in CHANGEABLE:
            raise ValueError(f"a knob of a video model cannot change {field!r}: choose one of {', '.join(CHANGEABLE)}")
    fixed = Settings.model_fields.keys() - {*CHANGEABLE, "cfg_type", "warmup", "mode", "live", "control", "server"}
    for number, scene in enumerate(others, 2):
        check_video(scene)
        if changed := sorted(name for name in fixed if getattr(scene, name) != getattr(settings, name)):
            raise ValueError(
                f"scene {number} has another {', '.join(changed)}: the scenes of a video change {', '.join(CHANGEABLE)}"
            )
        if unlike := sorted(arguments_of(scene).keys() ^ arguments_of(settings).keys()):
            raise ValueError(f"scene {number}: {', '.join(unlike)} must be given in every scene, or in none")


def open_video(settings: Settings, **loading: Any) -> VideoStream:
    """The stream of this video model, prepared. Its VAE is loaded in float32, whatever the dtype. loading: arguments of
    `streamflow.models.load`. Raises as that and as `VideoStream.prepare`."""
    device = settings.device or default_device()
    dtype = DTYPES[settings.dtype] if settings.dtype else default_dtype(device)
    pipe = models.load(settings.model, device=device, dtype={"vae": torch.float32, "default": dtype}, **loading)
    stream = VideoStream(pipe, output_type="np", decode_on=settings.devices or None)
    if isinstance(settings.tiny_vae, str):
        stream.use_tiny_vae(settings.tiny_vae)
    stream.accelerate(settings.acceleration.kind, **settings.acceleration.options)
    stream.prepare(**arguments_of(settings), **_start(settings, pipe))
    return stream


def arguments_of(settings: Settings) -> Json:
    """The arguments of `VideoStream.prepare` that these settings stand for, without the image or the video to go on from."""
    unguided = 1.0 if settings.cfg_type == "none" else None
    steps = settings.num_inference_steps if "num_inference_steps" in settings.model_fields_set else None
    optional = {
        "guidance_scale": settings.guidance_scale or unguided,
        "num_inference_steps": steps,
        "width": settings.width,
        "height": settings.height,
    }
    given = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt, "seed": settings.seed}
    given |= {name: value for name, value in optional.items() if value is not None}
    if twice := sorted(given.keys() & settings.video.arguments.keys()):
        raise ValueError(f"video.arguments: {', '.join(twice)} has a setting of its own: give that")
    return given | settings.video.arguments


def _start(settings: Settings, pipe: Any) -> Json:
    """The image and the video to go on from, cropped to the proportions of what is drawn."""
    call = models.video_adapter_for(pipe).defaults()
    width, height = settings.width or call["width"], settings.height or call["height"]
    found: Json = {}
    if settings.video.image is not None:
        pixels = np.asarray(as_rgb(open_image(settings.video.image)))
        found["image"] = PIL.Image.fromarray(cropped(pixels, width, height))
    if settings.video.video is not None:
        found["video"] = [PIL.Image.fromarray(cropped(one, width, height)) for one in _read(settings.video.video)]
    return found


def _read(path: str) -> list[np.ndarray]:
    """The frames of a video file. ValueError: more than `MOST_FRAMES`, or none."""
    source, frames = FileSource(path), []
    source.open()
    try:
        while (image := source.read()) is not None:
            if len(frames) == MOST_FRAMES:
                raise ValueError(f"{path} has more than {MOST_FRAMES} frames: cut it")
            frames.append(image.pixels)
    finally:
        source.close()
    if not frames:
        raise ValueError(f"{path} has no frame that can be read")
    return frames


def _at(settings: Settings, path: str) -> object:
    return reduce(getattr, path.split("."), settings)


class VideoScenes:
    """Scenes of a video, of which the first is drawn: the next one changes the prompt and the like at the next chunk. With
    the methods of `streamflow.app.scenes.Scenes`."""

    def __init__(self, stream: VideoStream, scenes: Sequence[Settings]) -> None:
        self._stream, self._all, self._at = stream, tuple(scenes), 0

    def prepare(self) -> None:
        """Nothing is to be loaded."""

    def next(self, crossfade: float = 0.0) -> bool:
        """Draw the next scene from the next chunk on; False where there is no other."""
        if len(self._all) == 1:
            return False
        number = (self._at + 1) % len(self._all)
        before, after = (arguments_of(self._all[k]) for k in (self._at, number))
        self._stream.update(**{name: after[name] for name in CHANGEABLE if after.get(name) != before.get(name)})
        self._at = number
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass
