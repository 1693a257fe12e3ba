"""Frames on several devices in turn: each has a copy of the network and a complete ring. It is for small networks, which
gain little where devices share the rows of each step.

    interleave(stream, ["cuda:0", "cuda:1"])

Each frame is computed as on one device, with the same rows. An image leaves after S N calls, S stages on N devices, in the
place of S. The rings are `streamflow.stream.interleaved`; here are the copies of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamflow.acceleration.side_streams import side_stream
from streamflow.parallel.replicas import Devices, current
from streamflow.parallel.rows import NetworkCopies, copy_network

if TYPE_CHECKING:
    from streamflow.pipeline import StreamFlow


class InterleavedVelocity(NetworkCopies):
    """A network and its copies on devices that take frames in this order. Made by `interleave`."""

    made_by = "interleave(stream, devices)"

    def __init__(self, source: nn.Module, replicas: Sequence[nn.Module], devices: Sequence[torch.device]):
        super().__init__(source, replicas, devices)
        self._streams = _Streams()

    @property
    def interleaved(self) -> tuple[torch.device, ...]:
        """`devices`, by which a stream knows that it draws on them in turn."""
        return self.devices

    def inputs_of(self, index: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of one replica, on its device."""
        return {name: value.to(self.devices[index]) for name, value in inputs.items()}

    def on(self, index: int) -> Callable[..., Tensor]:
        """A replica, for inputs on its device."""
        return partial(self._call, index)

    @contextmanager
    def lane(self, index: int, home: torch.device, joined: bool) -> Iterator[None]:
        """With CUDA streams of one replica as the current ones on its device and, for copies, on home. They wait for what is
        queued on the streams that were current. joined: those then wait for what is queued here."""
        device = self.devices[index]
        here = {one: self._streams.get(index, one) for one in (home, device) if one.type == "cuda"}
        before = {one: torch.cuda.current_stream(one) for one in here}
        for stream in here.values():
            for one in before.values():
                stream.wait_stream(one)
        try:
            with ExitStack() as stack:
                for stream in here.values():
                    stack.enter_context(torch.cuda.stream(stream))
                yield
        finally:
            if joined:
                for one, stream in here.items():
                    before[one].wait_stream(stream)

    @torch.no_grad()
    def _call(self, index: int, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self._weights.update()
        return self.replicas[index](x, t, **cond)

    def start(self, inputs: Mapping[str, Tensor]) -> None:
        """Run every replica once."""
        for index, device in enumerate(self.devices):
            with current(device):
                self._call(index, **self.inputs_of(index, inputs))

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """The velocity by the first replica, of inputs on any device, which the result is on too."""
        with self.lane(0, x.device, True), current(self.devices[0]):
            return self._call(0, **self.inputs_of(0, {"x": x, "t": t, **cond})).to(x.device)


class _Streams:
    """The CUDA streams of the replicas, by the index of a replica and a device."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.device], torch.cuda.Stream] = {}

    def get(self, index: int, device: torch.device) -> torch.cuda.Stream:
        """The stream of a replica on a device."""
        if (index, device) not in self._made:
            self._made[index, device] = side_stream(self, device)
        return self._made[index, device]


def interleave(stream: StreamFlow, devices: Devices = "all") -> InterleavedVelocity:
    """Draw the frames of a stream on several devices in turn, in place. `stream.accelerate` then accelerates every copy, and
    `shard_vae` spreads the decoding. `stream.velocity = interleaved.source`, or assigning `stream.unet`, ends it.

    What updates change, and for which steps of which frames, is as on one device; `flush` and `reset` act on all devices. A
    call `stream(image)` returns the image of S N calls before. With `feedback` a frame needs the last one, so it is refused.

    Args:
        stream: a `StreamFlow` without frames in flight.
        devices: "all" (every GPU, or the stream's own device where there is none), or a list such as `["cuda:0", "cuda:1"]`.
            A device may occur several times.

    Raises:
        TypeError, ValueError: a device is unknown or missing; the network is offloaded; the stream uses `feedback`.
        RuntimeError: frames are in flight.
        MemoryError: a device has too little free memory, with the numbers. The stream stays as it was.
    """
    stream.adapter.check_offers("interleave")
    if stream.prepared and stream.requested().request.feedback:
        raise ValueError("interleave draws frames that do not wait for each other: update(feedback=0) first")
    if stream.prepared and stream.calls_behind:
        raise RuntimeError(f"{stream.calls_behind} groups of frames are in flight: flush() or reset() before interleave()")
    stream.velocity = interleaved = InterleavedVelocity(*copy_network(stream, devices))
    return interleaved
