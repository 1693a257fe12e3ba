"""A viewer's messages, parsed and checked field by field. Knows no stream."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_core import from_json

from streamflow._files import Json
from streamflow._validation import Section

MAX_TEXT = 500
MAX_SEED = 2**32 - 1
MAX_NUMBER = 2**53 - 1  # the largest integer that every number of JavaScript below is exact to


class DrawRequest(Section):
    """All settings of a viewer. blend: the share of `other` in the prompt. negative: what not to draw; needs guidance.
    show_control: whether the control image is sent with each image."""

    mode: Literal["text", "image"] = "text"
    model: str = Field(default="", max_length=100)
    prompt: str = Field(default="", max_length=MAX_TEXT)
    other: str = Field(default="", max_length=MAX_TEXT)
    negative: str = Field(default="", max_length=MAX_TEXT)
    blend: float = Field(default=0.0, ge=0, le=1)
    seed: int = Field(default=2, ge=0, le=MAX_SEED)
    steps: int = Field(default=4, ge=1, le=100)
    guidance: float = Field(default=2.0, ge=0, le=30)
    strength: float = Field(default=0.6, gt=0, le=1)
    motion: Literal["drift", "still", "fresh"] = "drift"
    running: bool = True
    show_control: bool = False

    @property
    def prompts(self) -> str | list[tuple[str, float]]:
        """The prompt as a stream takes it: one text, or two with their weights."""
        if not self.other.strip() or self.blend == 0:
            return self.prompt
        if self.blend == 1:
            return self.other
        return [(self.prompt, 1 - self.blend), (self.other, self.blend)]


class BadMessage(ValueError):
    """Raised for an invalid message, with the reason."""


def longer(text: str, most: int) -> bool:
    """Whether a text has more than `most` bytes in UTF-8."""
    return len(text) > most or len(text.encode("utf-8", "surrogatepass")) > most


def read(text: str) -> Json:
    """A message: a JSON object with a "type". BadMessage for anything else, NaN and endless nesting included."""
    try:
        message = from_json(text, allow_inf_nan=False)
    except ValueError:
        raise BadMessage("a message is one JSON object") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise BadMessage('a message is one JSON object with a "type"')
    return message


def number_of(message: Json) -> int | None:
    """The number that the answer to a message repeats. BadMessage: it is no integer that JavaScript has exactly."""
    number = message.get("number")
    if number is not None and not (isinstance(number, int) and abs(number) <= MAX_NUMBER):
        raise BadMessage(f"number: an integer of at most {MAX_NUMBER}")
    return number


def changed(
    request: DrawRequest, fields: object, models: tuple[str, ...], max_steps: int, control: bool = False
) -> DrawRequest:
    """The request with these fields replaced. control: whether a control net steers all images. BadMessage lists every
    mistake; the request stays as it was."""
    if not isinstance(fields, dict):
        raise BadMessage("settings are an object of names and values")
    try:
        data = json.dumps({**request.model_dump(), **fields}, ensure_ascii=True)
        new = DrawRequest.model_validate_json(data)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, one['loc']))[:60]}: {one['msg']}" for one in error.errors(include_url=False)[:8]]
        raise BadMessage("; ".join(mistakes)) from None
    except (ValueError, RecursionError):
        raise BadMessage("settings hold something that is not a JSON value") from None
    if new.model not in models:
        raise BadMessage(f"model: choose one of {', '.join(models)}")
    if new.steps > max_steps:
        raise BadMessage(f"steps: {new.steps} is above {max_steps}")
    if control and new.mode == "text":
        raise BadMessage("mode: control images are made from images: choose image")
    if new.show_control and not control:
        raise BadMessage("show_control: this server draws without a control net")
    return new
