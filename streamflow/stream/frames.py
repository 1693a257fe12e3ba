"""Frames with an identity: which output belongs to which input, in which order, and how long it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamflow.conditioning.image_prompt import ImagePromptArgument
from streamflow.conditioning.prompt import Prompt
from streamflow.image_utils import ControlArgument, Images, ReferenceArgument

if TYPE_CHECKING:
    from streamflow.models.codec import Decode
    from streamflow.models.protocols import Arguments, Call
    from streamflow.stream.ring import Done


@dataclass(frozen=True, eq=False)
class Frame:
    """One finished image. `id` counts the inputs from 0; `image` `[3, H, W]` in [-1, 1]; `latency_s` is host time from
    input to enqueued output; `skipped` says that the similarity filter skipped this input, and the image is that of
    the frame it resembles."""

    id: int
    image: Tensor
    latency_s: float
    skipped: bool
    _x0: Tensor = field(repr=False)
    _event: torch.cuda.Event | None = field(default=None, repr=False)

    @property
    def latent(self) -> Tensor:
        """A copy of the clean latent that the image was decoded from, as the pipeline's `output_type="latent"` gives that of
        one image, without the dimension of the batch."""
        return self._x0.clone()

    def ready(self) -> bool:
        """Whether the device has finished the image."""
        return self._event is None or self._event.query()

    def wait(self) -> Frame:
        """Wait for the device to finish the image."""
        if self._event is not None:
            self._event.synchronize()
        return self


@dataclass(frozen=True, eq=False)
class Input:
    """An input of `StreamFlow.frames` that is more than an image: what `stream(image, ...)` takes, by the same names."""

    image: Images | None = None
    mask: Images | None = None
    control: ControlArgument | None = None
    reference: ReferenceArgument | None = None
    image_prompt: ImagePromptArgument | None = None

    @property
    def conditions(self) -> Call:
        """What it brings beside its image, by the names of conditioners."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "image"}


@dataclass(frozen=True, eq=False)
class Waiting:
    """A frame that waits for its group: its image `[1, 3, H, W]`, prompt, and entries by the names of conditioners."""

    id: int
    image: Tensor | None
    prompt: Prompt
    conditions: Arguments


@dataclass(frozen=True)
class _Input:
    id: int
    source: int
    since: float


class Order:
    """Matches images with the inputs that wait for them. `expect` in input order, `decoding` in any, `ready` in order."""

    def __init__(self) -> None:
        self._inputs: deque[_Input] = deque()
        self._decoding: deque[tuple[Done, Decode]] = deque()
        self._arrived: deque[Done] = deque()  # decoded, and none of their frames given
        self._images: dict[int, tuple[Tensor, Tensor, torch.cuda.Event | None]] = {}

    def expect(self, frame_id: int, source: int) -> None:
        """Add an input. Its image is that of frame `source`: the input's own frame, unless it was skipped."""
        self._inputs.append(_Input(frame_id, source, time.perf_counter()))

    @property
    def undecoded(self) -> list[Done]:
        """The groups without images yet, oldest first."""
        return [group for group, _ in self._decoding]

    @property
    def undelivered(self) -> list[Done]:
        """The groups of which no frame has been given, oldest first."""
        return [*self._arrived, *self.undecoded]

    def decoding(self, group: Done, decoding: Decode) -> None:
        """Add a group that is being decoded, to images `[>= len(ids), 3, H, W]`; rows beyond the ids are padding."""
        self._decoding.append((group, decoding))

    def ready(self, most: int = 0, copies: bool = False) -> Iterator[Frame]:
        """The frames whose turn it is, waiting only for those beyond `most` that are still in flight. An image is dropped
        when no later input can refer to it. `copies`: later inputs may, so that each frame gets an image of its own."""
        failed = None
        while self._decoding and (len(self._decoding) > most or self._decoding[0][1].done()):
            group, decoding = self._decoding[0]
            try:
                self._arrive(group, decoding.result())
            except BaseException as error:  # after the frames that came before; the group stays undecoded
                failed = error
                break
            self._arrived.append(self._decoding.popleft()[0])
        while self._inputs and self._inputs[0].source in self._images:
            waiting = self._inputs.popleft()
            while self._arrived and self._arrived[0].ids[0] <= waiting.id:
                self._arrived.popleft()
            for old in [i for i in self._images if i < waiting.source]:
                del self._images[old]
            image, x0, event = self._images[waiting.source]
            if copies or waiting.id != waiting.source:
                image = image.clone()
                event = _event(image)
            latency = time.perf_counter() - waiting.since
            yield Frame(waiting.id, image, latency, waiting.id != waiting.source, x0, event)
        if failed is not None:
            raise failed

    def _arrive(self, group: Done, images: Tensor) -> None:
        event = _event(images)
        for frame_id, image, x0 in zip(group.ids, images, group.x0, strict=False):
            self._images[frame_id] = (image, x0, event)


def _event(images: Tensor) -> torch.cuda.Event | None:
    if images.device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(images.device))
    return event
