"""The variants that are compared, as a table of small functions. Each opens a `Way`, which returns images tick by tick. The
frames and their noise are the same in every variant, and the model does not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count, repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamflow._files import Json
from streamflow.benchmark.settings import Settings
from streamflow.benchmark.subject import Subject
from streamflow.image_utils import denormalize
from streamflow.pipeline import StreamFlow

if TYPE_CHECKING:
    from streamflow.parallel.replicas import Devices
    from streamflow.parallel.split import Split


@dataclass(frozen=True, eq=False)
class Way:
    """tick: returns the next `frames` images, `[frames, 3, H, W]` in [0, 1], from frame 0 on. depth: the ticks of an image.
    by_hand: makes the network's and the decoder's calls of one tick and nothing else. details: for the result."""

    tick: Callable[[], Tensor]
    frames: int = 1
    depth: int = 1
    by_hand: Callable[[], object] | None = None
    details: Json = field(default_factory=dict)


@contextmanager
def plain(subject: Subject, tiny: bool) -> Iterator[Way]:
    """The diffusers pipeline's own call, one image after another."""
    with subject.stream(tiny) as stream:
        pipe, ids = subject.with_vae(tiny), count()
        yield Way(lambda: subject.draw(pipe, stream.frame_noise(next(ids)), stream))


@contextmanager
def streamed(subject: Subject, kind: str, tiny: bool, batched: bool, anchored: bool = False) -> Iterator[Way]:
    """The stream, accelerated by `kind`. batched: with the denoising batch; otherwise the network runs at batch 1, step by
    step. anchored: under `cfg_type="self"` frames have an anchor, without which that guidance has no effect."""
    with subject.stream(tiny, batched) as stream:
        stream.accelerate(kind)
        yield Way(
            tick=with_anchors(stream) if anchored and stream.cfg_type == "self" else lambda: denormalize(stream.txt2img()),
            frames=stream.frame_bff_size,
            depth=subject.settings.steps if batched else 1,
            by_hand=by_hand(stream),
            details={"acceleration": stream.acceleration, "network_rows": stream.trt_unet_batch_size},
        )


def fastest(subject: Subject, tiny: bool, batched: bool) -> AbstractContextManager[Way]:
    """As `streamed`, with the best acceleration that the settings allow."""
    return streamed(subject, subject.settings.kind, tiny, batched)


@contextmanager
def spread(subject: Subject, kind: str, split: Split | None = None, devices: Devices = "all") -> Iterator[Way]:
    """The stream, accelerated by `kind`, on these devices. split: what they share in denoising, "rows" of every step or
    whole "frames" in turn; each then decodes too. None: the stream's own device denoises, and the others decode."""
    from streamflow.parallel import shard_vae
    from streamflow.parallel.replicas import resolve_devices
    from streamflow.parallel.split import SPLITS

    with subject.stream(tiny=False) as stream:
        chosen = resolve_devices(devices, stream.device)
        decoders = chosen if split else [one for i, one in enumerate(chosen) if i != chosen.index(stream.device)]
        with shard_vae(stream.vae, decoders) as vae:
            stream.vae = vae
            if split:
                SPLITS[split](stream, chosen)
            stream.accelerate(kind)
            rings = len(chosen) if split == "frames" else 1
            yield Way(
                tick=frame_by_frame(stream),
                frames=stream.frame_bff_size,
                depth=subject.settings.steps * rings + vae.lanes,
                details={
                    **{"acceleration": stream.acceleration, "network_rows": stream.trt_unet_batch_size},
                    **{"decoders": vae.lanes, "devices": len(chosen)},
                },
            )


def frame_by_frame(stream: StreamFlow) -> Callable[[], Tensor]:
    """A tick of frames drawn from noise, which any device may decode."""
    frames = stream.frames(repeat(None))

    def tick() -> Tensor:
        images = [next(frames).image.to(stream.device) for _ in range(stream.frame_bff_size)]
        return denormalize(torch.stack(images))

    return tick


def with_anchors(stream: StreamFlow) -> Callable[[], Tensor]:
    """A tick of frames from noise that have an anchor. Its values do not change the speed."""
    ids, frames = count(), stream.frame_bff_size

    def tick() -> Tensor:
        x0 = None
        while x0 is None:  # the ring fills
            noise = torch.cat([stream.frame_noise(next(ids)) for _ in range(frames)])
            x0 = stream.predict_x0_batch(noise, torch.zeros_like(noise))
        return denormalize(stream.decode_image(x0))

    return tick


