"""What a caller asked of a stream, and a change of it on its way to the ticking thread. Plain immutable values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from streamflow.blending import METHODS, as_weighted, check_sum, with_weights
from streamflow.conditioning import Prompt
from streamflow.guidance import Weight
from streamflow.noise import NoiseSource, check_policy
from streamflow.schedule import Schedule, Stages

SCOPES = (None, "now", "frame")


@dataclass(frozen=True)
class Request:
    """The arguments of `prepare`, as they stand after any `update`. `arguments` are the pipeline's own, by name.

    Raises:
        TypeError, ValueError: where made, for a value that no pipeline takes, with the value and the remedy.
    """

    prompt: str | Sequence[tuple[str, float]] | None
    negative_prompt: str | Sequence[tuple[str, float]] | None = ""
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    delta: float = 1.0
    t_index_list: tuple[int, ...] | None = None
    strength: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    blend: str = "linear"
    normalize: bool = True
    noise: str = "fixed"
    noise_period: int = 30
    feedback: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = as_weighted(name, getattr(self, name), str, "'a cat'")
            _check_text(name, text)
            if not self.normalize:
                check_sum(name, text)
            object.__setattr__(self, name, text)
        if self.blend not in METHODS:
            raise ValueError(f"unknown blend {self.blend!r}: choose one of {', '.join(map(repr, METHODS))}")
        if self.prompt is None and "prompt_embeds" not in self.arguments:
            raise ValueError("pass a prompt, or prompt_embeds made by the pipeline's encode_prompt")
        if self.prompt is not None and "prompt_embeds" in self.arguments:
            raise ValueError("pass a prompt or prompt_embeds, not both")
        steps = self.num_inference_steps
        if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
            raise ValueError(f"num_inference_steps must be an integer of 1 or more, not {steps!r}")
        for name in ("guidance_scale", "delta", "strength"):
            check_number(name, getattr(self, name))
        if self.delta is None:
            raise TypeError("delta must be a number, not None: 1.0 leaves guidance as it is")
        check_policy(self.noise, self.noise_period)
        check_feedback(self.feedback)

    @property
    def period(self) -> int | None:
        """Frames from one noise to the next; None where each draw stands by itself."""
        return self.noise_period if self.noise == "interpolated" else None

    def changed(self, changes: Mapping[str, Any], arguments: Mapping[str, Any]) -> Request:
        """This request with some fields replaced. A new text drops the embeddings that stood for the old one."""
        kept, changes = dict(self.arguments), dict(changes)
        if "prompt_weights" in changes:
            prompt = as_weighted("prompt", changes.get("prompt", self.prompt), str, "'a cat'")
            changes["prompt"] = with_weights("prompt", prompt, changes.pop("prompt_weights"))
        for text, start in (("prompt", ("prompt_embeds", "pooled_prompt_embeds")), ("negative_prompt", ("negative_",))):
            if text in changes:
                kept = {name: value for name, value in kept.items() if not name.startswith(start)}
        if "prompt_embeds" in arguments:
            changes = {"prompt": None, **changes}
        return replace(self, **changes, arguments={**kept, **arguments})

    def read_key(self, weight_name: str) -> tuple:
        """What the pipeline must be asked about again when it changes; the guidance weight, known as `weight_name`, is
        not among it."""
        arguments = {name: value for name, value in self.arguments.items() if name != weight_name}
        scale = None if weight_name == "guidance_scale" else self.guidance_scale
        how = self.blend, self.normalize
        return self.prompt, self.negative_prompt, how, self.num_inference_steps, scale, arguments


def same_key(a: tuple, b: tuple) -> bool:
    """Whether two read keys are equal; tensors only where they are the same object."""
    if a[:-1] != b[:-1] or a[-1].keys() != b[-1].keys():
        return False
    return all(x is b[-1][name] or _equal_plain(x, b[-1][name]) for name, x in a[-1].items())


def _equal_plain(a: Any, b: Any) -> bool:
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and (a == b) is True


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a request came to: the schedule, the stages picked from it, the prompt's cond, the pipeline's guidance_scale,
    the guidance weight in force, and noise."""

    request: Request
    schedule: Schedule
    stages: Stages
    prompt: Prompt
    guidance_scale: float
    weight: Weight
    noise: NoiseSource


@dataclass(frozen=True, eq=False)
class Change:
    """An update on its way, made and checked in the caller's thread: what the stream is to be, which of the prompt's
    tensors rows under way take too, and whether they take the new noise levels."""

    target: Prepared
    entries: frozenset[str] = frozenset()
    levels_now: bool = False

    def spares_waiting(self, before: Prepared) -> bool:
        """Whether frames that have come in, but wait for their group to be full, stay as they are."""
        now, then = self.target, before
        kept = (now.request.noise, now.request.feedback) == (then.request.noise, then.request.feedback)
        return kept and not self.entries and now.noise is then.noise and now.stages is then.stages


def check_number(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless value is a finite number or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")


def check_feedback(value: Any) -> None:
    """TypeError or ValueError unless value is a number, 0 or more and below 1."""
    check_number("feedback", value)
    if value is None or not 0 <= value < 1:
        raise ValueError(f"feedback must be 0 or more and below 1, where no input would be left, not {value!r}")


def _check_text(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, (str, tuple)):
        raise TypeError(f"{name} must be a string or a list of (string, weight), not {type(value).__name__} {value!r}")
