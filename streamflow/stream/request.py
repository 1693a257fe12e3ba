"""The request of a caller, what it is planned to, and a change that waits for the drawing thread. Plain immutable values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamflow._validation import check_bool, check_number, whole_number
from streamflow.conditioning.blending import METHODS, as_weighted, check_sum, with_weights
from streamflow.conditioning.prompt import Prompt
from streamflow.conditioning.reference import FixedReferences
from streamflow.flow.guidance import Mode, Weight, mode
from streamflow.flow.noise import NoiseSource, check_policy
from streamflow.flow.schedule import Schedule, Stages
from streamflow.models.probe import PLAIN

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments

SCOPES = (None, "now", "frame")
Texts = str | Sequence[tuple[str, float]]
Seeds = int | Sequence[tuple[int, float]]
AssignedEmbeds = tuple[Tensor | None, Tensor | None]


class NotPreparedError(RuntimeError, AttributeError):
    """A stream has nothing to draw yet. An AttributeError too, so that `hasattr` and `getattr` with a default work on what
    is there only after `prepare`."""


@dataclass(frozen=True)
class Request:
    """The arguments of `prepare`, as they stand after any `update`. `arguments` are the pipeline's own, by name;
    `assigned_embeds` take the place of what the prompt and the negative prompt were encoded to. `references` are those of
    all frames; `reference_reuse` is how much a pixel of a reference may change without being computed anew.

    Raises:
        TypeError, ValueError: where made, for a value that no pipeline takes, with the value and the remedy.
    """

    prompt: Texts | None
    negative_prompt: Texts | None = ""
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    delta: float = 1.0
    t_index_list: tuple[int, ...] | None = None
    strength: float | None = None
    arguments: Arguments = field(default_factory=dict)
    blend: str = "linear"
    normalize: bool = True
    noise: str = "fixed"
    noise_period: int = 30
    feedback: float = 0.0
    cfg_type: str = "self"
    do_add_noise: bool = False
    assigned_embeds: AssignedEmbeds = (None, None)
    references: FixedReferences = FixedReferences()
    reference_reuse: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = as_weighted(name, _one_text(name, getattr(self, name)), str, "'a cat'")
            _check_text(name, text)
            if not self.normalize:
                check_sum(name, text)
            object.__setattr__(self, name, text)
        if self.blend not in METHODS:
            raise ValueError(f"unknown blend {self.blend!r}: choose one of {', '.join(map(repr, METHODS))}")
        embeds = _has_embeds(self.arguments)
        if self.prompt is None and not embeds:
            raise ValueError("pass a prompt, or prompt_embeds made by the pipeline's encode_prompt")
        if self.prompt is not None and embeds:
            raise ValueError("pass a prompt or prompt_embeds, not both")
        whole_number("num_inference_steps", self.num_inference_steps, 1)
        for name in ("guidance_scale", "delta", "strength"):
            check_number(name, getattr(self, name))
        if self.delta is None:
            raise TypeError("delta must be a number, not None: 1.0 leaves guidance as it is")
        check_policy(self.noise, self.noise_period)
        check_feedback(self.feedback)
        check_bool("do_add_noise", self.do_add_noise)
        check_number("reference_reuse", self.reference_reuse)
        if self.reference_reuse is not None and not 0 <= self.reference_reuse <= 2:
            raise ValueError(
                f"reference_reuse is a difference of pixels in [-1, 1], so 0 to 2, not {self.reference_reuse!r}"
            )

    @property
    def mode(self) -> Mode:
        """How rows are guided. ValueError for an unknown `cfg_type`."""
        return mode(self.cfg_type)

    @property
    def guided(self) -> bool:
        """Whether a negative prompt takes part."""
        return self.mode.extra_rows(1, 1) > 0

    @property
    def period(self) -> int | None:
        """Frames from one noise to the next; 0 where it stays; None where each draw stands by itself."""
        return {"interpolated": self.noise_period, "constant": 0}.get(self.noise)

    def changed(self, changes: Arguments, arguments: Arguments) -> Request:
        """This request with some fields replaced. A new text drops the embeddings that stood for the old one."""
        kept, changes = dict(self.arguments), dict(changes)
        if "prompt_weights" in changes:
            prompt = as_weighted("prompt", changes.get("prompt", self.prompt), str, "'a cat'")
            changes["prompt"] = with_weights("prompt", prompt, changes.pop("prompt_weights"))
        for text, start in (("prompt", ("prompt_", "pooled_prompt_")), ("negative_prompt", ("negative_",))):
            if text in changes:
                kept = {name: value for name, value in kept.items() if not name.startswith(start)}
        if _has_embeds(arguments):
            changes = {"prompt": None, **changes}
            kept = {name: value for name, value in kept.items() if name not in ("prompt_2", "prompt_3")}
        changes.setdefault("assigned_embeds", self._still_assigned({*changes, *arguments}))
        return replace(self, **changes, arguments={**kept, **arguments})

    def _still_assigned(self, names: set[str]) -> AssignedEmbeds:
        """The assigned embeddings, less those for which something else is given now."""
        positive = names & {"prompt", "prompt_embeds", "blend", "normalize"}
        negative = any(name.startswith("negative_prompt") for name in names)
        return None if positive else self.assigned_embeds[0], None if negative else self.assigned_embeds[1]

    def read_key(self, weight_name: str | None) -> tuple:
        """The fields that need new encoding when they change; the guidance weight, argument `weight_name`, is left out."""
        arguments = {name: value for name, value in self.arguments.items() if name != weight_name}
        scale = None if weight_name == "guidance_scale" else self.guidance_scale
        how = self.blend, self.normalize, self.guided
        return self.prompt, self.negative_prompt, how, self.num_inference_steps, scale, arguments


def same(a: object, b: object) -> bool:
    """Whether two arguments are equal: numbers, texts, tensors and arrays by their values, and lists and mappings of them.
    On a GPU the host waits for the answer."""
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (Tensor, np.ndarray)) or isinstance(b, (Tensor, np.ndarray)):
        return False
    return type(a) is type(b) and bool(a == b)


def owned(value: Any) -> Any:
    """A copy of a value, so that the caller may change the original: tensors, arrays, and the lists and mappings of them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(owned(one) for one in value)
    return {name: owned(one) for name, one in value.items()} if type(value) is dict else value


