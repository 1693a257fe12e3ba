"""The settings of a measurement, and its command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamflow._command_line import Parser, above, at_least, quiet_libraries, unusable

if TYPE_CHECKING:
    import torch

TITLES = {  # of the variants, which `ways.VARIANTS` measures
    "1": "plain diffusers, eager, one after another",
    "1t": "plain diffusers, eager, tiny VAE",
    "2": "one after another, accelerated",
    "2t": "one after another, accelerated, tiny VAE",
    "3": "the denoising batch",
    "4": "the batch + CUDA graph",
    "5": "the batch + CUDA graph + compile",
    "6": "the batch, accelerated, tiny VAE",
    "7": "the batch + TensorRT, tiny VAE",
    "8": "the batch + compile, decoded on the other GPUs",
    "9": "the batch + compile, rows on all GPUs",
    "10": "the batch + compile, whole frames on all GPUs in turn",
}
DTYPES = ("float32", "float16", "bfloat16")
CFG_TYPES = ("none", "self", "full")
VAES = ("own", "tiny")
EXAMPLE = """examples:
  streamflow benchmark --model sd15 --random-weights --width 512 --height 512 --steps 4 --output outputs/benchmark
  streamflow benchmark --variants none --sweep steps=1,2,4,8 --sweep cfg=none,self,full --latency

The last line is JSON. The exit code is 2 for an invalid argument."""


def option(default: object, text: str, flag: str | None = None, rare: bool = False, **arguments: object) -> Any:
    """A field of `Settings` that is also an option of the command line. text: its help. flag: its name, if that is not the
    field's. rare: shown by `--help-all` only. arguments: more arguments of `add_argument`."""
    return field(default=default, metadata={"flag": flag, "rare": rare, "help": text, **arguments})


@dataclass(frozen=True)
class Settings:
    """One run. A field is described by the help of its option. variants: None: all. sweep: by the names of `SWEEPS`, values
    that one setting takes while the others stay."""

    model: str = option(
        "embedded", "sd15, sdxl, sd3-medium, flux-schnell, sana (with --random-weights), embedded, a hub id or a folder"
    )
    random_weights: bool = option(False, "a network of this size with random weights: no download", action="store_true")
    family: str | None = option(None, "rectified-flow family, where the pipeline's class does not determine it", rare=True)
    steps: int = option(4, "steps an image (default %(default)s)", type=at_least(1))
    width: int | None = option(None, "pixels (default: the model's)", type=at_least(1))
    height: int | None = option(None, "pixels (default: the model's)", type=at_least(1))
    frames: int = option(30, "most ticks of a round (default %(default)s)", rare=True, type=at_least(1))
    rounds: int = option(5, "measurements of each figure (default %(default)s)", rare=True, type=at_least(1))
    round_seconds: float = option(
        0.4, "time of a round: slow variants take fewer ticks (default %(default)s)", rare=True, type=above(0)
    )
    warmup: int = option(3, "ticks before the first round (default %(default)s)", rare=True, type=at_least(0))
    variants: tuple[str, ...] | None = None
    tiny_vae: str | None = option(None, "hub id or folder of an AutoencoderTiny of the model's latents")
    dtype: str | None = option(None, "default: float32 on a CPU, the model's own elsewhere", rare=True, choices=DTYPES)
    device: str = option("cpu", "default: the first of cuda, mps and cpu that torch has")
    cfg_type: str = option("none", "guidance (default %(default)s)", rare=True, choices=CFG_TYPES)
    frame_buffer_size: int = option(1, "frames a tick (default %(default)s)", rare=True, type=at_least(1))
    output: Path = option(Path("outputs/benchmark"), "folder (default: %(default)s)", type=Path)
    sweep: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    sweep_vae: str = option("own", "the VAE of the sweeps (default %(default)s)", rare=True, choices=VAES)
    latency: bool = option(
        False, "rate and latency of the modes, for cameras of 24, 30 and 60 a second", action="store_true"
    )
    latency_seconds: float = option(2.0, "how long each mode is measured (default %(default)s)", rare=True, type=above(0))
    plot: bool = option(True, "table and JSON only", rare=True, flag="--no-plot", action="store_false")
    compile: bool | None = option(None, "torch.compile (default: on CUDA)", rare=True, action=argparse.BooleanOptionalAction)
    json: bool = option(False, "print the line of JSON and no table", rare=True, action="store_true")

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        import torch

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


def parser() -> Parser:
    """The parser of the command line."""
    p = Parser(
        prog="streamflow benchmark",
        description="Measures one model on one machine: the speed of plain diffusers and of each optimisation.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for one in (one for one in fields(Settings) if one.metadata):
        arguments = {"default": one.default, **one.metadata}
        flag, rare = arguments.pop("flag") or f"--{one.name.replace('_', '-')}", arguments.pop("rare")
        if "type" in arguments and one.type != "Path":
            arguments["metavar"] = "X" if one.type == "float" else "N"
        action = p.add_argument(flag, dest=one.name, **arguments)
        if rare:
            p.add_rare(action)
    p.add_argument("-v", "--verbose", action="store_true", help="show the messages and progress bars of the libraries too")
    titles = "; ".join(f"{name} {title}" for name, title in TITLES.items())
    p.add_argument(
        "--variants", type=chosen(tuple(TITLES)), metavar="NAME,...", help=f"default: all; or none, or of {titles}"
    )
    p.add_argument(
        "--sweep",
        type=sweep,
        action="append",
        metavar="NAME=VALUE,...",
        help=f"rates at each value, and the roofline; NAME is one of {', '.join(SWEEPS)}; may be given several times",
    )
    p.set_defaults(device=None, sweep=[])
    return p


def parse(argv: Sequence[str] | None) -> tuple[Parser, Settings]:
    """The parser, and the settings of this command line. An invalid one ends the process with 2 and one line. The libraries'
    messages are hidden from here on, without `--verbose`."""
    p = parser()
    a = p.parse_args(argv)
    if (a.width is None) != (a.height is None):
        p.error("--width and --height go together")
    if not a.verbose:
        quiet_libraries()
    from streamflow.models.loading import default_device

    a.device = a.device or default_device()
    if device_problem := unusable(a.device):
        p.error(f"--device {a.device}: {device_problem}")
    names = [name for name, _ in a.sweep]
    if repeated := [name for name in SWEEPS if names.count(name) > 1]:
        p.error(f"--sweep: {repeated[0]} is given twice")
    given = {name: value for name, value in vars(a).items() if name != "verbose"}
    return p, Settings(**{**given, "sweep": dict(a.sweep)})


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
