"""Shared by the commands: a parser with two levels of help that prints an error in one line, and argument types that check
numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any


class Parser(argparse.ArgumentParser):
    """`--help` shows the options that matter, `--help-all` every one. An error is printed in one line, with exit code 2."""

    def __init__(self, **given: Any) -> None:
        super().__init__(allow_abbrev=False, **given)  # --mode would be taken for --model where there is no --mode
        self._rare: dict[argparse.Action, str | None] = {}

    def add_rare(self, action: argparse.Action) -> None:
        """Show this option under `--help-all` only."""
        if not self._rare:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every option and exit")
        self._rare[action], action.help = action.help, argparse.SUPPRESS

    def show_all(self) -> None:
        """Show every option in the help."""
        for action, text in self._rare.items():
            action.help = text

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def failed(self, error: object, code: int = 1) -> int:
        """Print what ended the command, and return its exit code."""
        print(f"{self.prog}: error: {error}", file=sys.stderr)
        return code


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        assert isinstance(parser, Parser)
        parser.show_all()
        parser.print_help()
        parser.exit()


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `least`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return integer


def above(least: float) -> Callable[[str], float]:
    """An argparse type: a finite number above `least`."""

    def number(text: str) -> float:
        value = float(text)
        if not least < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number above {least:g}")
        return value

    return number
