"""Shared by the commands: a parser that prints an error in one line, and argument types that check numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """Prints an error in one line, and exits with code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def failed(self, error: object, code: int = 1) -> int:
        """Print what ended the command, and return its exit code."""
        print(f"{self.prog}: error: {error}", file=sys.stderr)
        return code


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
