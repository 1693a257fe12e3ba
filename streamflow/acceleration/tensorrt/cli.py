"""`streamflow engines list|clear`: what is in the engine cache, and emptying it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args(argv)
    return ACTIONS[arguments.action](arguments.engine_dir, arguments.json)


def show(directory: Path, as_json: bool) -> int:
    """One engine a line."""
    engines = [told(entry) for entry in list_engines(directory)]
    if as_json:
        print(json.dumps({"directory": str(directory), "engines": engines}))
        return 0
    for one in engines:
        print(line(one))
    print(f"{len(engines)} engines in {directory}")
    return 0


def told(entry: Entry) -> dict[str, Any]:
    """What an engine is; `damaged` says what is wrong with it. Sizes are compared, contents are not read."""
    known: dict[str, Any] = {"key": entry.stem, "damaged": None}
    try:
        record, size = entry.read_record(), entry.engine.stat().st_size
        facts = record["facts"]
        known |= {"module": facts["class"], "gpu": facts["gpu"]["name"], "tensorrt": facts["tensorrt"]}
        known |= {"bytes": size, "built": record["built"]}
        if size != record["bytes"]:
            known["damaged"] = f"{size} bytes, not {record['bytes']}"
    except (DamagedEngine, OSError, KeyError, TypeError) as error:
        known["damaged"] = str(error)
    return known


def line(engine: dict[str, Any]) -> str:
    """The same in a line."""
    parts = [engine["key"][:24]]
    if "built" in engine:
        parts += [engine["module"], engine["gpu"], engine["tensorrt"], f"{engine['bytes'] / 1e6:.1f} MB", engine["built"]]
    if engine["damaged"]:
        parts.append(f"DAMAGED: {engine['damaged']}; it will be built anew")
    return "  ".join(parts)


def clear(directory: Path, as_json: bool) -> int:
    """Delete them all; 1 where a process is building some just now."""
    count, freed, busy = clear_engines(directory)
    if as_json:
        print(json.dumps({"directory": str(directory), "deleted": count, "bytes": freed, "being_built": busy}))
        return 1 if busy else 0
    print(f"deleted {count} engines, {freed / 1e6:.1f} MB, of {directory}")
    for stem in busy:
        print(f"left {stem}: a process is building it")
    return 1 if busy else 0


ACTIONS = {"list": show, "clear": clear}
