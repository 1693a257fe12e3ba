"""What leaves a stream: finished groups become images, frames like the last one are skipped, and calls are timed."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamflow.image_filter import SimilarImageFilter
from streamflow.stream.callbacks import Callbacks
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.image_checks import HostCopy
from streamflow.stream.model import Model
from streamflow.stream.ring import Done, Group

if TYPE_CHECKING:
    from streamflow.models.codec import Decode

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Finishing:
    """A decode that has been started. `result` applies `finish` to its images."""

    decoding: Decode
    finish: Callable[[Tensor], Tensor]

    def done(self) -> bool:
        """Whether the images are ready."""
        return self.decoding.done()

    def result(self) -> Tensor:
        """The images. Waits until they are ready."""
        return self.finish(self.decoding.result())


class Outputs:
    """Decodes groups and returns images.

    similar_filter: decides which image frames are skipped, where `similar_image_filter` is on. prev_image_result: the
    images that the last call returned, which a skipped call returns again. timer: of calls. decode_image: what decodes
    latents in the place of the codec, where a subclass or a program has replaced `StreamFlow.decode_image`. on_redraw:
    functions that `redraw` calls.
    """

    def __init__(self, model: Model, denoiser: Denoiser) -> None:
        self._model, self._denoiser = model, denoiser
        self.similar_filter = SimilarImageFilter()
        self.similar_image_filter = False
        self.prev_image_result: Tensor | None = None
        self.decode_image: Callable[[Tensor], Tensor] | None = None
        self.finite = FiniteCheck()
        self.timer = CallTimer(model.device)
        self.on_redraw = Callbacks()
        denoiser.on_empty.add(self._clear)

    def decode(self, done: Done) -> Tensor:
        """The images of a group, `[F, 3, H, W]` in [-1, 1]."""
        images = (self.decode_image or self._model.codec.decode)(done.x0)
        return images if done.finish is None else done.finish(images)

    def decode_later(self, done: Done) -> Decode:
        """Start what `decode` does, without waiting for the images (`Codec.decode_later`)."""
        decoding = self._model.codec.decode_later(done.x0)
        return decoding if done.finish is None else Finishing(decoding, done.finish)

    def enter(self, group: Group) -> Tensor:
        """Let a group enter, and return the images of the oldest group. Copies of the group fill an empty ring. A group that
        was finished before is decoded first, and if that fails, nothing enters."""
        denoiser = self._denoiser
        done = denoiser.oldest()
        images = None if done is None else self.decode(done)
        denoiser.tick(group)
        while done is None or images is None:
            done = denoiser.oldest()
            if done is None:
                denoiser.tick(replace(group, copy=True))
            else:
                images = self.decode(done)
        denoiser.hand_out([done])
        return images

    def show(self, images: Tensor) -> Tensor:
        """Return these images. Where the filter is on, keep a copy of finite ones for calls that skip a frame."""
        finite = self.count_finite(images)
        if not self.similar_image_filter:
            self.prev_image_result = images
            if self.similar_filter.prev_tensor is not None:
                self.similar_filter.forget()  # its last frame is older than these images
            return images
        last = self.prev_image_result
        if last is None or last.shape != images.shape:
            last = torch.zeros_like(images)
        self.prev_image_result = torch.where(finite, images, last.to(images))
        return images

    def count_finite(self, images: Tensor) -> Tensor:
        """Count the images that hold NaN or infinite values, log the first, and return whether all are finite, a scalar."""
        counted, finite = self.finite.known, self.finite.add(images)
        if self.finite.known > counted:
            self.similar_filter.forget()  # no frame may be skipped for resembling such an image's frame
            if not counted:
                logger.warning(
                    "images with NaN or infinite values are drawn; not_finite counts them. Look at the weights and the "
                    "dtype: float16 overflows in some VAEs and text encoders, where bfloat16 and float32 do not"
                )
        return finite

    @property
    def not_finite(self) -> int:
        """How many images held NaN or infinite values, counted without waiting: on a GPU a call or two later."""
        return self.finite.read()

    def skips(self, compared: Tensor | None) -> bool:
        """Whether these frames are skipped because they resemble the last frames that were drawn. None: they cannot be
        compared, and are drawn."""
        if compared is None:
            self.similar_filter.forget()
        return compared is not None and self.similar_filter(compared) is None

    def enable_filter(self, threshold: float = 0.98, max_skip_frame: float = 10) -> None:
        """Skip image frames that resemble the last drawn frame, at most `max_skip_frame` in a row."""
        SimilarImageFilter(threshold, max_skip_frame)  # both are checked before either is set
        self.similar_filter.set_threshold(threshold)
        self.similar_filter.set_max_skip_frame(max_skip_frame)
        self.similar_filter.forget()
        self.similar_image_filter = True

    def redraw(self) -> None:
        """Skip no frame until the frames that enter from now on have left. Called when what is drawn has changed."""
        self.similar_filter.forget(self._denoiser.stages * self._model.frames)
        self.on_redraw()

    def _clear(self) -> None:
        self.similar_filter.reset()
        self.prev_image_result = None


class CallTimer:
    """A moving average of the seconds of a call. It never waits: on CUDA it reads the events of calls that have finished."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=8)
        self.average = 0.0

    def start(self) -> float | torch.cuda.Event:
        """Start timing a call. Returns the argument of `stop`."""
        return self._record() if self._cuda else time.perf_counter()

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, began: float | torch.cuda.Event) -> None:
        """Add the call that `start` began to the average."""
        if isinstance(began, (int, float)):
            self.average = 0.9 * self.average + 0.1 * (time.perf_counter() - began)
            return
        self._pending.append((began, self._record()))
        while self._pending and self._pending[0][1].query():
            first, last = self._pending.popleft()
            self.average = 0.9 * self.average + 0.1 * first.elapsed_time(last) / 1000


class FiniteCheck:
    """Counts images that hold NaN or infinite values, without waiting: on a GPU they are counted on the device, and the
    number is read when it has arrived on the host. Each device has a count of its own, so that none waits for another."""

    def __init__(self) -> None:
        self.known = 0  # how many have arrived on the host
        self._reading = threading.Lock()  # statistics are read in other threads
        self._totals: dict[torch.device, Tensor] = {}
        self._copies: dict[torch.device, HostCopy] = {}
        self._arrived: dict[torch.device, int] = {}

    def add(self, images: Tensor) -> Tensor:
        """Count the images `[n, ...]` that are not finite. Returns whether all are finite, a scalar on their device."""
        bad, device = (~torch.isfinite(images)).flatten(1).any(1).sum(), images.device
        if device.type != "cuda":
            self.known += int(bad)
            return bad == 0
        self._totals[device] = self._totals[device] + bad if device in self._totals else bad
        self.read()
        if device not in self._copies:
            copy = HostCopy(self._totals[device])
            with self._reading:
                self._copies[device] = copy
        return bad == 0

    def read(self) -> int:
        """`known`, updated by the numbers that have arrived since."""
        with self._reading:
            for device in [one for one, copy in self._copies.items() if copy.arrived()]:
                total = int(self._copies.pop(device).value())
                self.known += total - self._arrived.get(device, 0)
                self._arrived[device] = total
        return self.known
