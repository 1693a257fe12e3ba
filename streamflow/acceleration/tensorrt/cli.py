"""`streamflow engines list|clear`: what is in the engine cache, and emptying it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from streamflow.acceleration.tensorrt.cache import DamagedEngine, Entry, clear_engines, list_engines
from streamflow.acceleration.tensorrt.options import default_engine_dir

DESCRIPTION = "List or delete the TensorRT engines that are kept between runs."


def main(argv: Sequence[str] | None = None) -> int:
    """Do it, print it, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="streamflow engines", description=DESCRIPTION, epilog="example: streamflow engines list"
    )
    parser.add_argument("action", choices=ACTIONS, help="list them, or delete them")
    parser.add_argument("--engine-dir", type=Path, default=default_engine_dir(), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    return ACTIONS[arguments.action](arguments.engine_dir)


def show(directory: Path) -> int:
    """One engine a line."""
    entries = list_engines(directory)
    for entry in entries:
        print(line(entry))
    print(f"{len(entries)} engines in {directory}")
    return 0


def line(entry: Entry) -> str:
    """What an engine is, or what is wrong with it. Sizes are compared, contents are not read."""
    try:
        record = entry.read_record()
        size = entry.engine.stat().st_size
        facts = record["facts"]
        state = "" if size == record["bytes"] else f"  DAMAGED: {size} bytes, not {record['bytes']}; it will be built anew"
        gpu = facts["gpu"]["name"]
        told = f"{facts['class']}  {gpu}  {facts['tensorrt']}  {size / 1e6:.1f} MB  {record['built']}"
    except (DamagedEngine, OSError, KeyError, TypeError) as error:
        return f"{entry.stem[:24]}  DAMAGED: {error}; it will be built anew"
    return f"{entry.stem[:24]}  {told}{state}"


def clear(directory: Path) -> int:
    """Delete them all; 1 where a process is building some just now."""
    count, freed, busy = clear_engines(directory)
    print(f"deleted {count} engines, {freed / 1e6:.1f} MB, of {directory}")
    for stem in busy:
        print(f"left {stem}: a process is building it")
    return 1 if busy else 0


ACTIONS = {"list": show, "clear": clear}
