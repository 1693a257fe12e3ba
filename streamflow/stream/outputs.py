"""What leaves: finished groups become images, images like the last one are skipped, and calls are timed. Knows no engine."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamflow.image_filter import SimilarImageFilter
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.image_checks import OnItsWay
from streamflow.stream.model import Model
from streamflow.stream.ring import Done, Group

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Finishing:
    """A decode that has been started (`Codec.decode_later`), to whose images `finish` is applied when they are asked for."""

    decoding: Any
    finish: Callable[[Tensor], Tensor]

    def done(self) -> bool:
        """Whether the images are there."""
        return self.decoding.done()

    def result(self) -> Tensor:
        """The images, once they are there."""
        return self.finish(self.decoding.result())


class Outputs:
    """Decodes groups and hands images out.

    similar_filter: decides which image frames are skipped, where `similar_image_filter` is on. prev_image_result: the
    images that the last call returned, which a skipped call returns again. timer: of calls.
    """

    def __init__(self, model: Model, denoiser: Denoiser) -> None:
        self._model, self._denoiser = model, denoiser
        self.similar_filter = SimilarImageFilter()
        self.similar_image_filter = False
        self.prev_image_result: Tensor | None = None
        self.finite = FiniteCheck()
        self.timer = CallTimer(model.device)
        denoiser.on_empty.add(self._clear)

    def decode(self, done: Done) -> Tensor:
        """The images of a group, `[F, 3, H, W]` in [-1, 1]."""
        images = self._model.codec.decode(done.x0)
        return images if done.finish is None else done.finish(images)

    def decode_later(self, done: Done) -> Any:
        """As `decode`, started and not waited for (`Codec.decode_later`)."""
        decoding = self._model.codec.decode_later(done.x0)
        return decoding if done.finish is None else Finishing(decoding, done.finish)

    def enter(self, group: Group) -> Tensor:
        """The images of the oldest group once this one has entered, copies of which fill an empty ring. A group that is
        finished already is decoded first: where that fails, nothing enters."""
        denoiser = self._denoiser
        done = denoiser.oldest()
        images = None if done is None else self.decode(done)
        denoiser.tick(group)
        while done is None:
            done = denoiser.oldest()
            if done is None:
                denoiser.tick(replace(group, copy=True))
            else:
                images = self.decode(done)
        denoiser.hand_out([done])
        return images

    def show(self, images: Tensor) -> Tensor:
        """Return these images; where the filter is on, keep a copy for calls that skip, or the last one where these are not
        finite."""
        finite = self.count_finite(images)
        if not self.similar_image_filter:
            self.prev_image_result = images
            if self.similar_filter.prev_tensor is not None:
                self.similar_filter.forget()  # that image is not the one that it has seen last
            return images
        last = self.prev_image_result
        if last is None or last.shape != images.shape:
            last = torch.zeros_like(images)
        self.prev_image_result = torch.where(finite, images, last.to(images))
        return images

    def count_finite(self, images: Tensor) -> Tensor:
        """Count those of these images `[n, 3, H, W]` that hold NaN or infinite values. Whether all are finite, a scalar on
        their device. The first that is not is logged."""
        counted, finite = self.finite.known, self.finite.add(images)
        if self.finite.known > counted:
            self.similar_filter.forget()  # no call may skip for looking like the frame of such an image
            if not counted:
                logger.warning(
                    "images with NaN or infinite values are drawn; not_finite counts them. Look at the weights and the "
                    "dtype: float16 overflows in some VAEs and text encoders, where bfloat16 and float32 do not"
                )
        return finite

    @property
    def not_finite(self) -> int:
        """How many of the images that this stream has drawn held NaN or infinite values. Counted without a wait: on a GPU
        an image counts a call or two later."""
        return self.finite.read()

    def skips(self, compared: Tensor) -> bool:
        """Whether these frames are skipped for looking like the last that was drawn."""
        return self.similar_filter(compared) is None

    def enable_filter(self, threshold: float = 0.98, max_skip_frame: float = 10) -> None:
        """Skip image frames that look like the last drawn one; at most `max_skip_frame` in a row."""
        SimilarImageFilter(threshold, max_skip_frame)  # both are checked before either is set
        self.similar_filter.set_threshold(threshold)
        self.similar_filter.set_max_skip_frame(max_skip_frame)
        self.similar_filter.forget()
        self.similar_image_filter = True

    def redraw(self) -> None:
        """What is drawn has changed: no frame is skipped until those that enter from now on have left."""
        self.similar_filter.forget(self._denoiser.stages * self._model.frames)

    def _clear(self) -> None:
        self.similar_filter.reset()
        self.prev_image_result = None


class CallTimer:
    """A moving average of a call's seconds, without ever waiting: on CUDA it reads the events of calls that are over."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=8)
        self.average = 0.0

    def start(self) -> Any:
        """Note the begin of a call; the mark goes to `stop`."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, began: Any) -> None:
        """Add the call that began at this mark to the average."""
        if not self._cuda:
            self.average = 0.9 * self.average + 0.1 * (time.perf_counter() - began)
            return
        self._pending.append((began, self.start()))
        while self._pending and self._pending[0][1].query():
            first, last = self._pending.popleft()
            self.average = 0.9 * self.average + 0.1 * first.elapsed_time(last) / 1000


class FiniteCheck:
    """Counts images that hold NaN or infinite values, without a wait: on a GPU they are counted on the device, and the
    number is read when it has arrived."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._on_its_way: OnItsWay | None = None
        self.known = 0  # how many there were among the images whose number has arrived

    def add(self, images: Tensor) -> Tensor:
        """Count those of `images` `[n, ...]` that are not finite. Whether all are, a scalar on their device."""
        bad = (~torch.isfinite(images)).flatten(1).any(1).sum()
        self._total = bad if self._total is None else self._total.to(bad.device) + bad
        if bad.device.type != "cuda":
            self.known = int(self._total)
        else:
            self.read()
            self._on_its_way = self._on_its_way or OnItsWay(self._total)
        return bad == 0

    def read(self) -> int:
        """`known`, with what has arrived meanwhile."""
        if self._on_its_way is not None and self._on_its_way.arrived():
            self.known, self._on_its_way = int(self._on_its_way.value()), None
        return self.known
