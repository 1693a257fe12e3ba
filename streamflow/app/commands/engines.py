"""`streamflow engines list|clear|export|import`: shows or deletes the TensorRT engines that are kept between runs, and takes
the code that torch.compile has generated from one machine to another of the same kind."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streamflow._command_line import Parser, say_download, unusable
from streamflow._files import Json
from streamflow.app.commands import options

if TYPE_CHECKING:
    from streamflow.acceleration.compile_cache import CompileCache
    from streamflow.acceleration.tensorrt.cache import Entry

EXPORT = (
    "streamflow engines export sd3.cache --model stabilityai/stable-diffusion-3-medium-diffusers --width 512 --height 512"
)
IMPORT = "streamflow engines import sd3.cache"
ABOUT = f"""\
`streamflow engines export FILE` compiles a model, given by the settings of the other commands, and writes the compiled code
to a file. `streamflow engines import FILE` puts it into torch's cache, where the same model with the same settings finds it.
Both have a --help.

examples:
  streamflow engines list
  {EXPORT}
  {IMPORT}"""
TRUST = (
    "The file holds code that runs when it is imported and used: import only files that you or someone you trust has made."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it, print the result, and return the exit code. Of `clear`: 1 if a process is building an engine that was to be
    deleted. Of `export` and `import`: 1 for a file that cannot be read or written, 2 for one that is damaged or was made for
    another machine, and for invalid settings."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own = {"export": export, "import": import_}
    if arguments and arguments[0] in own:
        return own[arguments[0]](arguments[1:])
    parser = argparse.ArgumentParser(
        prog="streamflow engines",
        description="List or delete the TensorRT engines that are kept between runs; export or import compiled code.",
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "action", choices=("list", "clear", *own), help="list them, or delete them; compiled code, see below"
    )
    parser.add_argument("--engine-dir", type=Path, help="default: streamflow/engines in the user's cache folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    a = parser.parse_args(arguments)
    if a.action in own:
        parser.error(f"{a.action} comes first, before its options: streamflow engines {a.action} FILE")
    from streamflow.acceleration.tensorrt import clear_engines, default_engine_dir, list_engines

    folder = a.engine_dir or default_engine_dir()
    if a.action == "list":
        engines = [describe(entry) for entry in list_engines(folder)]
        report = {"directory": str(folder), "engines": engines}
        lines = [*map(line, engines), f"{len(engines)} engines in {folder}"]
        busy = []
    else:
        count, freed, busy = clear_engines(folder)
        report = {"directory": str(folder), "deleted": count, "bytes": freed, "being_built": busy}
        lines = [f"deleted {count} engines, {freed / 1e6:.1f} MB, of {folder}"]
        lines += [f"left {stem}: a process is building it" for stem in busy]
    print(json.dumps(report) if a.json else "\n".join(lines))
    return 1 if busy else 0


def export(argv: Sequence[str]) -> int:
    """Compile a model, draw with it, and write the compiled code to a file."""
    about = "Compiles a model, draws with it, and writes the compiled code to a file for machines of the same kind."
    p = options.parser("engines export", about, EXPORT, unused=("similar_image_filter",))
    p.add_argument("file", type=Path, help="the file to write")
    a = p.parse_args(argv)
    if not a.file.parent.is_dir():
        p.error(f"{a.file.parent} is no folder: make it before anything is compiled for {a.file.name}")
    settings = options.settings(p, a, acceleration={"kind": "compile"})
    if settings.acceleration.kind not in ("compile", "auto"):
        p.error(f"acceleration {settings.acceleration.kind} compiles nothing by torch.compile: choose compile")
    from streamflow.acceleration import compile_cache
    from streamflow.wrapper import StreamFlowWrapper

    say_download(settings.model)
    try:
        with StreamFlowWrapper.from_settings(settings) as wrapper:  # which draws, to warm up
            made = compile_cache.save(a.file, wrapper.stream.device)
    except options.ERRORS as error:
        return options.failed(p, error)
    return _report(a, "exported", made)


def import_(argv: Sequence[str]) -> int:
    """Put the compiled code of a file into torch's cache on disk."""
    p = Parser(
        prog="streamflow engines import",
        description=f"Puts compiled code of a file into torch's cache on disk. {TRUST}",
        epilog=f"example: {IMPORT}",
    )
    p.add_argument("file", type=Path, help="a file that `streamflow engines export` has written")
    p.add_argument("--device", help="for which it was made; default: a GPU where there is one")
    p.add_argument("--json", action="store_true", help="print one line of JSON")
    a = p.parse_args(argv)
    if a.device and (problem := unusable(a.device)):
        p.error(f"--device {a.device}: {problem}")
    from streamflow.acceleration import compile_cache
    from streamflow.models.loading import default_device

    try:
        made = compile_cache.load(a.file, a.device or default_device())
    except (ValueError, RuntimeError) as error:
        return p.failed(error, 2)
    except OSError as error:
        return p.failed(error, 1)
    return _report(a, "imported", made)


def _report(a: argparse.Namespace, done: str, made: CompileCache) -> int:
    found: Json = {"file": str(a.file), "entries": made.entries, "bytes": made.bytes, "made_for": dict(made.made_for)}
    text = f"{done} {made.entries} entries, {made.bytes / 1e6:.1f} MB: {a.file}"
    print(json.dumps(found) if a.json else text)
    return 0


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
