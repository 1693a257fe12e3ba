"""How work spreads over the GPUs of a machine: decoding by row, frame and tile, denoising rows, whole frames in turn, the
host, torchrun.

    python examples/benchmark_scaling.py --output static/benchmarks/scaling.json
    python examples/benchmark_scaling.py --parts decode_rows,host --no-plot
    python examples/benchmark_scaling.py --plot-from static/benchmarks/scaling.json
    python examples/benchmark_scaling.py --devices cpu,cpu --model embedded --size 64 --quick

Networks have true sizes and random weights, since speed does not depend on weights. Everything is measured on 1, 2, 4, ...
devices, each time the median of rounds with every device waited for around them, and its results are compared with those of
one device (`equal`: to the bit). Costs of one device, of copies and of the host go into a simulation of up to 64 GPUs
(benchmark/scaling_model.py), which is compared with the measured points. What cannot run is a row with its cause. Every row
is in the JSON as soon as it is there, and after `--minutes` no row is begun any more. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent / "benchmark"))  # no package: benchmark.py beside it has its name
import scaling_parts as parts  # noqa: E402
import scaling_report as report  # noqa: E402
from scaling_run import Figures, Run, Setup  # noqa: E402

from streamflow._command_line import Parser, above, at_least, unusable  # noqa: E402
from streamflow.benchmark.machine import machine  # noqa: E402
from streamflow.benchmark.plot import require  # noqa: E402
from streamflow.benchmark.report import rounded  # noqa: E402
from streamflow.benchmark.settings import chosen, one_of  # noqa: E402
from streamflow.parallel.distributed import local_device  # noqa: E402
from streamflow.parallel.replicas import resolve_devices  # noqa: E402

NETWORKS = ("flux-schnell", "sd3-medium", "sd15")  # the last is what other parts take: loaded once
KINDS = ("none", "cuda-graph", "compile")
QUICK = {"latents": 4, "stages": (2,), "rounds": 2, "warm_up": 1, "round_seconds": 0.01}


def torchrun(run: Run) -> None:
    """Decoding by row once more, by processes: `streamflow.parallel.distributed` under torchrun, NCCL between GPUs."""
    for k in run.setup.counts[1:]:
        run.row("torchrun", "kl", k, partial(_torchrun, run, k))


def _torchrun(run: Run, ranks: int) -> Figures:
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        answer = Path(folder) / "rank0.json"
        s = run.setup
        arguments = {
            "--rank-output": answer,
            "--devices": s.home.type,
            "--model": "embedded" if s.decoding == "embedded" else "true-size",
            "--kind": s.kind,
            "--size": s.size,
            "--latents": s.latents,
            "--piece": s.piece,
            "--rounds": s.rounds,
        }
        listed = [str(word) for pair in arguments.items() for word in pair]
        free.close()
        command = parts.torchrun_command(str(Path(__file__).resolve()), ranks, port, listed)
        launched(command, max(run.left, 60))
        return json.loads(answer.read_text(encoding="utf-8"))


def launched(command: list[str], most: float) -> None:
    """Run a command to its end. RuntimeError where it fails, or takes longer than `most` seconds: then none of its processes
    is left."""
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said = run.communicate(timeout=most)[1]
    except subprocess.TimeoutExpired as error:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        raise RuntimeError(f"torchrun was not done after {most:.0f} s") from error
    if run.returncode:
        raise RuntimeError(f"torchrun ended with {run.returncode}: {said[-400:]}")


PARTS = {
    "links": parts.links,
    "host": parts.host,
    "decode_rows": parts.decode_rows,
    "denoise_rows": parts.denoise_rows,
    "decode_frames": parts.decode_frames,
    "interleave_frames": parts.interleave_frames,
    "decode_tiles": parts.decode_tiles,
    "torchrun": torchrun,
}


def numbers(text: str) -> tuple[int, ...]:
    """An argparse type: integers of 1 or more."""
    return tuple(at_least(1)(word) for word in text.split(","))


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The command line."""
    cuda = torch.cuda.is_available()
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(PARTS)
    p.add_argument("--parts", type=chosen(list(PARTS)), help=f"of {known} (default: all; with --quick not torchrun)")
    p.add_argument("--devices", default="all", help="comma-separated, the first is home (default: every GPU)")
    p.add_argument("--counts", type=numbers, default=(), help="how many of them, besides one (default: 2,4,8,...)")
    p.add_argument("--model", type=one_of(("true-size", "embedded")), default="true-size", help="default: %(default)s")
    p.add_argument("--networks", type=chosen(NETWORKS), default=NETWORKS, help=f"of {', '.join(NETWORKS)} (default: all)")
    p.add_argument(
        "--kind", type=one_of(KINDS), help="acceleration of decoding and of the stream (default: compile on CUDA)"
    )
    p.add_argument("--rows-kind", type=one_of(KINDS), help="of denoising rows (default: cuda-graph on CUDA)")
    p.add_argument("--size", type=at_least(1), default=512, help="pixels a side (default 512)")
    p.add_argument("--latents", type=at_least(1), default=64, help="decoded by row (default 64)")
    p.add_argument("--piece", type=at_least(1), help="rows decoded at once (default 8, fewer for fewer latents a device)")
    p.add_argument("--tile-size", type=at_least(1), help="pixels a side of the large image (default: 8 times --size)")
    p.add_argument("--tile", type=at_least(1), help="latents a side of a tile (default: a quarter of the large image)")
    p.add_argument("--stages", type=numbers, default=(4, 8), help="comma-separated (default 4,8)")
    p.add_argument("--rounds", type=at_least(1), default=10, help="default 10")
    p.add_argument("--quick", action="store_true", help="few latents, stages and rounds, to see that it runs")
    p.add_argument("--minutes", type=above(0), default=9.0, help="after which no row is begun any more (default 9)")
    p.add_argument("--output", type=Path, default=Path("outputs/benchmark_scaling.json"), help="default: %(default)s")
    p.add_argument("--no-plot", dest="plot", action="store_false", help="table and JSON only")
    p.add_argument("--plot-from", type=Path, help="draw the plot of an earlier run's JSON beside it, and measure nothing")
    p.add_argument("--rank-output", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    a.parts = tuple(name for name in PARTS if not (a.quick and name == "torchrun")) if a.parts is None else a.parts
    a.kind = a.kind or ("compile" if cuda and a.devices != "cpu" else "none")
    a.rows_kind = a.rows_kind or ("cuda-graph" if cuda and a.devices != "cpu" else "none")
    return p, a


def setup_of(p: Parser, a: argparse.Namespace) -> Setup:
    """What is to be measured; the parser ends with 2 where it cannot be."""
    try:
        if a.rank_output and a.devices != "cpu":
            devices = (local_device(),)
        else:
            devices = resolve_devices(a.devices if a.devices == "all" else a.devices.split(","), torch.device("cpu"))
    except (RuntimeError, ValueError) as error:
        p.error(f"--devices {a.devices}: {error}")
    if problem := unusable(str(devices[0])):
        p.error(f"--devices {a.devices}: {problem}")
    embedded = a.model == "embedded"
    side = a.tile_size or (2 if a.quick else 8) * a.size
    own = {"size": a.size, "tile_size": side, "tile": a.tile or max(side // (16 if a.quick else 32), 4)}
    try:
        setup = Setup(
            devices,
            ("embedded",) if embedded else a.networks,
            "embedded" if embedded else "sd15",
            a.kind,
            a.rows_kind,
            latents=a.latents,
            stages=a.stages,
            rounds=a.rounds,
            only=a.counts,
            **own,
        )
    except ValueError as error:
        p.error(f"--counts: {error}")
    if a.quick:
        setup = replace(setup, **QUICK)
    return setup


def measure(setup: Setup, a: argparse.Namespace) -> Run:
    """All parts, one after another."""
    about = {
        "command": " ".join(["python", *sys.argv]),
        "model": a.model,
        "machine": machine(setup.home),
        "devices": [str(device) for device in setup.devices],
        "kind": setup.kind,
        "rows_kind": setup.rows_kind,
        **{"size": setup.size, "latents": setup.latents, "piece": setup.piece, "rounds": setup.rounds},
        **{"tile_size": setup.tile_size, "tile": setup.tile},
    }
    run = Run(setup, about, a.output, 60 * a.minutes)
    for name in a.parts:
        run.part(name, PARTS[name])
    return run


def as_rank(setup: Setup, a: argparse.Namespace) -> int:
    """One process of the part `torchrun`."""
    figures = parts.serve_rank(Run(setup, {}, None, 60 * a.minutes), a.piece)
    if figures is not None:
        a.rank_output.write_text(json.dumps(figures, allow_nan=False), encoding="utf-8")
    return 0


def draw(result: Any, path: Path) -> None:
    """The plot beside the JSON."""
    for written in report.draw(result, path.parent, path.stem):
        print(f"wrote {written}")


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 where a row failed."""
    p, a = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("streamflow.pipeline").setLevel(logging.WARNING)  # of frames that a new series drops
    if a.plot_from:
        draw(json.loads(a.plot_from.read_text(encoding="utf-8")), a.plot_from)
        return 0
    if a.plot and not a.rank_output:
        try:
            require()
        except ImportError as error:
            p.error(str(error))
    setup = setup_of(p, a)
    if setup.cuda:
        torch.cuda.set_device(setup.home)
    if a.rank_output:
        return as_rank(setup, a)
    run = measure(setup, a)
    run.found["figures"] = report.checked(run.found)
    run.write()
    if a.plot:
        draw(run.found, a.output)
    print(report.table(run.found), json.dumps(rounded(run.found), allow_nan=False), sep="\n")
    rows = [f for series in run.found["parts"].values() for one in series.values() for f in one.values()]
    return int(any("failed" in f for f in rows))


if __name__ == "__main__":
    sys.exit(main())
