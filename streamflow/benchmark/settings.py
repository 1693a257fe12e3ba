"""The settings of a measurement, and its command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from streamflow._command_line import Parser, above, at_least
from streamflow.models.loading import DTYPES, default_device

CFG_TYPES = ("none", "self", "full")
VAES = ("own", "tiny")
EXAMPLE = """examples:
  python -m streamflow.benchmark --model sd15 --random-weights --width 512 --height 512 --steps 4 --output outputs/benchmark
  python -m streamflow.benchmark --variants none --sweep steps=1,2,4,8 --sweep cfg=none,self,full --latency

The last line is JSON. The exit code is 2 for an invalid argument."""


@dataclass(frozen=True)
class Settings:
    """One run. model: a key of `streamflow.benchmark.full_size.SIZES` with `random_weights`, "embedded", a hub id or a
    folder. width, height: in pixels, None: the model's own. frames: most ticks of a round. rounds: measurements of each
    figure. round_seconds: the time of a round, so that slow variants take fewer ticks. warmup: ticks before the first round.
    variants: None: all. compile: None: on CUDA. sweep: by the names of `SWEEPS`, values that one setting takes while the
    others stay. sweep_vae: "own" or "tiny". latency: the modes of `latency` are measured too, each for `latency_seconds`.
    json: the table is not printed."""

    model: str = "embedded"
    random_weights: bool = False
    family: str | None = None
    steps: int = 4
    width: int | None = None
    height: int | None = None
    frames: int = 30
    rounds: int = 5
    round_seconds: float = 0.4
    warmup: int = 3
    variants: tuple[str, ...] | None = None
    tiny_vae: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    cfg_type: str = "none"
    frame_buffer_size: int = 1
    output: Path = Path("outputs/benchmark")
    plot: bool = True
    json: bool = False
    compile: bool | None = None
    sweep: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    sweep_vae: str = "own"
    latency: bool = False
    latency_seconds: float = 2.0

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def cuda(self) -> bool:
        """Whether it is a CUDA device."""
        return self.torch_device.type == "cuda"

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is used."""
        return self.cuda if self.compile is None else self.compile

    @property
    def kind(self) -> str:
        """The best acceleration that these settings allow."""
        return "compile" if self.compiles else "cuda-graph" if self.cuda else "none"

    @property
    def name(self) -> str:
        """The name of the result files, without a suffix."""
        model = Path(self.model).name if Path(self.model).exists() else self.model
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', model).strip('-')}-{self.width}x{self.height}-{self.steps}steps"


