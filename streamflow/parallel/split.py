"""Which way suits a stream on several devices: sharing the rows of every step, or whole frames in turn.

Frames in turn have the higher rate where a share of the rows takes nearly as long as all of them, as in small networks. Rows
have the lower latency: an image is S calls old when it leaves, of a share each, against S calls of all rows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Literal

from streamflow._grad_mode import computing
from streamflow._validation import check_number
from streamflow.acceleration import Part, first_call
from streamflow.models.protocols import Function
from streamflow.parallel.in_turn import interleave
from streamflow.parallel.replicas import Devices, resolve_devices
from streamflow.parallel.rows import NetworkCopies, ShardedVelocity, shard_denoiser

if TYPE_CHECKING:
    from streamflow.pipeline import StreamFlow

logger = logging.getLogger(__name__)
Split = Literal["rows", "frames"]
SPLITS: dict[Split, Function] = {"rows": shard_denoiser, "frames": interleave}
GAIN = 1.2  # times the rate of rows from which frames in turn are worth their latency
ROUNDS = 5


@dataclass(frozen=True)
class Costs:
    """Seconds of a call of the network, with all rows of a step and with one device's share of them."""

    devices: int
    whole: float
    share: float

    @property
    def rates(self) -> dict[Split, float]:
        """Ticks a second of each split, of the network alone."""
        return {"rows": 1 / self.share, "frames": self.devices / self.whole}

    def choose(self, target_rate: float | None = None) -> Split:
        """Rows where they hold the target rate, frames where only these do; otherwise frames where their rate is `GAIN`
        times that of rows."""
        rows, frames = self.rates["rows"], self.rates["frames"]
        if target_rate is not None and max(rows, frames) >= target_rate:
            return "rows" if rows >= target_rate else "frames"
        return "frames" if frames >= GAIN * rows else "rows"


@computing
def split_costs(stream: StreamFlow, count: int) -> Costs:
    """The costs of a prepared stream on so many devices, measured on its own by the network without acceleration."""
    plain = stream.adapter.velocity
    network = plain.source if isinstance(plain, NetworkCopies) else plain
    parts = stream.parts()
    assert parts is not None, "the stream is prepared"
    whole = parts.velocity
    shared, pairs = frozenset(stream.adapter.shared_inputs), stream.cfg_type == "full"
    alone = ShardedVelocity(network, [network] * count, [stream.device] * count, shared, pairs)
    share = replace(whole, inputs=alone.inputs_of(0, whole.inputs))

    def seconds(part: Part) -> float:
        """The median time of a call, after one for warm-up."""
        return median([first_call(part, partial(part.call, network)) for _ in range(ROUNDS + 1)][1:])

    return Costs(count, seconds(whole), seconds(share))


def spread(stream: StreamFlow, devices: Devices = "all", target_rate: float | None = None) -> Split:
    """Spread a prepared stream's network over devices by the split that suits it, in place, before `accelerate`. Returns the
    split.

    Both costs are measured on the stream's own device, without acceleration, and logged. Rows are taken where they hold the
    target rate, which suits the lower latency; otherwise the faster split. With `feedback`, or in a family that does not
    offer frames in turn, it is rows.

    Args:
        stream: a prepared `StreamFlow` without frames in flight.
        devices: as `shard_denoiser`'s.
        target_rate: ticks a second to hold, above 0; None: as many as possible.

    Raises:
        As `shard_denoiser` and `interleave`. RuntimeError: the stream is not prepared, or frames are in flight. ValueError:
        a target rate that is no positive number.
    """
    check_rate(target_rate)
    if behind := stream.calls_behind:
        raise RuntimeError(f"{behind} groups of frames are in flight: flush() or reset() before spread()")
    count = len(resolve_devices(devices, stream.device))
    if stream.requested().request.feedback or "interleave" in stream.adapter.lacks:
        split: Split = "rows"
    else:
        costs = split_costs(stream, count)
        split = costs.choose(target_rate)
        rates = ", ".join(f"{name} {rate:.1f}" for name, rate in costs.rates.items())
        logger.info("split by %s; ticks a second of the plain network on %d devices: %s", split, count, rates)
    SPLITS[split](stream, devices)
    return split


def check_rate(target_rate: float | None) -> None:
    """ValueError unless this is None or a positive number."""
    if target_rate is not None:
        check_number("target_rate", target_rate)
        if not target_rate > 0:
            raise ValueError(f"target_rate is images a second, above 0, not {target_rate!r}")
