"""The command `streamflow`: a table of subcommands, each a function that returns an exit code."""

import argparse
from collections.abc import Sequence

from streamflow import doctor

COMMANDS = {
    "doctor": (doctor.main, "print versions, devices, accelerations, and the command for whatever is missing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    parser = argparse.ArgumentParser(prog="streamflow", description="Rectified-flow pipelines, streamed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, description=text, epilog=f"example: streamflow {name}")
    function, _ = COMMANDS[parser.parse_args(argv).command]
    return function()
