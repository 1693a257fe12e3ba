"""Control nets of a network: a family's rule for them, the velocity with their residuals, and the prompt with a frame's
control images.

A net's residuals are weighed row by row, so that rows at different stages share a call. All that changes is a tensor: the
frame's control images are in its prompt, and scales and windows are one table, `control_levels` `[nets, 3]`, float32, of a
scale and the highest and the lowest time at which the net acts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from streamflow._validation import check_number
from streamflow.conditioning.prompt import Cond, Prompt, extended
from streamflow.flow.convention import times

if TYPE_CHECKING:
    from streamflow.models.protocols import VAE, Network

PREFIX = "control_"
LEVELS, LENT = f"{PREFIX}levels", f"{PREFIX}of_"
Residuals = dict[str, Any]


def image_name(i: int) -> str:
    """The name of net i's image among the network's arguments."""
    return f"{PREFIX}{i}"


@dataclass(frozen=True, eq=False)
class Control:
    """A control net under a name. scale: of its residuals. start, end: the part of the steps in which it acts, as the
    pipelines' `control_guidance_start` and `control_guidance_end`. mode: the control mode of a union net.

    Raises:
        TypeError, ValueError: where made, for numbers that cannot be.
    """

    name: str
    net: Network
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"a control is named by a text, not {self.name!r}")
        for name in ("scale", "start", "end"):
            check_scale(f"{name} of control {self.name!r}", getattr(self, name))
        if not 0.0 <= self.start < self.end <= 1.0:
            raise ValueError(
                f"control {self.name!r} acts from start {self.start} to end {self.end}: these are parts of the steps, "
                f"0 <= start < end <= 1"
            )

    def window(self, timesteps: Tensor) -> tuple[float, float]:
        """The highest and the lowest of these falling times at which it acts; by the pipelines' own formula (diffusers
        pipelines/controlnet_sd3/pipeline_stable_diffusion_3_controlnet.py, `controlnet_keep`)."""
        n = len(timesteps)
        kept = [i for i in range(n) if not (i / n < self.start or (i + 1) / n > self.end)]
        return (float(timesteps[kept[0]]), float(timesteps[kept[-1]])) if kept else (-torch.inf, torch.inf)


def check_scale(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless value is a finite number."""
    if value is None:
        raise TypeError(f"{name} must be a number, not None")
    check_number(name, value)


class ControlRule:
    """The rule of a family's control nets. A subclass sets the class attributes and defines `call`.

    model: the name of the diffusers class of its nets. same: entries of a net's config that must equal the network's own.
    blocks: the net's lists of output layers. lends: the prompt's row inputs that the nets take from the prompt for negative
    rows too, where the pipeline calls them once for both.
    """

    model: ClassVar[str]
    same: ClassVar[tuple[str, ...]] = ()
    blocks: ClassVar[tuple[str, ...]] = ("controlnet_blocks",)
    lends: ClassVar[tuple[str, ...]] = ()

    def call(self, item: Control, x: Tensor, t: Tensor, image: Tensor, cond: Mapping[str, Tensor]) -> Residuals:
        """The net's residuals of rows x `[rows, ...]` at times t `[rows]`, as arguments of the network."""
        raise NotImplementedError

    def image(self, item: Control, images: Tensor, encode: Callable[[Tensor], Tensor], vae: VAE) -> Tensor:
        """The net's input for images `[n, 3, H, W]` in [-1, 1]; by default their latents in the network's form."""
        return encode(images)

    def ready(self, item: Control, network: Network) -> None:
        """Set up the net as its pipeline does."""

    def check(self, item: Control, network: Network, others: Sequence[Control]) -> None:
        """Raise TypeError or ValueError for a net that does not belong to this network, or not beside the others."""
        net = item.net
        if self.model not in [one.__name__ for one in type(net).__mro__]:
            raise TypeError(f"control nets of {type(network).__name__} are {self.model}s, not {type(net).__name__}")
        for name in self.same:
            its, wanted = getattr(net.config, name, None), getattr(network.config, name, None)
            if its != wanted and not (name == "joint_attention_dim" and its is None):
                raise ValueError(
                    f"control {item.name!r} has {name} {its}, this network {wanted}: load a net that was trained for it"
                )
        extra = [name for name in ("extra_conditioning_channels", "extra_condition_channels") if net.config.get(name)]
        if extra:
            raise ValueError(
                f"control {item.name!r} takes {net.config[extra[0]]} channels besides an image's, for an inpainting mask: "
                f"a stream gives images only"
            )
        if item.mode is not None and not getattr(net, "union", False):
            raise ValueError(f"control {item.name!r} is no union net and has no mode {item.mode!r}")
        for name in ("dtype", "device"):
            if getattr(net, name) != getattr(network, name):
                raise ValueError(
                    f"control {item.name!r} is in {name} {getattr(net, name)}, the network in {getattr(network, name)}: "
                    f"move it first, net.to({getattr(network, name)!r})"
                )
        for other in others:
            if self.depth(other.net) != self.depth(net):
                raise ValueError(
                    f"control {item.name!r} has {self.depth(net)} blocks and {other.name!r} {self.depth(other.net)}: their "
                    f"residuals cannot be added block by block"
                )

    def depth(self, net: nn.Module) -> tuple[int, ...]:
        """How many residuals of each kind a net gives."""
        return tuple(len(getattr(net, name)) for name in self.blocks)


