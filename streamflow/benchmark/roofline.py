"""The roofline: how many pictures a second there would be if the device did nothing but multiply matrices for them, at the
rate that it reaches on large ones."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamflow.benchmark.subject import Subject
from streamflow.benchmark.timing import Spread, timed, wait

SIDE = {"cuda": 8192}  # of the matrices; large enough that launches and edges do not count
SIDE_ELSEWHERE = 1024
ROUNDS, CALLS = 7, 5


def matrix_rate(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Floating-point operations a second of a square matrix product, warm: median, least and most over rounds."""
    side = SIDE.get(device.type, SIDE_ELSEWHERE)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    for _ in range(CALLS):
        multiply()
    wait(device)
    rates = [2 * side**3 / timed(multiply, CALLS, device).mean for _ in range(ROUNDS)]
    return {"flops_per_s": vars(Spread.of(rates)), "side": side, "dtype": str(dtype).removeprefix("torch.")}


def flops(subject: Subject, tiny: bool) -> dict[str, float]:
    """What one picture of the denoising batch takes of the network and of the decoder. Counted from shapes: nothing is
    computed, attention counts as its two matrix products, and what is not a matrix product or a convolution as nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with subject.stream(tiny) as stream:
        counted = {}
        for part in (stream.parts().velocity, stream.parts().decoder):
            counter = FlopCounterMode(display=False)
            with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter:
                part.call()
            counted[part.name] = counter.get_total_flops() / stream.frame_bff_size
    return {"network": counted["velocity"], "decoder": counted["decoder"]}
