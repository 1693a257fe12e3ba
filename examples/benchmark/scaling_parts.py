"""What the scaling benchmark measures, one function a part: each takes a `Run` and gives it rows. A series is one way at 1,
2, 4, ... devices; its "costs" are what the simulation needs, measured on one device."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from scaling_run import Figures, Run, likeness
from torch import Tensor, nn

from streamflow import StreamFlow
from streamflow.acceleration.cuda_graph import Graphed
from streamflow.benchmark.machine import clocks
from streamflow.benchmark.report import ratio
from streamflow.benchmark.subject import Subject
from streamflow.benchmark.timing import Spread, wait
from streamflow.parallel import decode_tiled, interleave, shard_denoiser, shard_vae
from streamflow.parallel.pool import Pool
from streamflow.parallel.rows import ShardedVelocity
from streamflow.parallel.tiles import psnr, reach_of
from streamflow.parallel.vae import Sharded

SMALL, LARGE = 2**12, 2**26  # bytes of the copies that give a link's latency and its rate
NAP = 1_500_000  # GPU cycles, about 1 ms
COMPARED = 4  # frames of a stream whose images are compared


class Halved(nn.Module):
    """A network that computes next to nothing, and keeps a GPU busy for so many cycles."""

    def __init__(self, cycles: int = 0):
        super().__init__()
        self.cycles = cycles

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        return x * 0.5


def links(run: Run) -> None:
    """What a copy from home to the second device costs."""
    run.row("links", "home to second", "costs", lambda: _link_costs(run))


def _link_costs(run: Run) -> Figures:
    there = run.setup.devices[min(1, len(run.setup.devices) - 1)]
    took = []
    for size in (SMALL, LARGE):
        x = torch.zeros(size, dtype=torch.uint8, device=run.setup.home)
        took.append(run.timed(partial(x.to, there, non_blocking=True))["median"])
    return {
        "latency_ms": took[0],
        "ms_per_mib": max(took[1] - took[0], 0.0) / ((LARGE - SMALL) / 2**20),
        "clocks": {str(device): clocks(device) for device in sorted(set(run.setup.devices), key=str)},
    }


# -- decoding by row ---------------------------------------------------------------------------------------------------


@contextmanager
def decoding(run: Run, tiny: bool, frames: int) -> Iterator[StreamFlow]:
    """A stream whose network takes no time, so that decoding is all there is."""
    with run.subject(run.setup.decoding, steps=1, frame_buffer_size=frames).stream(tiny) as stream:
        stream.velocity = Halved()
        yield stream


def latents_for(stream: StreamFlow, n: int) -> Tensor:
    """n random latents, the same at every call."""
    shape = stream.frame_noise(0).shape[1:]
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)).to(stream.device, stream.dtype)


def decode_rows(run: Run) -> None:
    """Many latents at once: `shard_vae`, each device's copy accelerated by itself."""
    for name, tiny in (("kl", False), ("tiny", True)):
        _decode_rows_of(run, name, tiny)
        run.clean()


def _decode_rows_of(run: Run, name: str, tiny: bool) -> None:
    s = run.setup
    with decoding(run, tiny, s.latents) as stream, shard_vae(stream.vae, s.devices, batch=s.piece) as vae:
        stream.vae = vae
        z, kept = latents_for(stream, s.latents), {}
        run.row("decode_rows", name, "costs", lambda: _piece_costs(run, stream, z))
        for k in s.counts:
            run.row("decode_rows", name, k, partial(_decode_row, run, stream, z, k, kept))


