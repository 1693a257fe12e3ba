"""A session slot: one viewer's stream, of those that share a loaded pipe. Only the model's thread calls this module."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from streamflow import models, pretrained
from streamflow._files import Json
from streamflow.app.config import Settings
from streamflow.app.server.images import CheckSize, Style
from streamflow.app.server.messages import DrawRequest
from streamflow.flow.guidance import mode as guidance_mode
from streamflow.flow.noise import interpolated
from streamflow.image_utils import Images, Maker, open_image, uint8_pixels
from streamflow.models import reference_rule
from streamflow.models.adapter import FlowAdapter
from streamflow.models.loading import DTYPES, default_device, default_dtype, load_control, prompt_defaults
from streamflow.models.protocols import Pipeline
from streamflow.pipeline import StreamFlow
from streamflow.stream.hooks import Step
from streamflow.wrapper import check_control, open_maker, use_control

PERIOD = 24  # frames of drift from one noise to the next
NOISE = {"still": "constant", "drift": "interpolated", "fresh": "frame"}  # of frames whose image is a reference, by motion
LEVELS = ("mode", "steps", "strength")  # what needs a new ring
LOADING, WARMING_UP = "loading the model", "warming up"
MAX_GUIDANCE = 4.0
ABOUT: dict[str, Json] = {  # of the embedded models, for the page
    "embedded": {
        "examples": pretrained.EXAMPLE_PROMPTS,
        "prompt": "This model draws emoji only. Write “a concept, a style”, such as “a fox, 3d render”. The styles are "
        "3d render, flat vector, soft gradient, glossy cartoon and bold cartoon.",
        "guidance": "This model is best at 1, without guidance. With 4 steps or more, up to 3 works.",
    },
    "embedded-video": {
        "examples": pretrained.EXAMPLE_VIDEO_PROMPTS,
        "prompt": "This model draws emoji in motion only. Write “a thing, a style, a motion”, such as “a rose, 3d render, "
        "pulsing”. The styles are 3d render and flat vector. The motions are spinning, swaying, bouncing, moving and "
        "pulsing.",
        "guidance": "This model was trained for 1, without guidance.",
    },
}


@dataclass(frozen=True)
class Drawn:
    """A finished image, uint8 `[H, W, 3]`. frame: its number; entered: `time.monotonic()` when its input arrived; stamp: the
    viewer's own clock then, of an input image; ring: the frames in the ring by stage, the noisiest first, or None; control:
    the control image of the input image that entered last, uint8 `[H, W, 3]`; None where the viewer does not show it."""

    pixels: np.ndarray
    frame: int
    entered: float
    stamp: float | None
    ring: tuple[int | None, ...]
    control: np.ndarray | None = None


@dataclass(frozen=True)
class ControlNet:
    """A control net that the slots of a pipe share. net: None where the pipe has its own. maker: makes the control images;
    all pipes share it. scale: how strongly the net acts."""

    net: nn.Module | None
    maker: Maker
    scale: float


def check_control_net(settings: Settings) -> None:
    """Raise ValueError for a control net that the page cannot use. Also raises as `check_control`."""
    given = settings.controlnet
    check_control("img2img", given.net, given.maker, given.maker_model)
    if given.maker is not None and settings.server.models:
        raise ValueError(f"a control net fits one model: leave {', '.join(settings.server.models)} of server.models out")


def open_control_net(settings: Settings, pipe: Pipeline, maker: Maker | None) -> ControlNet | None:
    """The control net for this pipe, loaded; None without a maker. Only safetensors are read."""
    if maker is None:
        return None
    given = settings.controlnet
    adapter = models.adapter_for(pipe, settings.family)
    net = None if given.net is None else load_control(given.net, adapter, use_safetensors=True)
    return ControlNet(net, maker, given.scale)


def open_pipe(settings: Settings, model: str, lora: str | None) -> Pipeline:
    """A loaded pipe, on its device, with its LoRA. Only safetensors are read."""
    device = settings.device or default_device()
    dtype = DTYPES[settings.dtype] if settings.dtype else default_dtype(device)
    single = model.endswith(".safetensors")
    pipe = models.load(
        model, device=device, dtype=dtype, family=settings.family, **({} if single else {"use_safetensors": True})
    )
    loras = {**settings.loras, **({} if lora is None else {lora: 1.0})}
    if loras:
        with StreamFlow(pipe, cfg_type="none", family=settings.family) as stream:
            stream.set_adapters({stream.load_lora(one, use_safetensors=True): weight for one, weight in loras.items()})
    return pipe


class Slot:
    """A stream that one viewer at a time uses."""

    def __init__(self, pipe: Pipeline, settings: Settings, extras: Json, control: ControlNet | None = None):
        s = settings
        self._stream = StreamFlow(
            pipe, None, width=s.width, height=s.height, do_add_noise=s.do_add_noise, cfg_type=s.cfg_type, family=s.family
        )
        if s.tiny_vae:
            self._stream.use_tiny_vae(s.tiny_vae if isinstance(s.tiny_vae, str) else None)
        for number, path in enumerate(s.references):
            self._stream.set_reference(f"reference_{number}", open_image(path))
        self.control = control
        if control is not None:
            use_control(self._stream, control.net, self._make_control, control.scale)
        self._stream.accelerate(s.acceleration.kind, **s.acceleration.options)
        self._stream.on_step(self._look, graph_safe=True)
        self._extras, self._delta = extras, s.delta
        self.image_is_reference = self._stream.adapter.reference is not None
        self.needs_image = self.image_is_reference and reference_rule(self._stream.adapter).least > len(s.references)
        self.check_style = style_check(self._stream.adapter, len(s.references))
        self._guided, self._takes_negative = s.cfg_type != "none", takes_negative(s)
        self.size = self._stream.width, self._stream.height
        self.reset()

    def reset(self) -> None:
        """Back to the initial state: nothing in flight, nothing requested."""
        self._request: DrawRequest | None = None  # the request that is drawn
        self._style: Style | None = None  # the style image that is drawn with
        self._tried: tuple[DrawRequest, Style | None] | None = None  # the last ones, refused ones included
        self._reference: Images | None = None  # the style image as the stream takes it
        self._frames: dict[int, tuple[float, float | None]] = {}
        self._ring: tuple[int | None, ...] = ()
        self._count = 0
        self._since_change = 0
        self._control_image: PIL.Image.Image | None = None  # the last one

    @property
    def prepared(self) -> bool:
        """Whether a request has been applied."""
        return self._request is not None

    def _make_control(self, image: PIL.Image.Image) -> PIL.Image.Image:
        assert self.control is not None, "only a slot with a control net calls this"
        made = self._control_image = self.control.maker(image)
        return made

    def _look(self, step: Step) -> None:
        self._ring = tuple(None if copy else one for one, copy in zip(step.ids, step.copies, strict=True))
        self._left = step.ids[-1]

    def settled(self, request: DrawRequest, style: Style | None = None) -> bool:
        """Whether another turn would draw nothing, or only the same image again."""
        wanted = request, style
        if self._request is None and wanted == self._tried:
            return True
        still = request.mode == "text" and request.motion == "still" and wanted == (self._request, self._style)
        return still and self._since_change > len(self._ring)

    def apply(self, request: DrawRequest, style: Style | None = None) -> None:
        """Draw this request from now on, with this style image as one more reference where the model takes it. ValueError,
        TypeError: the stream refuses the request and keeps the one before."""
        before, wanted = self._request, (request, style)
        if wanted in ((before, self._style), self._tried):
            return
        self._tried = wanted
        restyled = style is not self._style  # a new ring, since rows with as many references each share a network call
        if before is None or restyled or any(getattr(request, name) != getattr(before, name) for name in LEVELS):
            self._prepare(request)
        else:
            old, new = ({**self._values(one), **self._motion(one)} for one in (before, request))
            if changes := {name: value for name, value in new.items() if value != old[name]}:
                self._stream.update(**changes)
        if restyled:
            self._reference = None if style is None or self.check_style is None else self._stream.preprocess(style.image)
        self._request, self._style, self._since_change = request, style, 0

    def _values(self, request: DrawRequest) -> Json:
        """What `prepare` and `update` both take of a request."""
        guidance = {"guidance_scale": request.guidance} if self._guided else {}
        negative = {"negative_prompt": request.negative} if self._takes_negative else {}
        return {"prompt": request.prompts, "seed": request.seed, **guidance, **negative}

    def _motion(self, request: DrawRequest) -> Json:
        """The noise of frames whose image is a reference, which start from noise."""
        return {"noise": NOISE[request.motion], "noise_period": PERIOD} if self.image_is_reference else {}

    def _prepare(self, request: DrawRequest) -> None:
        self._stream.prepare(
            **self._values(request),
            num_inference_steps=request.steps,
            delta=self._delta,
            strength=stages_of(request) / request.steps if self._starts_from_image(request) else None,
            **self._extras,
        )
        if motion := self._motion(request):
            self._stream.update(**motion)
        self._frames.clear()
        self._count = 0

    def _starts_from_image(self, request: DrawRequest) -> bool:
        return request.mode == "image" and not self.image_is_reference

    @torch.no_grad()
    def draw(self, image: Images | None = None, entered: float | None = None, stamp: float | None = None) -> Drawn | None:
        """One turn: draw an input image, or a frame from noise. None while the ring fills."""
        self._frames[self._count] = time.monotonic() if entered is None else entered, stamp
        if image is not None:
            drawn = self._stream(image, reference=self._reference)
        else:
            latents = self._stream.predict_x0_batch(self._noise(), reference=self._reference)
            drawn = None if latents is None else self._stream.decode_image(latents)
        self._count += 1
        self._since_change += 1
        if drawn is None:
            return None
        left = self._left
        assert left is not None, "a finished frame has its number"
        known = self._frames.get(left, self._frames[self._count - 1])
        self._frames = {one: when for one, when in self._frames.items() if one >= left}  # copies follow the first
        wanted = self._request is not None and self._request.show_control and self._control_image is not None
        control = np.asarray(self._control_image) if wanted else None
        return Drawn(uint8_pixels(drawn)[0], left, *known, self._ring, control)

    def _noise(self) -> Tensor:
        """The noise of the frame that enters: the same for all, one of its own, or on the way from one to the next."""
        assert self._request is not None, "a slot draws what it has applied"
        if self._request.motion == "drift":
            return interpolated(self._stream.frame_noise, self._count, PERIOD)
        return self._stream.frame_noise(0 if self._request.motion == "still" else self._count)


def style_check(adapter: FlowAdapter, references: int) -> CheckSize | None:
    """What checks the size of a style image; None where the model takes no reference beside an image and these."""
    if adapter.reference is None:
        return None
    rule = reference_rule(adapter)
    if rule.most is not None and rule.most < references + 2:
        return None
    return partial(rule.sizes, adapter, arguments={})


def stages_of(request: DrawRequest) -> int:
    """The number of steps an image goes through: at least one, and all of them (from pure noise) at strength 1 only."""
    most = request.steps if request.strength == 1 else request.steps - 1
    return max(1, min(most, round(request.strength * request.steps)))


def takes_negative(settings: Settings) -> bool:
    """Whether the kind of guidance uses a negative prompt."""
    return guidance_mode(settings.cfg_type).extra_rows(1, 1) > 0


def offered(settings: Settings) -> dict[str, tuple[str, str | None]]:
    """The models that viewers may choose, by name: (model, LoRA or None), the owner's own first."""
    wanted: dict[str, tuple[str, str | None]] = {"model": (settings.model, None)}
    wanted |= {name: (model, None) for name, model in settings.server.models.items()}
    return wanted | {name: (settings.model, lora) for name, lora in settings.server.loras.items()}


