"""One viewer's stream, of those that share a loaded pipe. Everything here is called by the model's thread only."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamflow import models
from streamflow.app.config import Settings
from streamflow.app.server.wishes import Wish
from streamflow.image_utils import uint8_pixels
from streamflow.models.loading import DTYPES, default_device, prompt_defaults
from streamflow.pipeline import StreamFlow

PERIOD = 24  # frames of drift from one noise to the next
LEVELS = ("mode", "steps", "strength")  # what needs a new ring


@dataclass(frozen=True)
class Drawn:
    """A finished picture, uint8 `[H, W, 3]`. frame: its number; entered: when it came in, `time.monotonic()`; stamp: the
    viewer's own clock then, of a picture; ring: the frames in the ring by stage, the noisiest first, None for none."""

    pixels: np.ndarray
    frame: int
    entered: float
    stamp: float | None
    ring: tuple[int | None, ...]


def open_pipe(settings: Settings, model: str, lora: str | None) -> Any:
    """A loaded pipe, on its device, with its LoRA. Only safetensors are read."""
    device = settings.device or default_device()
    dtype = DTYPES[settings.dtype] if settings.dtype else torch.float32 if device == "cpu" else torch.bfloat16
    single = model.endswith(".safetensors")
    pipe = models.load(
        model, device=device, dtype=dtype, family=settings.family, **({} if single else {"use_safetensors": True})
    )
    loras = {**settings.loras, **({} if lora is None else {lora: 1.0})}
    if loras:
        with StreamFlow(pipe, cfg_type="none", family=settings.family) as stream:
            stream.set_adapters({stream.load_lora(one, use_safetensors=True): weight for one, weight in loras.items()})
    return pipe


class Place:
    """A stream that one viewer at a time draws with."""

    def __init__(self, pipe: Any, settings: Settings, extras: dict[str, Any]):
        s = settings
        self._stream = StreamFlow(
            pipe, None, width=s.width, height=s.height, do_add_noise=s.do_add_noise, cfg_type=s.cfg_type, family=s.family
        )
        if s.tiny_vae:
            self._stream.use_tiny_vae(s.tiny_vae if isinstance(s.tiny_vae, str) else None)
        self._stream.accelerate(s.acceleration.kind, **s.acceleration.options)
        self._stream.on_step(self._look, graph_safe=True)
        self._extras, self._negative, self._delta = extras, s.negative_prompt, s.delta
        self._guided = s.cfg_type != "none"
        self.size = self._stream.width, self._stream.height
        self.reset()

    def reset(self) -> None:
        """As new: nothing in flight, nothing wished."""
        self._wish: Wish | None = None  # what is drawn
        self._tried: Wish | None = None  # what was last asked for
        self._frames: dict[int, tuple[float, float | None]] = {}
        self._ring: tuple[int | None, ...] = ()
        self._count = 0
        self._since_change = 0

    @property
    def prepared(self) -> bool:
        """Whether there is something to draw."""
        return self._wish is not None

    def _look(self, step: Any) -> None:
        self._ring = tuple(None if copy else one for one, copy in zip(step.ids, step.copies, strict=True))
        self._left = step.ids[-1]

    def settled(self, wish: Wish) -> bool:
        """Whether another turn would draw nothing, or only the same picture again."""
        if self._wish is None and wish == self._tried:
            return True
        still = wish.mode == "text" and wish.motion == "still" and wish == self._wish
        return still and self._since_change > len(self._ring)

    def follow(self, wish: Wish) -> None:
        """Draw this from now on. ValueError, TypeError: the stream cannot; it goes on with what it had."""
        before = self._wish
        if wish in (before, self._tried):
            return
        self._tried = wish
        if before is None or any(getattr(wish, name) != getattr(before, name) for name in LEVELS):
            self._prepare(wish)
        elif changes := self._changes(before, wish):
            self._stream.update(**changes)
        self._wish, self._since_change = wish, 0

    def _prepare(self, wish: Wish) -> None:
        picture = wish.mode == "picture"
        strength = {"strength": stages_of(wish) / wish.steps} if picture else {}
        self._stream.prepare(
            wish.prompts,
            self._negative,
            wish.steps,
            wish.guidance if self._guided else None,
            self._delta,
            seed=wish.seed,
            **strength,
            **self._extras,
        )
        self._frames.clear()
        self._count = 0

    def _changes(self, before: Wish, wish: Wish) -> dict[str, Any]:
        wanted = {"prompt": "prompts", "seed": "seed", **({"guidance_scale": "guidance"} if self._guided else {})}
        return {
            name: getattr(wish, field) for name, field in wanted.items() if getattr(wish, field) != getattr(before, field)
        }

    @torch.no_grad()
    def draw(self, image: Any = None, entered: float | None = None, stamp: float | None = None) -> Drawn | None:
        """One turn: a picture in, or one more frame from noise. None while the ring fills."""
        self._frames[self._count] = time.monotonic() if entered is None else entered, stamp
        if image is not None:
            picture = self._stream(image)
        else:
            latents = self._stream.predict_x0_batch(self._noise())
            picture = None if latents is None else self._stream.decode_image(latents)
        self._count += 1
        self._since_change += 1
        if picture is None:
            return None
        left = self._left
        known = self._frames.get(left, self._frames[self._count - 1])
        self._frames = {one: when for one, when in self._frames.items() if one >= left}  # copies follow the first
        return Drawn(uint8_pixels(picture)[0], left, *known, self._ring)

    def _noise(self) -> Tensor:
        """Of the frame that enters: the seed's own, or on the great circle to the next (which keeps its variance)."""
        if self._wish.motion == "still":
            return self._stream.frame_noise(0)
        if self._wish.motion == "fresh":
            return self._stream.frame_noise(self._count)
        k, part = divmod(self._count, PERIOD)
        angle = part / PERIOD * math.pi / 2
        return math.cos(angle) * self._stream.frame_noise(k) + math.sin(angle) * self._stream.frame_noise(k + 1)


