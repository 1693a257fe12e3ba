"""The roofline: the images a second of a device that only multiplies matrices, at the rate that it reaches on large ones."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamflow._files import Json
from streamflow.benchmark.subject import Subject
from streamflow.benchmark.timing import Spread, timed, wait

SIDE = {"cuda": 8192}  # of the matrices, so large that launches and edges are negligible
SIDE_ELSEWHERE = 1024
ROUNDS, CALLS = 7, 5


def matrix_rate(device: torch.device, dtype: torch.dtype) -> Json:
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
    """The operations of one image of the denoising batch in the network and in the decoder. They are counted from shapes,
    without computing: matrix products, convolutions, and the two matrix products of attention."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with subject.stream(tiny) as stream:
        counted = {}
        parts = stream.parts()
        assert parts is not None, "the stream is prepared"
        for part in (parts.velocity, parts.decoder):
            counter = FlopCounterMode(display=False)
            with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter:
                part.call()
            counted[part.name] = counter.get_total_flops() / stream.frame_bff_size
    return {"network": counted["velocity"], "decoder": counted["decoder"]}