def about_models(settings: Settings) -> dict[str, Json]:
    """For each model whose limits are known: example prompts, and notes for the page."""
    most = {"max_guidance": max(MAX_GUIDANCE, settings.guidance_scale or 0)}
    return {name: ABOUT[model] | most for name, (model, _) in offered(settings).items() if model in ABOUT}


def open_slots(settings: Settings, progress: Callable[[str, int, int], None]) -> dict[str, list[Slot]]:
    """For every model that viewers may choose, a warm slot for each viewer; the owner's own model first. progress: called
    with the phase, how many of its parts are done, and of how many."""
    wanted, slots = offered(settings), {}
    net = settings.controlnet
    maker = open_maker("img2img", settings.device or default_device(), net.net, net.maker, net.maker_model)
    for done, (name, (model, lora)) in enumerate(wanted.items()):
        progress(LOADING, done, len(wanted))
        pipe = open_pipe(settings, model, lora)
        extras = prompt_defaults(pipe) if model == "embedded" else {}
        control = open_control_net(settings, pipe, maker)
        slots[name] = [Slot(pipe, settings, extras, control) for _ in range(settings.server.max_viewers)]
    cold = [(name, slot) for name, own in slots.items() for slot in own]
    for done, (name, slot) in enumerate(cold):
        progress(WARMING_UP, done, len(cold))
        warm(slot, first_request(settings, name))
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)  # their warnings quote prompts that are too long
    return slots


