"""Checks that the values of images are in their range, which never wait for a GPU."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from streamflow.image_utils import check_extremes


class HostCopy:
    """A copy of a GPU tensor to the host that does not wait."""

    def __init__(self, value: Tensor) -> None:
        self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        self._event = torch.cuda.current_stream(value.device).record_event()

    def arrived(self) -> bool:
        """Whether the copy is complete."""
        return self._event.query()

    def value(self) -> Tensor:
        """The tensor on the host. Waits until the copy is complete."""
        self._event.synchronize()
        return self._host


class RangeChecks:
    """Checks of images on a GPU, without waiting: the least and the greatest value are computed on the device and copied to
    the host, and `raise_failed` checks the values that have arrived. Images on the CPU are checked at once."""

    def __init__(self) -> None:
        self.pending: deque[tuple[HostCopy, float, float, str]] = deque()  # extremes, the range, the image's name

    def add(self, what: str, image: Tensor, low: float, high: float) -> None:
        """Check an image; `what` names it in the error. Raises ValueError at once if the image is on the CPU."""
        extremes = torch.stack(image.as_subclass(Tensor).aminmax()).float()
        if image.device.type != "cuda":
            return check_extremes(extremes.tolist(), low, high, what)
        self.pending.append((HostCopy(extremes), low, high, what))

    def raise_failed(self, wait: bool = False) -> None:
        """Raise ValueError for the oldest image with values out of range, once for each image. Only values that have arrived
        are checked; with `wait` all are."""
        while self.pending and (wait or self.pending[0][0].arrived()):
            extremes, low, high, what = self.pending.popleft()
            check_extremes(extremes.value().tolist(), low, high, what)

    def clear(self) -> None:
        """Forget all checks that are pending."""
        self.pending.clear()
