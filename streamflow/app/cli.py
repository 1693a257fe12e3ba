"""The command `streamflow`: a table of subcommands. Each is a `main(argv)` that has its own `--help` and returns an exit
code. It is imported when it runs, once the signals' handlers are installed."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module

from streamflow._version import __version__
from streamflow.app.signals import INTERRUPTED, stop_signals

COMMANDS = {
    "txt2img": ("streamflow.app.commands.txt2img", "draw images from a prompt"),
    "img2img": ("streamflow.app.commands.img2img", "restyle images"),
    "video": ("streamflow.app.commands.video", "restyle a video file with its sound, or draw one with a video model"),
    "morph": ("streamflow.app.commands.morph", "draw the way from one prompt to the next"),
    "live": ("streamflow.app.commands.live", "restyle a camera, a screen or a file live, or draw from a prompt"),
    "serve": ("streamflow.app.commands.serve", "serve the page: text and images, live, in a browser"),
    "config": ("streamflow.app.commands.settings_file", "write, check or show a file of settings"),
    "doctor": ("streamflow.app.doctor", "print versions, devices, accelerations, and the command for whatever is missing"),
    "benchmark": ("streamflow.benchmark", "measure one model on this machine: where each factor of the speed comes from"),
    "engines": (
        "streamflow.app.commands.engines",
        "TensorRT engines kept between runs: list, delete; compiled code: export, import",
    ),
}

STOPPED = {"live": 0, "serve": 0, "video": INTERRUPTED}  # the exit code after SIGINT or SIGTERM, of those that handle them


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    lines = "\n".join(f"  {name:<11}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="streamflow",
        description="Rectified-flow pipelines, streamed.",
        epilog=f"commands:\n{lines}\n\nexample: streamflow doctor\n`streamflow COMMAND --help` tells what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"streamflow {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="see below")
    command = parser.parse_args(arguments[:1]).command
    with stop_signals(STOPPED[command]) if command in STOPPED else nullcontext():
        return import_module(COMMANDS[command][0]).main(arguments[1:])