def is_plain(value: object) -> bool:
    """Whether the `repr` of an argument tells its value: no tensor, array or image is in it."""
    if isinstance(value, (list, tuple, Mapping)):
        return all(is_plain(one) for one in (value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, PLAIN)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A planned request: the schedule and its stages, the encoded prompt, the scale, the weight in force, and the noise."""

    request: Request
    schedule: Schedule
    stages: Stages
    prompt: Prompt
    guidance_scale: float
    weight: Weight
    noise: NoiseSource


@dataclass(frozen=True, eq=False)
class Change:
    """An update that waits for the drawing thread. target: what the stream draws afterwards. entries: the names of the
    prompt's tensors that rows in flight take too. levels_now: rows in flight take the new noise levels."""

    target: Prepared
    entries: frozenset[str] = frozenset()
    levels_now: bool = False

    def spares_waiting(self, before: Prepared) -> bool:
        """Whether this update leaves frames unchanged that wait for their group to be full."""
        now, then = self.target, before
        kept = all(getattr(now.request, name) == getattr(then.request, name) for name in _OF_ENTERING)
        return kept and not self.entries and now.noise is then.noise and now.stages is then.stages


_OF_ENTERING = ("noise", "feedback", "cfg_type", "do_add_noise", "references")  # what decides how a frame enters


def _has_embeds(arguments: Arguments) -> bool:
    """Whether a prompt is given as embeddings, under whatever name of the pipeline."""
    return any(name.startswith("prompt_embeds") and value is not None for name, value in arguments.items())


def _one_text(name: str, value: object) -> Any:
    """A text out of a list of one, as diffusers takes it. TypeError for a list of several texts."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, str) for one in value):
        return value
    if len(value) == 1:
        return value[0]
    raise TypeError(
        f"{name} as a list holds pairs such as ('a cat', 0.5), which are blended, and here it holds {len(value)} texts: "
        f"to draw one frame of each, call stream.update_prompt(text, scope='frame') before each input of stream.frames"
    )


def check_feedback(value: Any) -> None:
    """TypeError or ValueError unless value is a number, 0 or more and below 1."""
    check_number("feedback", value)
    if value is None or not 0 <= value < 1:
        raise ValueError(f"feedback must be 0 or more and below 1, where no input would be left, not {value!r}")


def _check_text(name: str, value: object) -> None:
    if value is not None and not isinstance(value, (str, tuple)):
        raise TypeError(f"{name} must be a string or a list of (string, weight), not {type(value).__name__} {value!r}")
    for text in [value] if isinstance(value, str) else [text for text, _ in value or ()]:
        if half := re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"{name} has half of a surrogate pair, {half[0]!r} at {half.start()}, which is no character: {text!r}"
            )
