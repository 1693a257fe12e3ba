"""`streamflow engines list|clear`: shows or deletes the TensorRT engines that are kept between runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streamflow._files import Json

if TYPE_CHECKING:
    from streamflow.acceleration.tensorrt.cache import Entry


def main(argv: Sequence[str] | None = None) -> int:
    """Run it, print the result, and return the exit code: 1 if a process is building an engine that was to be deleted."""
    parser = argparse.ArgumentParser(
        prog="streamflow engines",
        description="List or delete the TensorRT engines that are kept between runs.",
        epilog="example: streamflow engines list",
    )
    parser.add_argument("action", choices=("list", "clear"), help="list them, or delete them")
    parser.add_argument("--engine-dir", type=Path, help="default: streamflow/engines in the user's cache folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args(argv)
    from streamflow.acceleration.tensorrt import clear_engines, default_engine_dir, list_engines

    folder = arguments.engine_dir or default_engine_dir()
    if arguments.action == "list":
        engines = [describe(entry) for entry in list_engines(folder)]
        report = {"directory": str(folder), "engines": engines}
        lines = [*map(line, engines), f"{len(engines)} engines in {folder}"]
        busy = []
    else:
        count, freed, busy = clear_engines(folder)
        report = {"directory": str(folder), "deleted": count, "bytes": freed, "being_built": busy}
        lines = [f"deleted {count} engines, {freed / 1e6:.1f} MB, of {folder}"]
        lines += [f"left {stem}: a process is building it" for stem in busy]
    print(json.dumps(report) if arguments.json else "\n".join(lines))
    return 1 if busy else 0


def describe(entry: Entry) -> Json:
    """An engine as JSON. `damaged` says what is wrong with it; sizes are compared, contents are not read."""
    from streamflow.acceleration.tensorrt.cache import DamagedEngine

    known: Json = {"key": entry.stem, "damaged": None}
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


def line(engine: Json) -> str:
    """An engine as a line of text."""
    columns = [engine["key"][:24]]
    if "built" in engine:
        columns += [engine["module"], engine["gpu"], engine["tensorrt"], f"{engine['bytes'] / 1e6:.1f} MB", engine["built"]]
    if engine["damaged"]:
        columns.append(f"DAMAGED: {engine['damaged']}; it will be built again")
    return "  ".join(columns)