def _piece_costs(run: Run, stream: StreamFlow, z: Tensor) -> Figures:
    """Of one copy, in the caller's thread, and of handing one job to a device."""
    s, took = run.setup, {}
    run.accelerate(stream, s.kind)
    decoder = stream.codec.decoder
    with torch.cuda.device(s.home) if s.cuda else nullcontext():
        for rows in sorted({1, s.piece}):
            took[str(rows)] = run.timed(partial(decoder.replicas[0], z[:rows]))["median"]
        image = decoder.replicas[0](z[:1])
    # A CPU computes in the thread that hands out, so its host time is in piece_ms already.
    host = run.host(lambda: decoder.submit(z[: s.piece]).result(), burst=1)["median"] if s.cuda else 0.0
    return {
        **{"rows": len(z), "piece": s.piece, "piece_ms": took, "host_job_ms": host},
        **{"bytes_in": z[:1].nbytes, "bytes_out": image.nbytes, "most_gpus": len(z)},
    }


@contextmanager
def first(sharded: Sharded, k: int) -> Iterator[Sharded]:
    """The first k of its copies."""
    with Pool(sharded.devices[:k], sharded.settings.depth) as pool:
        yield Sharded(pool, sharded.settings, sharded.replicas[:k])


def check_alive(pool: Pool) -> None:
    """RuntimeError where a device was dropped: what was measured is not what it says."""
    if pool.dropped:
        raise RuntimeError(f"dropped while it was measured: {pool.dropped}")


def _decode_row(run: Run, stream: StreamFlow, z: Tensor, k: int, kept: dict[int, Tensor]) -> Figures:
    run.accelerate(stream, run.setup.kind)
    with first(stream.codec.decoder, k) as some:
        drawn = some(z)
        like = likeness(drawn, kept.get(1))
        if k == 1:
            kept[1] = drawn
        ms = run.timed(lambda: some(z))
        check_alive(some.pool)
    return {"ms": ms, "images_per_s": 1e3 * len(drawn) / ms["median"], **like}


# -- decoding by frame -------------------------------------------------------------------------------------------------


def decode_frames(run: Run) -> None:
    """A stream, its decode on the other devices: with the network, then with one that takes no time, so that the decode is
    the slower part. First the plain pipeline, one image after another."""
    subject = run.subject(run.setup.decoding, steps=run.setup.stages[0])
    with subject.stream(False) as stream:
        noise = stream.frame_noise(0)
        run.row("decode_frames", "eager", 1, lambda: {"ms": run.timed(lambda: subject.draw(subject.pipe, noise, stream))})
    for name, network in (("network", None), ("decode alone", Halved())):
        with subject.stream(False) as stream:
            if network is not None:
                stream.velocity = network
            _frames_of(run, stream, name)
        run.clean()


def _frames_of(run: Run, stream: StreamFlow, name: str) -> None:
    s, plain, kept = run.setup, stream.vae, {}
    run.row("decode_frames", name, "costs", lambda: _stream_costs(run, stream))
    run.row("decode_frames", name, 1, lambda: _streamed(run, stream, kept))
    for k in (k for k in s.counts if k > 1):
        run.row("decode_frames", name, k, partial(_decode_elsewhere, run, stream, plain, k, kept))


def interleave_frames(run: Run) -> None:
    """A stream whose devices take whole frames in turn, each with its decode: with the KL and the tiny VAE."""
    s = run.setup
    subject = run.subject(s.decoding, steps=s.stages[0])
    with subject.stream(False) as stream:
        noise = stream.frame_noise(0)
        eager = lambda: {"ms": run.timed(lambda: subject.draw(subject.pipe, noise, stream))}  # noqa: E731
        run.row("interleave_frames", "eager", 1, eager)
    for name, tiny in (("kl", False), ("tiny", True)):
        kept: dict[int, Tensor] = {}
        for k in s.counts:
            run.row("interleave_frames", name, k, partial(_interleaved, run, subject, tiny, k, kept))


def _interleaved(run: Run, subject: Subject, tiny: bool, k: int, kept: dict[int, Tensor]) -> Figures:
    devices = run.setup.devices[:k]
    with subject.stream(tiny) as stream, shard_vae(stream.vae, devices) as vae:
        stream.vae = vae
        if k > 1:
            interleave(stream, devices)
        figures = _streamed(run, stream, kept, "interleave_frames")
        check_alive(vae.pool)
    return figures