def by_hand(stream: StreamFlow) -> Callable[[], object] | None:
    """The calls of one tick's network and decoder, or the replays of their CUDA graphs. None without a denoising batch."""
    from streamflow.acceleration.cuda_graph import Graphed

    if not stream.use_denoising_batch:
        return None
    parts = stream.parts()
    assert parts is not None, "the stream is prepared"
    calls = ((parts.velocity, stream.velocity), (parts.decoder, stream.codec.decoder))
    graphs = [module for _, module in calls if isinstance(module, Graphed)]

    def call() -> None:
        for part, module in calls:
            part.call(module)

    def replay() -> None:
        for graph in graphs:
            graph.replay_last()

    if len(graphs) < len(calls):
        return call
    call()
    return replay


@dataclass(frozen=True)
class Variant:
    """One row of the table (`settings.TITLES` has the titles). tiny: whether it uses the tiny VAE. open: a context manager
    with its `Way`. problem: the reason why it cannot be measured under these settings, or None."""

    tiny: bool
    open: Callable[[Subject], AbstractContextManager[Way]]
    problem: Callable[[Settings], str | None] = lambda settings: None


def no_graphs(s: Settings) -> str | None:
    """The reason why there are no CUDA graphs, or None."""
    return None if s.cuda else "CUDA graphs need a CUDA device"


def no_compile(s: Settings) -> str | None:
    """The reason why nothing is compiled, or None."""
    return None if s.compiles else "torch.compile is off: --compile"


def nothing_faster(s: Settings) -> str | None:
    """The reason why there is no acceleration at all, or None."""
    return no_compile(s) if s.kind == "none" else None


def no_tensorrt(s: Settings) -> str | None:
    """The reason why there is no TensorRT, or None."""
    if not s.cuda:
        return "TensorRT needs a CUDA device"
    if find_spec("tensorrt") is None and find_spec("tensorrt_rtx_bindings") is None:
        return 'TensorRT is not installed: pip install "streamflow-rf[tensorrt-rtx]"'
    if find_spec("tensorrt") is None and torch.cuda.get_device_capability(s.torch_device) == (9, 0):
        return "TensorRT for RTX does not run on compute capability 9.0"
    return None


def one_device(s: Settings) -> str | None:
    """The reason why nothing can be spread, or None."""
    found = torch.cuda.device_count() if s.cuda else 0
    return None if found > 1 else f"there are {found} GPUs, and this needs two or more"


VARIANTS: dict[str, Variant] = {
    "1": Variant(False, lambda s: plain(s, False)),
    "1t": Variant(True, lambda s: plain(s, True)),
    "2": Variant(False, lambda s: fastest(s, False, False), nothing_faster),
    "2t": Variant(True, lambda s: fastest(s, True, False), nothing_faster),
    "3": Variant(False, lambda s: streamed(s, "none", False, True)),
    "4": Variant(False, lambda s: streamed(s, "cuda-graph", False, True), no_graphs),
    "5": Variant(False, lambda s: streamed(s, "compile", False, True), no_compile),
    "6": Variant(True, lambda s: fastest(s, True, True)),
    "7": Variant(True, lambda s: streamed(s, "tensorrt", True, True), no_tensorrt),
    "8": Variant(False, lambda s: spread(s, s.settings.kind), one_device),
    "9": Variant(False, lambda s: spread(s, s.settings.kind, "rows"), one_device),
    "10": Variant(False, lambda s: spread(s, s.settings.kind, "frames"), one_device),
}
CHAIN = ("1", "3", "4", "5", "6", "7")  # each adds one thing to the one before
SAME_VAE = (
    *(("3", "1"), ("4", "1"), ("5", "1"), ("4", "2"), ("5", "2")),
    *((one, other) for one in ("8", "9", "10") for other in ("1", "2", "5")),
    *(("6", "1t"), ("6", "2t"), ("7", "1t"), ("7", "2t")),
)


def problem(name: str, settings: Settings, subject: Subject | None = None) -> str | None:
    """The reason why this variant cannot be measured, or None."""
    variant = VARIANTS[name]
    if subject is not None and variant.tiny and subject.tiny is None:
        return "no tiny VAE was given: --tiny-vae"
    return variant.problem(settings)