def first_request(settings: Settings, model: str = "model") -> DrawRequest:
    """The request that a new viewer starts with."""
    texts = ((settings.prompt, 1.0),) if isinstance(settings.prompt, str) else settings.prompt
    if len(texts) > 2:
        raise ValueError(f"the page blends two prompts, and the settings have {len(texts)}")
    (prompt, _), (other, second) = (*texts, ("", 0.0))[:2]
    blend = second / sum(weight for _, weight in texts)
    steps = min(settings.num_inference_steps, settings.server.max_steps)
    guidance = 1.0 if settings.guidance_scale is None and settings.model == "embedded" else settings.guidance_scale
    given = {"guidance": guidance, "strength": settings.strength}
    optional: Json = {name: value for name, value in given.items() if value is not None}
    return DrawRequest(
        mode="text" if settings.mode == "txt2img" and settings.controlnet.maker is None else "image",
        model=model,
        prompt=prompt,
        other=other,
        negative=settings.negative_prompt if takes_negative(settings) else "",
        blend=blend,
        seed=settings.seed,
        steps=steps,
        **optional,
    )


def warm(slot: Slot, request: DrawRequest) -> None:
    """Warm up: draw once in each mode that the model has, with and without a style image, and discard the results."""
    width, height = slot.size
    black = np.zeros((height, width, 3), np.uint8)
    for style in (None, *(() if slot.check_style is None else (Style(black),))):
        for mode, image in {"image": black, "text": None}.items():
            if mode == "image" or (slot.control is None and (style is not None or not slot.needs_image)):
                slot.apply(request.model_copy(update={"mode": mode}), style)
                slot.draw(image)
    slot.reset()