@dataclass(frozen=True, eq=False)
class Controls:
    """The control nets in force, in the order in which their residuals are added."""

    rule: ControlRule
    items: tuple[Control, ...]

    def levels(self, timesteps: Tensor, scales: Mapping[str, float]) -> Tensor:
        """The table `control_levels` for these stages, on the CPU."""
        return torch.tensor([(scales[item.name], *item.window(timesteps)) for item in self.items], dtype=torch.float32)


class ControlledVelocity(nn.Module):
    """A velocity module whose network gets the nets' residuals. Without `control_levels` it is the velocity alone."""

    def __init__(self, velocity: nn.Module, controls: Controls):
        super().__init__()
        self.velocity = velocity
        self.nets = nn.ModuleList(item.net for item in controls.items)
        self.controls = controls

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        plain = {name: value for name, value in cond.items() if not name.startswith(PREFIX)}
        if LEVELS not in cond:
            return self.velocity(x, t, **plain)
        seen = {**plain, **{name.removeprefix(LENT): value for name, value in cond.items() if name.startswith(LENT)}}
        total: Residuals = {}
        for i, (item, (scale, highest, lowest)) in enumerate(zip(self.controls.items, cond[LEVELS].unbind(), strict=True)):
            by_row = torch.where((t <= highest) & (t >= lowest), scale, 0.0)
            one = self.controls.rule.call(item, x, t, cond[image_name(i)], seen)
            one = {name: _times(value, by_row) for name, value in one.items()}
            total = {name: _plus(total[name], value) for name, value in one.items()} if total else one
        return self.velocity(x, t, **plain, **total)


def _plus(a: Any, b: Any) -> Any:
    """Two nets' residuals together; what is no residual is the same in both."""
    if isinstance(a, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    return a + b if isinstance(a, Tensor) else a


def _times(value: object, scale: Tensor) -> Any:
    """Residuals `[rows, ...]`, one or a list, times float32 `[rows]`, in their own dtype: the same bits as with a number."""
    if isinstance(value, (list, tuple)):
        return [_times(one, scale) for one in value]
    return times(value, scale) if isinstance(value, Tensor) else value


def controlled(plain: Prompt, images: Mapping[str, Tensor], levels: Tensor, lends: tuple[str, ...]) -> Prompt:
    """A prompt with one frame's inputs of the control nets, `[1, ...]` each, and the table `control_levels`."""

    def add_control(cond: Cond, prompt: Prompt) -> Cond:
        lent = {} if prompt.uncond is None else {name: prompt.cond.rows[name] for name in lends if name in prompt.cond.rows}
        return cond.with_tensors({**images, **{f"{LENT}{name}": value for name, value in lent.items()}}, {LEVELS: levels})

    return extended(plain, add_control)