class OncePerName(argparse.Action):
    """Collects (name, values) of an option that can be given once for each name."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        name, values = values
        collected = getattr(namespace, self.dest)
        if name in collected:
            raise argparse.ArgumentError(self, f"{name} is given twice")
        setattr(namespace, self.dest, {**collected, name: values})


def parser(variants: Sequence[str]) -> Parser:
    """The parser of the command line; variants: the names of all variants."""
    known = ", ".join(variants)
    p = Parser(
        prog="streamflow benchmark",
        description="Measures one model on one machine: the speed of plain diffusers and of each optimisation.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model",
        default="embedded",
        help="sd15, sdxl, sd3-medium, flux-schnell, sana (with --random-weights), embedded, a hub id or a folder",
    )
    p.add_argument("--random-weights", action="store_true", help="a network of this size with random weights: no download")
    p.add_argument("--family", help="rectified-flow family, where the pipeline's class does not determine it")
    p.add_argument("--steps", type=at_least(1), default=4, help="steps an image (default 4)")
    p.add_argument("--width", type=at_least(1), help="pixels (default: the model's)")
    p.add_argument("--height", type=at_least(1), help="pixels (default: the model's)")
    p.add_argument("--frames", type=at_least(1), default=30, help="most ticks of a round (default 30)")
    p.add_argument("--rounds", type=at_least(1), default=5, help="measurements of each figure (default 5)")
    p.add_argument("--round-seconds", type=above(0), default=0.4, help="time of a round (default 0.4)")
    p.add_argument("--warmup", type=at_least(0), default=3, help="ticks before the first round (default 3)")
    p.add_argument("--variants", type=chosen(variants), help=f"comma-separated, of {known}; or none (default: all)")
    p.add_argument("--tiny-vae", help="hub id or folder of an AutoencoderTiny of the model's latents")
    p.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, the model's own elsewhere")
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--cfg-type", choices=CFG_TYPES, default="none", help="guidance (default none)")
    p.add_argument("--frame-buffer-size", type=at_least(1), default=1, help="frames a tick (default 1)")
    p.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder (default: %(default)s)")
    p.add_argument(
        "--sweep",
        type=sweep,
        action=OncePerName,
        default={},
        metavar="NAME=VALUE,...",
        help=f"rates at each value, and the roofline; NAME is one of {', '.join(SWEEPS)}; may be given several times",
    )
    p.add_argument("--sweep-vae", choices=VAES, default="own", help="the VAE of the sweeps (default own)")
    p.add_argument(
        "--latency", action="store_true", help="rate and latency of the modes, for cameras of 24, 30 and 60 a second"
    )
    p.add_argument("--latency-seconds", type=above(0), default=2.0, help="how long each mode is measured (default 2)")
    p.add_argument("--no-plot", dest="plot", action="store_false", help="table and JSON only")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    p.add_argument("--json", action="store_true", help="print the line of JSON and no table")
    return p


def parse(argv: Sequence[str] | None, variants: Sequence[str]) -> tuple[Parser, Settings]:
    """The parser, and the settings of this command line. An invalid one ends the process with 2 and one line."""
    p = parser(variants)
    a = p.parse_args(argv)
    if (a.width is None) != (a.height is None):
        p.error("--width and --height go together")
    device_problem = unusable(a.device)
    if device_problem:
        p.error(f"--device {a.device}: {device_problem}")
    return p, Settings(**vars(a))


def unusable(device: str) -> str | None:
    """The reason why torch cannot use this device, or None."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        return str(error).splitlines()[0]
    return None


def chosen(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: comma-separated known names, returned in the order of `known`; "none" is no name."""

    def names(text: str) -> tuple[str, ...]:
        given = [name.strip() for name in text.split(",")]
        if given == ["none"]:
            return ()
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(map(repr, unknown))}: choose of {', '.join(known)}")
        return tuple(name for name in known if name in given)

    return names


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of the known names."""

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return text

    return name


@dataclass(frozen=True)
class Sweep:
    """A setting that can be swept. label: of its values. value: parses one. fields: the fields of `Settings` that it
    sets."""

    label: str
    value: Callable[[str], int | str]
    fields: tuple[str, ...]


SWEEPS = {
    "steps": Sweep("steps an image", at_least(1), ("steps",)),
    "size": Sweep("pixels a side", at_least(1), ("width", "height")),
    "buffer": Sweep("frames a tick", at_least(1), ("frame_buffer_size",)),
    "cfg": Sweep("guidance", one_of(CFG_TYPES), ("cfg_type",)),
}


def with_value(settings: Settings, name: str, value: int | str) -> Settings:
    """The settings with this value of one swept setting."""
    return replace(settings, **dict.fromkeys(SWEEPS[name].fields, value))


def sweep(text: str) -> tuple[str, tuple[int | str, ...]]:
    """An argparse type: `name=value,value,...`; each value once."""
    name, equals, given = text.partition("=")
    if name not in SWEEPS or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,... with a name of {', '.join(SWEEPS)}")
    values = []
    for one in given.split(","):
        try:
            values.append(SWEEPS[name].value(one.strip()))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name}={one}: {one!r} is not a whole number") from error
    return name, tuple(dict.fromkeys(values))
