"""Control nets as a condition of frames: adding and removing them, their scales, and the control images of each frame. The
families' rules are in `streamflow.models.controlnets`."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import PIL.Image
import torch
from torch import Tensor, nn

from streamflow._grad_mode import computing
from streamflow._threads import Thread
from streamflow.conditioning.control_makers import as_maker
from streamflow.conditioning.controlnet import (
    Control,
    ControlRule,
    Controls,
    check_scale,
    controlled,
    image_name,
)
from streamflow.conditioning.prompt import Prompt
from streamflow.flow.schedule import Stages
from streamflow.image_utils import uint8_pixels
from streamflow.models import control_rule
from streamflow.models.protocols import Network
from streamflow.stream.conditioner import Conditioner, Start
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.inputs import ImageReader
from streamflow.stream.model import Model
from streamflow.stream.ring import Group

if TYPE_CHECKING:
    from streamflow.image_utils import Images, Maker


@dataclass(frozen=True, eq=False)
class ControlImages:
    """The control images of one frame: the nets' inputs `[1, ...]` by the names of the network's arguments, and the images
    themselves, `[1, 3 nets, H, W]` in [-1, 1]."""

    rows: Mapping[str, Tensor]
    images: Tensor


@dataclass(frozen=True, eq=False)
class Unmade:
    """Frames that were read together and whose control images, or some of them, are made from their own images. sources: by
    net, images `[count, 3, H, W]` in [-1, 1] or a maker."""

    sources: Mapping[str, Tensor | Maker]
    count: int

    @property
    def makers(self) -> dict[str, Maker]:
        """The makers, by net."""
        return {name: one for name, one in self.sources.items() if not isinstance(one, Tensor)}


@dataclass(frozen=True, eq=False)
class UnmadeImages:
    """The control images of one frame, before they are made: those of frame `index` of these."""

    frames: Unmade
    index: int

    @property
    def images(self) -> Tensor | None:
        """Those that are given, `[1, 3 nets, H, W]` in [-1, 1]; None where all are made."""
        given = [one[self.index] for one in self.frames.sources.values() if isinstance(one, Tensor)]
        return torch.cat(given)[None] if given else None


Entry = ControlImages | UnmadeImages | None
Made = dict[str, list[Any]]  # by net, an image a frame


class Making(Thread):
    """Makes the control images of a group in a thread of its own, one after the other. frames: by what was read together,
    the frames' own images `[3, H, W]` by their index."""

    def __init__(self, frames: Mapping[Unmade, Mapping[int, Tensor]]) -> None:
        super().__init__(self._make_all, "streamflow control images")
        self._frames = frames
        self._made: dict[Unmade, Made] = {}
        self._error: BaseException | None = None
        self.start()

    def _make_all(self) -> None:
        try:
            for unmade, by_index in self._frames.items():
                images = uint8_pixels(torch.stack([by_index[i] for i in range(unmade.count)]))
                pictures = [PIL.Image.fromarray(one) for one in images]
                self._made[unmade] = {name: [make(one) for one in pictures] for name, make in unmade.makers.items()}
        except BaseException as error:  # raised in the drawing thread
            self._error = error

    def result(self) -> Mapping[Unmade, Made]:
        """Wait for the images. Raises what a maker raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._made


class ControlNets(Conditioner):
    """The conditioner of control images. redraw: called when what is drawn has changed."""

    name = "control"
    uses_image = False

    def __init__(self, model: Model, denoiser: Denoiser, redraw: Callable[[], None], reader: ImageReader) -> None:
        self._model, self._denoiser, self._redraw, self._reader = model, denoiser, redraw, reader
        self.active = False  # there are control nets, for which every frame needs an image
        self.scales: Mapping[str, float] = {}
        self._lock = threading.Lock()  # of scales, which any thread may change
        self._levels = torch.zeros(0, 3)  # the table `control_levels`, on the model's device
        self._levels_of: tuple[Stages | None, Mapping[str, float]] = (None, {})
        self.blank: Mapping[str, Tensor] | None = None
        self.makers: Mapping[str, Maker] = {}  # of frames that bring no image for a net
        self._making: Making | None = None
        self._compared: Mapping[str, Maker] = {}  # the makers of the frame that the similarity filter saw last
        denoiser.on_close.add(self._wait)

    @property
    def controls(self) -> dict[str, float]:
        """The names of the control nets, in the order in which they were added, and their scales."""
        return dict(self.scales)

    @computing
    def add_control(
        self,
        name: str,
        model: nn.Module,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        mode: int | None = None,
        maker: Maker | str | None = None,
    ) -> None:
        """Let a control net steer the frames that enter from now on. Each of them brings an image for it:
        `stream(image, control={name: edges})`, `txt2img(control=...)`, `frames([Input(image, control=...)])`.

        model: a diffusers ControlNet model of this family, on the network's device, in its dtype.
        scale: the pipelines' `controlnet_conditioning_scale`. start, end: their `control_guidance_start` and
            `control_guidance_end`, parts of the stages that a frame goes through.
        mode: the control mode of a union net (Flux).
        maker: as `set_control_maker`'s.

        Several nets' residuals are added. Frames in flight finish first with the nets that they have; later calls deliver
        them before anything newer. What is accelerated is accelerated anew. To be called by the thread that draws.

        Raises:
            TypeError, ValueError: a name that is taken, a net of another family or size, with the numbers, or numbers that
            cannot be. NotImplementedError: diffusers has no control nets for this family. Then all is as it was.
        """
        rule, held = self._rule(), self._model.adapter.controls
        items = held.items if held else ()
        item = Control(name, cast(Network, model), scale, start, end, mode)
        if name in self.scales:
            raise ValueError(f"there is a control named {name!r}: remove_control({name!r}) first, or choose another name")
        rule.check(item, self._model.adapter.net, items)
        chosen = self._maker(name, maker)
        rule.ready(item, self._model.adapter.net)
        self._put(Controls(rule, (*items, item)), {**self.scales, name: float(scale)})
        self._set_maker(name, chosen)

    @computing
    def remove_control(self, name: str) -> None:
        """Take a control net out; as `add_control`, frames in flight finish first. ValueError: an unknown name."""
        self._rule()
        self._check_names([name])
        controls = self._controls()
        left = tuple(item for item in controls.items if item.name != name)
        scales = {one: scale for one, scale in self.scales.items() if one != name}
        self._put(Controls(controls.rule, left) if left else None, scales)
        self._set_maker(name, None)

    def set_control_scale(self, name: str, scale: float) -> None:
        """How strongly a control net acts on all rows, those in flight too, from the next tick on. From any thread.

        Raises:
            ValueError, TypeError: an unknown name, with those known; a scale that is no finite number.
        """
        self._model.check_open()
        check_scale(f"scale of control {name!r}", scale)
        with self._lock:
            self._check_names([name])
            self.scales = {**self.scales, name: float(scale)}
        self._redraw()

    def set_control_maker(self, name: str, maker: Maker | str | None) -> None:
        """Make the control images of this net, from now on, from the images of the frames: `stream(image)` and
        `frames(images)` then need none. An image or a maker of a call's `control=` has precedence. None: no longer.

        maker: "canny" or "lineart", a `ControlMaker`, or a function that takes a frame's image (PIL, mode RGB, in the
            stream's size) and returns its control image. It runs in a thread of its own, for one image at a time, in the
            order of the frames, beside the encoding of the frame; an error that it raises is the call's, and nothing has
            entered then. A frame that the similarity filter skips makes none. From any thread.

        Raises:
            ValueError: an unknown name of a net, or as `ControlMaker`. ImportError: a package is missing. TypeError: neither
                a name nor a function.
        """
        self._model.check_open()
        self._check_names([name])
        self._set_maker(name, self._maker(name, maker))
        self._redraw()

    def add_pipe_nets(self) -> None:
        """Add the nets of a ControlNet pipeline at its own scale: "control", or "control_0", "control_1", ..."""
        pipe = self._model.pipe
        net = getattr(pipe, "controlnet", None)
        if net is None:
            return
        own = inspect.signature(type(pipe).__call__).parameters
        given = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
        nets = {f"control_{i}": one for i, one in enumerate(net.nets)} if hasattr(net, "nets") else {"control": net}
        for name, one in nets.items():
            self.add_control(name, one, *(own[argument].default for argument in given))

    # -- of frames ------------------------------------------------------------------------------------------------------

    def read(self, given: object, images: Tensor | None, positions: range) -> Sequence[Entry]:
        """The control images of each frame, or how they are made; None without control nets."""
        given, count = self._by_name(given), len(positions)
        self._check_names(list(given))
        own = {} if images is None else self.makers  # a frame without an image brings its control images
        sources: dict[str, Any] = {name: own.get(name) if given.get(name) is None else given[name] for name in self.scales}
        missing = [name for name, one in sources.items() if one is None]
        if missing:
            names = ", ".join(map(repr, missing))
            raise ValueError(
                f"no image for control {names}: pass control={{{missing[0]!r}: image}} with each frame, "
                f"or remove_control({missing[0]!r})"
            )
        if not self.scales:
            return [None] * count
        makers = {name: maker for name, one in sources.items() if (maker := as_maker(one))}
        if makers and images is None:
            name = next(iter(makers))
            raise ValueError(
                f"the image of control {name!r} is to be made from the frame's own image, and a frame that is drawn from "
                f"noise has none: pass control={{{name!r}: image}}, or draw from an image, stream(image)"
            )
        by_net = {name: self._images(name, one, count) for name, one in sources.items() if name not in makers}
        if not makers:
            return self._encoded(by_net)
        unmade = Unmade({name: makers.get(name) or by_net[name] for name in self.scales}, count)
        return [UnmadeImages(unmade, i) for i in range(count)]

    def _by_name(self, given: object) -> Mapping[str, Any]:
        """What `control=` gives each net; a maker alone is that of the only net."""
        if given is None or isinstance(given, Mapping):
            return given or {}
        if not isinstance(given, str) and not callable(given):
            raise TypeError(
                f"control is a mapping of names to images, or a maker such as 'canny', not {type(given).__name__}: pass "
                f"control={{{next(iter(self.scales), 'name')!r}: image}}"
            )
        if len(self.scales) != 1:
            names = ", ".join(self.scales) or "none: add_control(name, model) adds one"
            raise ValueError(
                f"control={given!r} is for a stream with one control net, and there are {names}: pass "
                f"control={{name: {given!r}}}"
            )
        return dict.fromkeys(self.scales, given)

    def _encoded(self, by_net: Mapping[str, Tensor]) -> list[ControlImages]:
        """The control images of frames that were read together, by net `[n, 3, H, W]`, encoded, one entry a frame."""
        batches = [one.split(self._model.frames) for one in map(self._model.upload, by_net.values())]
        rows = [self._inputs(batch) for batch in zip(*batches, strict=True)]
        by_frame = [{name: one[name][i : i + 1] for name in one} for one in rows for i in range(len(one[image_name(0)]))]
        seen = torch.cat([one.as_subclass(Tensor) for one in by_net.values()], 1)
        return [ControlImages(one, seen[i : i + 1]) for i, one in enumerate(by_frame)]

    def compared(self, entries: Sequence[Entry]) -> Tensor | None:
        """The control images that the calls bring. Those that are made follow from the frames' own."""
        makers = {k: v for one in entries if isinstance(one, UnmadeImages) for k, v in one.frames.makers.items()}
        if makers != self._compared:
            self._compared = makers
            self._redraw()  # equal frames differ under another maker
        images = [one.images for one in entries if one is not None and one.images is not None]
        return torch.cat(images) if images else None

    def begin(self, entries: Sequence[Entry], images: Tensor | None) -> None:
        """Start making the group's control images."""
        self._wait()
        frames: dict[Unmade, dict[int, Tensor]] = {}
        for row, one in enumerate(entries):
            if isinstance(one, UnmadeImages):
                assert images is not None, "only frames with images are read as such"
                frames.setdefault(one.frames, {})[one.index] = images[row]
        self._making = Making(frames) if frames else None

    def join(self, group: Group, entries: Sequence[Entry], start: Start) -> Group:
        """The group with its frames' control images in their prompts."""
        names = None if self.blank is None else self.blank.keys()
        if any(_argument_names(one) != names for one in entries):
            raise RuntimeError(
                "control nets were added or removed while frames of frames() waited for their group to be full: change them "
                "before the loop, or draw with frame_buffer_size=1"
            )
        pairs = zip(group.prompts, self._finished(entries), strict=True)
        return replace(group, prompts=tuple(self._prompt(prompt, one and one.rows) for prompt, one in pairs))

    def _finished(self, entries: Sequence[Entry]) -> list[ControlImages | None]:
        """The entries, with what was made in the place of what was to be made."""
        made = {} if self._making is None else self._making.result()
        self._making = None
        encoded = {unmade: self._encoded(self._read_made(unmade, images)) for unmade, images in made.items()}
        return [encoded[one.frames][one.index] if isinstance(one, UnmadeImages) else one for one in entries]

    def _read_made(self, unmade: Unmade, made: Made) -> dict[str, Tensor]:
        """The control images of frames that were read together, by net `[count, 3, H, W]` in [-1, 1]."""
        return {
            name: torch.cat([self._images(name, image, 1) for image in made[name]]) if name in made else cast(Tensor, one)
            for name, one in unmade.sources.items()
        }

    def _wait(self) -> None:
        """Wait for images that an error has left unused, since a maker makes one at a time."""
        if self._making is not None:
            self._making.join()
            self._making = None

    def example(self, prompt: Prompt) -> Prompt:
        """The prompt with inputs of zeros for the control nets that there are."""
        return self._prompt(prompt, self.blank)

    def _prompt(self, prompt: Prompt, rows: Mapping[str, Tensor] | None) -> Prompt:
        """A prompt with a frame's inputs of the control nets; without them, the prompt itself."""
        return prompt if rows is None else controlled(prompt, rows, self._levels, self._controls().rule.lends)

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _controls(self) -> Controls:
        """The control nets that the velocity has. RuntimeError where it has none."""
        controls = self._model.adapter.controls
        if controls is None:
            raise RuntimeError("this stream has no control nets: add_control(name, model) adds one")
        return controls

    def _rule(self) -> ControlRule:
        self._model.check_open()
        adapter = self._model.adapter
        rule = control_rule(adapter)
        if adapter.velocity is not adapter.own_velocity:
            raise RuntimeError(
                f"stream.velocity was assigned, {type(adapter.velocity).__name__}, and control nets belong under it: "
                f"assign stream.unet = stream.unet, add or remove the control, then wrap or shard anew"
            )
        return rule

    def _check_names(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.scales]
        if unknown:
            known = ", ".join(map(repr, self.scales)) or "none: add_control(name, model) adds one"
            raise ValueError(f"no control is named {', '.join(map(repr, unknown))}; there are {known}")

    def _put(self, controls: Controls | None, scales: Mapping[str, float]) -> None:
        """Let the frames in flight finish, then use these nets. If that fails, the former nets stay."""
        before, model = (self._model.adapter.controls, self.scales), self._model
        with self._denoiser.ticks:
            if self._denoiser.engine is not None:
                self._denoiser.run_out()
            model.before_change()
            try:
                self._set(controls, scales)
                model.after_change()
            except BaseException:
                self._set(*before)
                raise
        self._redraw()

    def _maker(self, name: str, given: object) -> Maker | None:
        """The maker that this stands for. TypeError: neither a name nor a function."""
        maker = as_maker(given)
        if maker is None and given is not None:
            raise TypeError(
                f"the maker of control {name!r} is a name such as 'canny', a ControlMaker or a function of an image, not "
                f"{type(given).__name__}"
            )
        return maker

    def _set_maker(self, name: str, maker: Maker | None) -> None:
        with self._lock:
            others = {one: other for one, other in self.makers.items() if one != name}
            self.makers = others if maker is None else {**others, name: maker}

    def _set(self, controls: Controls | None, scales: Mapping[str, float]) -> None:
        model = self._model
        model.adapter.set_controls(controls)
        self.scales, self._levels_of, self.blank = scales, (None, {}), None
        self.active = bool(scales)
        count = len(controls.items) if controls else 0
        self._levels = torch.zeros(count, 3, device=model.device)
        self._denoiser.before_step.remove(self._take_levels)
        if count:
            self._denoiser.before_step.add(self._take_levels)
            images = torch.zeros(1, 3, model.height, model.width, device=model.device)
            self.blank = {name: torch.zeros_like(one) for name, one in self._inputs([images] * count).items()}

    @computing
    def _inputs(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """The nets' inputs of images `[n, 3, H, W]`, one tensor of images for each net, on the device."""
        model, controls = self._model, self._controls()
        inputs = {}
        for i, (item, one) in enumerate(zip(controls.items, images, strict=True)):
            codec = model.codec if len(one) == model.frames else model.plain_codec
            inputs[image_name(i)] = controls.rule.image(item, one, codec.encode, model.adapter.pipe.vae).to(model.dtype)
        return inputs

    def _images(self, name: str, given: Images, count: int) -> Tensor:
        images = self._reader.preprocess(given)
        if len(images) not in (1, count):
            raise ValueError(f"{len(images)} images for control {name!r} of {count} frames: pass one, or one each")
        return images.expand(count, -1, -1, -1)

    def _take_levels(self) -> None:
        """Copy scales and stages that have changed to the device. Only the drawing thread calls this, before a step."""
        stages, scales = self._denoiser.prepared().stages, self.scales
        if self._levels_of[0] is stages and self._levels_of[1] is scales:
            return
        table = self._controls().levels(stages.timesteps, scales)
        self._levels.copy_(self._model.to_device(table, table.dtype))
        self._levels_of = stages, scales


def _argument_names(entry: Entry) -> Iterable[str] | None:
    """The names of the nets' inputs among the network's arguments."""
    if isinstance(entry, UnmadeImages):
        return dict.fromkeys(map(image_name, range(len(entry.frames.sources)))).keys()
    return None if entry is None else entry.rows.keys()
