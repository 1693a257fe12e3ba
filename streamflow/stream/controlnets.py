"""Control nets in a stream: adding and removing them, their scales, and the pictures that each frame brings for them. What a
family's nets are like is in `streamflow.models.controlnets`."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from streamflow.conditioning.controlnet import Control, ControlledVelocity, Controls, check_scale, controlled, image_name
from streamflow.conditioning.prompt import Prompt
from streamflow.flow.schedule import Stages
from streamflow.models import control_rule
from streamflow.stream.grad_mode import computing
from streamflow.stream.ring import Group


@dataclass(frozen=True, eq=False)
class Shown:
    """What the control nets see of some frames: one mapping a frame, of tensors `[1, ...]` by the network's names; and the
    pictures themselves, `[frames, 3 nets, H, W]`."""

    images: Sequence[Mapping[str, Tensor]]
    pictures: Tensor


class Controlling:
    """Mixed into `StreamFlow`."""

    _ticks: threading.RLock
    _slot: threading.Lock
    _scales: Mapping[str, float] = {}
    _levels: Tensor | None = None
    _levels_of: tuple[Stages, Mapping[str, float]] | None = None
    _blank: Mapping[str, Tensor] | None = None

    @property
    def controls(self) -> dict[str, float]:
        """The names of the control nets, in the order in which they were added, and their scales."""
        return dict(self._scales)

    @computing
    def add_control(
        self, name: str, model: nn.Module, scale: float = 1.0, start: float = 0.0, end: float = 1.0, mode: int | None = None
    ) -> None:
        """Let a control net steer the frames that enter from now on. Each of them brings a picture for it:
        `stream(image, control={name: picture})`, `txt2img(control=...)`, `frames([Input(image, control=...)])`.

        model: a diffusers ControlNet model of this family, on the network's device, in its dtype.
        scale: the pipelines' `controlnet_conditioning_scale`. start, end: their `control_guidance_start` and
            `control_guidance_end`, parts of the stages that a frame goes through.
        mode: of a union net (Flux), which of its kinds it is to be.

        Several nets' residuals are added. Frames under way finish first with the nets that they have; later calls deliver
        them before anything newer. What is accelerated is accelerated anew. To be called by the thread that draws.

        Raises:
            TypeError, ValueError: a name that is taken, a net of another family or size, with the numbers, or numbers that
            cannot be. NotImplementedError: diffusers has no control nets for this family. Then all is as it was.
        """
        rule, held = self._control_rule(), self.adapter.controls
        items = held.items if held else ()
        item = Control(name, model, scale, start, end, mode)
        if name in self._scales:
            raise ValueError(f"there is a control named {name!r}: remove_control({name!r}) first, or choose another name")
        rule.check(item, self.adapter.net, items)
        rule.ready(item, self.adapter.net)
        self._put_controls(Controls(rule, (*items, item)), {**self._scales, name: float(scale)})

    @computing
    def remove_control(self, name: str) -> None:
        """Take a control net out; as `add_control`, frames under way finish first. ValueError: an unknown name."""
        self._control_rule()
        self._check_control_names([name])
        left = tuple(item for item in self.adapter.controls.items if item.name != name)
        scales = {one: scale for one, scale in self._scales.items() if one != name}
        self._put_controls(Controls(self.adapter.controls.rule, left) if left else None, scales)

    def set_control_scale(self, name: str, scale: float) -> None:
        """How strongly a control net acts on all rows, those under way too, from the next tick on. From any thread.

        Raises:
            ValueError, TypeError: an unknown name, with those known; a scale that is no finite number.
        """
        self._check_open()
        check_scale(f"scale of control {name!r}", scale)
        with self._slot:
            self._check_control_names([name])
            self._scales = {**self._scales, name: float(scale)}
        self._redraw()

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _wrap_controls(self, pipe: Any) -> None:
        """Add the nets of a ControlNet pipeline at its own scale: "control", or "control_0", "control_1", ..."""
        net = getattr(pipe, "controlnet", None)
        if net is None:
            return
        own = inspect.signature(type(pipe).__call__).parameters
        given = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
        nets = {f"control_{i}": one for i, one in enumerate(net.nets)} if hasattr(net, "nets") else {"control": net}
        for name, one in nets.items():
            self.add_control(name, one, *(own[argument].default for argument in given))

    def _control_rule(self) -> Any:
        self._check_open()
        rule = control_rule(self.adapter)
        if not isinstance(self.adapter.velocity, (self.adapter.Velocity, ControlledVelocity)):
            raise RuntimeError(
                f"stream.velocity was assigned, {type(self.adapter.velocity).__name__}, and control nets belong under it: "
                f"assign stream.unet = stream.unet, add or remove the control, then wrap or shard anew"
            )
        return rule

    def _check_control_names(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._scales]
        if unknown:
            known = ", ".join(map(repr, self._scales)) or "none: add_control(name, model) adds one"
            raise ValueError(f"no control is named {', '.join(map(repr, unknown))}; there are {known}")

    def _put_controls(self, controls: Controls | None, scales: Mapping[str, float]) -> None:
        """Let what is under way finish, then go on with these nets; or as before, if that fails."""
        before = self.adapter.controls, self._scales
        with self._ticks:
            if self._engine is not None:
                self._run_out()
            self._put_back()
            try:
                self._set_controls(controls, scales)
                self._build()
            except BaseException:
                self._set_controls(*before)
                raise
        self._redraw()

    def _set_controls(self, controls: Controls | None, scales: Mapping[str, float]) -> None:
        self.adapter.set_controls(controls)
        self._scales, self._levels_of, self._blank = scales, None, None
        count = len(controls.items) if controls else 0
        self._levels = torch.zeros(count, 3, device=self.device) if count else None
        if count:
            pictures = torch.zeros(1, 3, self.height, self.width, device=self.device)
            self._blank = {name: torch.zeros_like(one) for name, one in self._control_inputs([pictures] * count).items()}

    @computing
    def _control_inputs(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the nets see of pictures `[n, 3, H, W]`, one tensor of them a net, on the device."""
        controls, vae = self.adapter.controls, self.adapter.pipe.vae
        inputs = {}
        for i, (item, one) in enumerate(zip(controls.items, pictures, strict=True)):
            codec = self.codec if len(one) == self.frame_bff_size else self._plain_codec
            inputs[image_name(i)] = controls.rule.image(item, one, codec.encode, vae).to(self.dtype)
        return inputs

    def _shown(self, control: Any, count: int) -> Shown | None:
        """What `count` frames bring for the control nets; None where there are none. Raises before anything has changed."""
        if control is not None and not isinstance(control, Mapping):
            raise TypeError(f"control is a mapping of names to pictures, not {type(control).__name__}")
        control = control or {}
        self._check_control_names(list(control))
        missing = [name for name in self._scales if control.get(name) is None]
        if missing:
            names = ", ".join(map(repr, missing))
            raise ValueError(
                f"no picture for control {names}: pass control={{{missing[0]!r}: picture}} with each frame, "
                f"or remove_control({missing[0]!r})"
            )
        if not self._scales:
            return None
        pictures = [self._control_pictures(name, control[name], count) for name in self.adapter.controls.names]
        batches = [one.split(self.frame_bff_size) for one in map(self._upload, pictures)]
        inputs = [self._control_inputs(batch) for batch in zip(*batches, strict=True)]
        images = [{name: one[name][i : i + 1] for name in one} for one in inputs for i in range(len(one[image_name(0)]))]
        return Shown(images, torch.cat([one.as_subclass(Tensor) for one in pictures], 1))

    def _control_pictures(self, name: str, given: Any, count: int) -> Tensor:
        pictures = self.preprocess(given)
        if len(pictures) not in (1, count):
            raise ValueError(f"{len(pictures)} pictures for control {name!r} of {count} frames: pass one, or one each")
        return pictures.expand(count, -1, -1, -1)

    def _seen_with(self, seen: Tensor, shown: Shown | None) -> Tensor:
        """What the similarity filter is to compare, where frames bring pictures for control nets."""
        if shown is None or not self.similar_image_filter:
            return seen
        return torch.cat((seen.as_subclass(Tensor), shown.pictures.to(seen.device, seen.dtype)), 1)

    def _steered(self, group: Group, shown: Shown | None, first: int = 0) -> Group:
        """The group with what its frames are controlled by, from frame `first` of `shown` on; past its end, the last."""
        if shown is None:
            return group
        first = min(first, len(shown.images) - len(group.prompts))
        images = shown.images[first : first + len(group.prompts)]
        prompts = tuple(self._with_control(prompt, one) for prompt, one in zip(group.prompts, images, strict=True))
        return replace(group, prompts=prompts)

    def _with_control(self, prompt: Prompt, images: Mapping[str, Tensor] | None) -> Prompt:
        """A prompt for a frame that the control nets see so; without pictures it is left as it is."""
        return prompt if images is None else controlled(prompt, images, self._levels, self.adapter.controls.rule.lends)

    def _take_control_levels(self) -> None:
        """Let scales and stages that have changed act. Only the ticking thread comes here, at the start of a tick."""
        if self._levels is None:
            return
        with self._slot:
            wanted = self._state.stages, self._scales
        if self._levels_of is not None and all(a is b for a, b in zip(self._levels_of, wanted, strict=True)):
            return
        table = self.adapter.controls.levels(wanted[0].timesteps, wanted[1])
        if self._levels.device.type == "cuda":
            table = table.pin_memory()
        self._levels.copy_(table, non_blocking=True)
        self._levels_of = wanted
