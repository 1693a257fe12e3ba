"""`streamflow config`: write a commented file of settings, check one, or show what one comes to."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from streamflow._command_line import Parser
from streamflow.app import config
from streamflow.app.config import ConfigError, Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where a file is wrong or in the way; 2 for invalid arguments."""
    p = Parser(
        prog="streamflow config",
        description=__doc__,
        epilog="examples:\n  streamflow config init streamflow.yaml\n  streamflow config check streamflow.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "action", choices=ACTIONS, help="init writes all settings with their comments; check and show read a file"
    )
    p.add_argument("file", type=Path, nargs="?", default=Path("streamflow.yaml"), help="default: %(default)s")
    p.add_argument("--force", action="store_true", help="init: overwrite a file that is there")
    p.add_argument("--json", action="store_true", help="show: as JSON")
    a = p.parse_args(argv)
    try:
        return ACTIONS[a.action](a)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def init(a: argparse.Namespace) -> int:
    """Write the default settings."""
    if a.file.exists() and not a.force:
        raise FileExistsError(f"{a.file} is there already: pass --force to overwrite it, or another name")
    config.save(Settings(), a.file)
    print(f"wrote {a.file}")
    return 0


def check(a: argparse.Namespace) -> int:
    """Say that a file is right, or what is wrong with it."""
    config.load(a.file)
    print(f"{a.file} is fine")
    return 0


def show(a: argparse.Namespace) -> int:
    """Print a file's settings, the defaults filled in."""
    settings = config.load(a.file)
    print(json.dumps(settings.model_dump(mode="json")) if a.json else config.commented(settings), end="\n" if a.json else "")
    return 0


ACTIONS = {"init": init, "check": check, "show": show}