def _stream_costs(run: Run, stream: StreamFlow) -> Figures:
    run.accelerate(stream, run.setup.kind)
    noise = stream.frame_noise(0)
    x0 = noise * 1.0
    return {
        "tick_ms": run.timed(lambda: stream.predict_x0_batch(noise))["median"],
        "decode_ms": run.timed(lambda: stream.codec.decode(x0))["median"],
        "bytes_in": x0.nbytes,
    }


def _decode_elsewhere(run: Run, stream: StreamFlow, plain: nn.Module, k: int, kept: dict[int, Tensor]) -> Figures:
    with shard_vae(plain, run.setup.devices[1:k]) as vae:
        stream.vae = vae
        figures = _streamed(run, stream, kept)
        check_alive(vae.pool)
    return figures


def _streamed(run: Run, stream: StreamFlow, kept: dict[int, Tensor], part: str = "decode_frames") -> Figures:
    run.accelerate(stream, run.setup.kind)
    stream.reset()
    images = [frame.wait().image.to(run.setup.home) for frame in stream.frames([None] * COMPARED)]
    drawn = torch.stack(images)
    like = likeness(drawn, kept.get(1))
    kept.setdefault(1, drawn)
    ms = _frame_times(run, stream)
    figures = {"ms": ms, "images_per_s": 1e3 / ms["median"], **like}
    eager = run.found["parts"][part]["eager"]["1"]
    return {**figures, "times_eager": ratio(eager["ms"], ms)} if "ms" in eager else figures


def _frame_times(run: Run, stream: StreamFlow) -> dict[str, float]:
    """Milliseconds a frame of a stream without an end: in each round everything that goes in is finished before it ends."""
    s, taken = run.setup, [0]

    def inputs() -> Iterator[None]:
        while True:
            taken[0] += 1
            yield None

    frames = stream.frames(inputs())

    def round_of(count: int) -> float:
        before = taken[0]
        _finish(run, stream)
        began = time.perf_counter()
        deque((next(frames) for _ in range(count)), maxlen=0)
        _finish(run, stream)
        return (time.perf_counter() - began) / max(taken[0] - before, 1)

    round_of((len(stream.t_list) + 2) * len(s.devices) + s.warm_up)
    # Nothing is decoded while a round's first frame is drawn, nor drawn while its last is decoded: rounds are long.
    count = max(4 * len(s.devices), min(100, int(4 * s.round_seconds / round_of(2 * len(s.devices)))))
    values = [1e3 * round_of(count) for _ in range(s.rounds)]
    frames.close()
    stream.reset()
    return vars(Spread.of(values))


def _finish(run: Run, stream: StreamFlow) -> None:
    """Until all decodes that were handed out are launched, and every device is done."""
    decoder = stream.codec.decoder
    if isinstance(decoder, Sharded):
        nothing = [lambda: None] * len(decoder.replicas)
        for pending in [decoder.pool.submit(nothing, (), worker=i) for i in decoder.pool.alive]:
            pending.result()
    run.wait()


# -- decoding by tile --------------------------------------------------------------------------------------------------


def decode_tiles(run: Run) -> None:
    """One large image in tiles of one size, on 1, 2, 4, ... devices; in as few tiles as there is room for; and whole."""
    s = run.setup
    with run.subject(s.decoding, steps=1).stream(False) as stream:
        vae, like = stream.vae, latents_for(stream, 1)
    side = s.tile_size * like.shape[-1] // s.size
    z = torch.randn(*like.shape[:2], side, side, generator=torch.Generator().manual_seed(1)).to(like)
    kept: dict[int, Tensor] = {}
    run.row("decode_tiles", "whole", 1, lambda: _whole(run, vae, z, kept))
    run.row("decode_tiles", "tiles", "costs", lambda: _tile_costs(run, vae, z))
    for series, tile in (("tiles", s.tile), ("auto", "auto")):
        same: dict[int, Tensor] = {}
        for k in s.counts[tile == "auto" :]:  # on one device as few tiles as there is room for is the whole, or nearly
            run.row("decode_tiles", series, k, partial(_tiled, run, vae, z, tile, k, same, kept.get(0)))


