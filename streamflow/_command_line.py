"""Shared by the commands: a parser with two levels of help that prints an error in one line, and argument types that check
numbers. `quiet_libraries` hides what the libraries print, and `say_download` prints one line instead."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamflow.pretrained import MODELS

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}


class Parser(argparse.ArgumentParser):
    """`--help` shows the options that matter, `--help-all` every one. An error is printed in one line, with exit code 2.
    typed: the options with a value that were given, as they were typed, by their destinations. verbose: show where errors
    were raised."""

    def __init__(self, **given: Any) -> None:
        super().__init__(allow_abbrev=False, **given)  # --mode would be taken for --model where there is no --mode
        self._rare: dict[argparse.Action, str | None] = {}
        self.typed: dict[str, str] = {}
        self.verbose = False
        self.register("action", None, _Store)

    def add_rare(self, action: argparse.Action) -> None:
        """Show this option under `--help-all` only."""
        if not self._rare:
            self.add_argument(
                "--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help="show every option and exit"
            )
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


class _Store(argparse.Action):
    """Store the value, and in `Parser.typed` how the option was written."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: Any) -> None:
        assert isinstance(parser, Parser)
        setattr(namespace, self.dest, values)
        if option:
            parser.typed[self.dest] = option


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


def quiet_libraries() -> None:
    """Hide the warnings, log messages below errors, and progress bars of torch, diffusers, transformers and torchao."""
    warnings.filterwarnings("ignore", module=r"(?!streamflow)")
    for name in ("diffusers", "transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def say_download(model: str) -> None:
    """Print a line where this model is about to be downloaded from a hub, since `quiet_libraries` hides the progress bars.
    Nothing for the embedded models, files, folders, and models that are in the hub's cache."""
    if model in MODELS or Path(model).expanduser().exists():
        return
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        found = isinstance(try_to_load_from_cache(model, "model_index.json"), str)
    except HFValidationError:  # no hub id: what loads the model says so
        return
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model, repo_type="model"))
    whole = found and not any(folder.glob("blobs/*.incomplete"))
    if not whole and not constants.HF_HUB_OFFLINE:
        print(f"downloading {model} from {constants.ENDPOINT} to {folder}", file=sys.stderr, flush=True)


def unusable(device: str) -> str | None:
    """The reason why torch cannot use this device, or None."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        return str(error).splitlines()[0]
    return None
