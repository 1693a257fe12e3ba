"""Checks that the values of images are in their range, which never wait for a GPU."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from streamflow.image_utils import check_extremes


class OnItsWay:
    """A tensor on a GPU that is copied to the host without a wait."""

    def __init__(self, value: Tensor) -> None:
        self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        self._event = torch.cuda.current_stream(value.device).record_event()

    def arrived(self) -> bool:
        """Whether the host has it."""
        return self._event.query()

    def value(self) -> Tensor:
        """The value on the host; waits for it."""
        self._event.synchronize()
        return self._host


@dataclass(frozen=True)
class _Pending:
    """A check of an image: its least and greatest value, and the range that they are to be in."""

    what: str
    low: float
    high: float
    extremes: OnItsWay


class RangeChecks:
    """Checks of images that are on a GPU, without a wait: least and greatest value are computed on the device and copied
    beside the frame, and `raise_failed` looks at those that have arrived. Images on the CPU are checked at once."""

    def __init__(self) -> None:
        self.pending: deque[_Pending] = deque()

    def add(self, what: str, image: Tensor, low: float, high: float) -> None:
        """Check an image, `what` in the error's words. ValueError at once if it is on the CPU."""
        extremes = torch.stack(image.as_subclass(Tensor).aminmax()).float()
        if image.device.type != "cuda":
            return check_extremes(extremes.tolist(), low, high, what)
        self.pending.append(_Pending(what, low, high, OnItsWay(extremes)))

    def raise_failed(self, wait: bool = False) -> None:
        """ValueError for the oldest image whose values have arrived and are out of range, once for each; `wait` for all."""
        while self.pending and (wait or self.pending[0].extremes.arrived()):
            one = self.pending.popleft()
            check_extremes(one.extremes.value().tolist(), one.low, one.high, one.what)

    def clear(self) -> None:
        """Forget all checks that are pending."""
        self.pending.clear()