def _decoded(vae: nn.Module, z: Tensor) -> Tensor:
    return vae.decode(z, return_dict=False)[0]


def _whole(run: Run, vae: nn.Module, z: Tensor, kept: dict[int, Tensor]) -> Figures:
    kept[0] = _decoded(vae, z)
    return {"ms": run.timed(lambda: _decoded(vae, z)), "latents": list(z.shape)}


def _tile_costs(run: Run, vae: nn.Module, z: Tensor) -> Figures:
    reach = reach_of(vae, z[..., :1, :1])
    side = min(z.shape[-1], run.setup.tile + 2 * reach.halo)
    window = z[..., :side, :side]
    # No host_job_ms: launching a tile eagerly goes on while the one before it computes.
    return {
        **{"rows": (-(-z.shape[-1] // run.setup.tile)) ** 2, "piece": 1, "host_job_ms": 0.0, "halo": reach.halo},
        "piece_ms": {"1": run.timed(lambda: _decoded(vae, window))["median"]},
        **{"bytes_in": window.nbytes, "bytes_out": 3 * (side * reach.factor) ** 2 * z.element_size()},
    }


def _tiled(
    run: Run, vae: nn.Module, z: Tensor, tile: int | str, k: int, same: dict[int, Tensor], whole: Tensor | None
) -> Figures:
    with shard_vae(vae, run.setup.devices[:k]) as sharded:
        drawn = decode_tiled(sharded, z, tile)
        like = likeness(drawn, same.get(1))
        if whole is not None:
            like["psnr_db_to_whole"] = min(psnr(drawn.clamp(-1, 1), whole.clamp(-1, 1)), 200.0)
        if k == 1:
            same[1] = drawn
        ms = run.timed(lambda: decode_tiled(sharded, z, tile))
        check_alive(sharded.pool)
    return {"ms": ms, **like}


# -- rows of the denoising batch ---------------------------------------------------------------------------------------


def denoise_rows(run: Run) -> None:
    """`shard_denoiser`, each device's copy accelerated by itself, for every network and number of stages."""
    s = run.setup
    for model in s.networks:
        loaded = run.row("denoise_rows", model, "costs", lambda model=model: _network_costs(run, run.subject(model)))
        for stages in s.stages if "network_ms" in loaded else ():
            name, kept = f"{model}, {stages} stages", {}
            costs = {**loaded, "rows": stages, "most_gpus": stages}
            run.row("denoise_rows", name, "costs", lambda costs=costs: costs)
            for k in (k for k in s.counts if k <= stages):
                run.row("denoise_rows", name, k, partial(_denoise_row, run, model, stages, k, kept))


def _network_costs(run: Run, subject: Subject) -> Figures:
    """The network alone on one device, at every number of rows that a share can have."""
    s, took = run.setup, {}
    for rows in sorted({-(-stages // 2**i) for stages in s.stages for i in range(stages.bit_length())}):
        with run.subject(subject.settings.model, steps=rows).stream(True) as stream:
            run.accelerate(stream, s.rows_kind)
            part, module = stream.parts().velocity, stream.velocity
            part.call(module)
            call = module.replay_last if isinstance(module, Graphed) else partial(part.call, module)
            took[str(rows)] = run.timed(call)["median"]
            row_bytes = part.inputs["x"][:1].nbytes
        run.clean()
    return {"network_ms": took, "row_bytes": row_bytes, "load_s": subject.seconds}


def _denoise_row(run: Run, model: str, stages: int, k: int, kept: dict[int, Tensor]) -> Figures:
    subject = run.subject(model, steps=stages)
    ms, drawn = _denoised(run, subject, lambda stream: shard_denoiser(stream, run.setup.devices[:k]) if k > 1 else None)
    like = likeness(drawn, kept.get(1))
    kept.setdefault(1, drawn)
    run.clean()
    if k > 1:
        like |= likeness(drawn, _denoised(run, subject, lambda stream: _share_alone(stream, k), clocked=False)[1], "_shares")
    return {"ms": ms, **like}


def _denoised(
    run: Run, subject: Subject, spread: Callable[[StreamFlow], Any], clocked: bool = True
) -> tuple[dict[str, float], Tensor]:
    """(milliseconds a tick, the first frames' latents)."""
    with subject.stream(True) as stream:
        spread(stream)
        run.accelerate(stream, run.setup.rows_kind)
        noises = [stream.frame_noise(i) for i in range(len(stream.t_list) + 1)]
        done = [x0 for x in noises if (x0 := stream.predict_x0_batch(x)) is not None]
        return run.timed(lambda: stream.predict_x0_batch(noises[0])) if clocked else {}, torch.cat(done)


def _share_alone(stream: StreamFlow, k: int) -> None:
    """The same shares of rows, all on the stream's own device by the network itself: what k devices should give."""
    plain = stream.adapter.velocity
    stream.velocity = ShardedVelocity(plain, [plain] * k, [stream.device] * k, frozenset(stream.adapter.shared_inputs))


# -- the host ----------------------------------------------------------------------------------------------------------


def host(run: Run) -> None:
    """How long the host is at a tick, by the number of devices: a network of about 1 ms on the GPU, as a CUDA graph."""
    for k in run.setup.counts:
        run.row("host", "tick", k, partial(_host_row, run, k))


def _host_row(run: Run, k: int) -> Figures:
    s = run.setup
    with run.subject(s.decoding, steps=max(s.stages)).stream(True) as stream:
        stream.velocity = Halved(NAP if s.cuda else 0)
        if k > 1:
            shard_denoiser(stream, s.devices[:k])
        run.accelerate(stream, "cuda-graph" if s.cuda else "none")
        noise = stream.frame_noise(0)
        found = {"host_ms": run.host(lambda: stream.predict_x0_batch(noise))}
    return {**found, **_added(run, found["host_ms"]["median"], k)}


def _added(run: Run, median: float, k: int) -> Figures:
    """What k devices add to the host's time on one, and what each of them adds to that on two."""
    before = run.found["parts"].get("host", {}).get("tick", {})
    alone, two = (before.get(key, {}).get("host_ms", {}).get("median") for key in ("1", "2"))
    added = {"added_ms": median - alone} if k > 1 and alone is not None else {}
    return {**added, "added_each_ms": (median - two) / (k - 2)} if k > 2 and two is not None else added


# -- by torchrun -------------------------------------------------------------------------------------------------------


class InPieces(nn.Module):
    """A decoder that takes so many rows at once."""

    def __init__(self, decoder: nn.Module, piece: int):
        super().__init__()
        self.decoder, self.piece = decoder, piece

    def forward(self, latents: Tensor) -> Tensor:
        return torch.cat([self.decoder(part) for part in latents.split(self.piece)])


def serve_rank(run: Run, piece: int) -> Figures | None:
    """One rank's side of decoding by row over processes; the figures on rank 0, None on the others. The ranks' device is the
    run's only one."""
    from streamflow.parallel.distributed import served

    with decoding(run, False, piece) as stream:
        run.accelerate(stream, run.setup.kind)
        decoder, z = InPieces(stream.codec.decoder, piece), latents_for(stream, run.setup.latents)
        decoder(z)
        wait(run.setup.home)
        with served({"decoder": decoder}) as remote:
            if remote is None:
                return None
            like = likeness(remote.decoder(z), decoder(z))
            alone = run.timed(lambda: decoder(z))
            together = run.timed(lambda: remote.decoder(z))
            return {
                "alone_ms": alone,
                "ms": together,
                "times_alone": ratio(alone, together),
                "ranks": torch.distributed.get_world_size(),
                **like,
            }


def torchrun_command(script: str, ranks: int, port: int, arguments: list[str]) -> list[str]:
    """`torchrun` of this Python, on this machine."""
    where = ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *where, script, *arguments]