def stages_of(wish: Wish) -> int:
    """How many of the steps a picture goes through: at least one, and all of them, from pure noise, at strength 1 only."""
    most = wish.steps if wish.strength == 1 else wish.steps - 1
    return max(1, min(most, round(wish.strength * wish.steps)))


def open_places(settings: Settings) -> dict[str, list[Place]]:
    """For every model that viewers may choose, a warm place for each viewer; the owner's own model first."""
    server = settings.server
    wanted = {"model": (settings.model, None)}
    wanted |= {name: (model, None) for name, model in server.models.items()}
    wanted |= {name: (settings.model, lora) for name, lora in server.loras.items()}
    places = {}
    for name, (model, lora) in wanted.items():
        pipe = open_pipe(settings, model, lora)
        extras = prompt_defaults(pipe) if model == "embedded" else {}
        places[name] = [Place(pipe, settings, extras) for _ in range(server.max_viewers)]
        for place in places[name]:
            warm(place, first_wish(settings, name))
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)  # their warnings quote prompts that are too long
    return places


def first_wish(settings: Settings, model: str = "model") -> Wish:
    """What a new viewer starts with."""
    texts = ((settings.prompt, 1.0),) if isinstance(settings.prompt, str) else settings.prompt
    if len(texts) > 2:
        raise ValueError(f"the page blends two prompts, and the settings have {len(texts)}")
    (prompt, _), (other, second) = texts[0], texts[1] if len(texts) == 2 else ("", 0.0)
    blend = second / sum(weight for _, weight in texts)
    scale = {} if settings.guidance_scale is None else {"guidance": settings.guidance_scale}
    steps = min(settings.num_inference_steps, settings.server.max_steps)
    strength = {} if settings.strength is None else {"strength": settings.strength}
    mode = {"txt2img": "text", "img2img": "picture"}[settings.mode]
    both = {"prompt": prompt, "other": other, "blend": blend}
    return Wish(mode=mode, model=model, **both, seed=settings.seed, steps=steps, **scale, **strength)


def warm(place: Place, wish: Wish) -> None:
    """Draw once in both modes and throw it away."""
    width, height = place.size
    place.follow(replace_mode(wish, "picture"))
    place.draw(np.zeros((height, width, 3), np.uint8))
    place.follow(replace_mode(wish, "text"))
    place.draw()
    place.reset()


def replace_mode(wish: Wish, mode: str) -> Wish:
    """The wish in another mode."""
    return wish.model_copy(update={"mode": mode})
