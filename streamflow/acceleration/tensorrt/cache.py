"""The engine cache. An engine's name is the hash of its facts: everything that changes its bytes. A JSON record beside it
holds the facts and a checksum. Files are written whole or not at all, and one process builds while others wait for it."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamflow._environment import installed_version
from streamflow._files import Json, replacing
from streamflow._version import __version__
from streamflow.acceleration import Part
from streamflow.acceleration.tensorrt.library import Target
from streamflow.acceleration.tensorrt.options import Options, Profile

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments

logger = logging.getLogger(__name__)

FORMAT = 1
DIGEST = 20  # bytes
EXPORT = 1  # increase it when the exported graph changes: older engines are then built again
_STEM = re.compile(rf"\.?([a-z]+-[0-9a-f]{{{2 * DIGEST}}})")
_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.Size)
_OF_NN_MODULE = frozenset(vars(nn.Module())) - {"training"}

# -- the facts ------------------------------------------------------------------------------------------------------------


def facts(part: Part, profile: Profile, options: Options, target: Target, version: str) -> Json:
    """All that changes an engine's bytes, as JSON. version: the name and version of TensorRT."""
    return {
        "part": part.name,
        "class": type(part.module).__qualname__,
        "weights": weights(part.module),
        "structure": structure(part.module),
        "inputs": {name: str(value.dtype).removeprefix("torch.") for name, value in part.inputs.items()},
        "shared": sorted(part.shared),
        "profile": {name: asdict(r) for name, r in profile.ranges.items()},
        "tensorrt": version,
        "gpu": {"name": target.name, "capability": list(target.capability)},
        "builder": {name: getattr(options, name) for name in ("tf32", "workspace_gb", "optimization_level")},
        "export": {"version": EXPORT, **versions()},
    }


def versions() -> dict[str, str | None]:
    """The versions of the packages that take part in an export."""
    packages = ("torch", "diffusers", "onnx", "onnxscript")
    return {"streamflow": __version__, **{name: installed_version(name) for name in packages}}


def key(facts: Arguments) -> str:
    """The hash of facts, in hex."""
    return digest(json.dumps(facts, sort_keys=True).encode())


def digest(data: Any) -> str:
    """The hash of bytes, in hex."""
    return hashlib.blake2b(data, digest_size=DIGEST).hexdigest()


def weights(module: nn.Module) -> str:
    """The hash of names, dtypes, shapes and bytes of the state, adapters (LoRA) included, and of all buffers."""
    tensors = {**dict(module.named_buffers()), **module.state_dict()}
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter's lock
        return digest("\n".join(sorted(pool.map(_tensor, tensors.keys(), tensors.values()))).encode())


def structure(module: nn.Module) -> str:
    """The hash of each submodule's class, code of `forward` and attributes."""
    lines = []
    for name, child in module.named_modules():
        held = {key: value for key, value in vars(child).items() if key not in _OF_NN_MODULE}
        lines.append(f"{name} {_described(type(child).forward)} {_described(held)} {type(child)}")
    return digest("\n".join(lines).encode())


def _tensor(name: str, value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{name} {value!r}"
    flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{name} {value.dtype} {list(value.shape)} {digest(flat.numpy())}"


def _described(value: Any, depth: int = 4) -> str:
    """A text without addresses, the same in every process: plain values by `repr`, functions by code and closure, other
    objects by class."""
    inner = functools.partial(_described, depth=depth - 1)
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return _tensor("tensor", value)
    if depth and isinstance(value, Mapping):
        return str(sorted((repr(key), inner(item)) for key, item in value.items()))
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        items = [inner(item) for item in value]
        return str(sorted(items) if isinstance(value, (set, frozenset)) else items)
    if depth and isinstance(value, functools.partial):
        return f"partial {inner([value.func, value.args, value.keywords])}"
    if (code := getattr(value, "__code__", None)) is None:
        return str(type(value))
    constants = [constant for constant in code.co_consts if isinstance(constant, _PLAIN)]
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()] if depth else []
    return f"{value.__qualname__} {digest(code.co_code + repr((constants, code.co_names)).encode())} {inner(cells)}"


# -- the files ------------------------------------------------------------------------------------------------------------


class DamagedEngine(RuntimeError):
    """A file in the cache is not the engine that its record describes."""


@dataclass
class Entry:
    """One engine of a cache folder. `engine`: its file. `record`: the file of its facts and its checksum. `scratch`: a
    folder for the files of a build, which belongs to the holder of the lock."""

    directory: Path
    stem: str

    def __post_init__(self) -> None:
        self.engine = self.directory / f"{self.stem}.engine"
        self.record = self.directory / f"{self.stem}.json"
        self.scratch = self.directory / f".{self.stem}.work"

    def read_record(self) -> Json:
        """The record. DamagedEngine if it is missing, unreadable or of another engine."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            if record["format"] != FORMAT or record["key"] != key(record["facts"]) or not self.stem.endswith(record["key"]):
                raise ValueError("it describes another engine")
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise DamagedEngine(f"{self.record.name}: {type(error).__name__}: {error}") from error
        return record

    def read(self) -> bytes:
        """The engine. DamagedEngine if it is not, byte for byte, the one that the record describes."""
        record = self.read_record()
        try:
            data = self.engine.read_bytes()
        except OSError as error:
            raise DamagedEngine(f"{self.engine.name}: {error}") from error
        if (len(data), digest(data)) != (record.get("bytes"), record.get("checksum")):
            raise DamagedEngine(f"{self.engine.name} has {len(data)} bytes, not those {record.get('bytes')} that were built")
        return data

    def write(self, data: bytes, facts: Arguments) -> None:
        """Write both files, the record last. The lock must be held."""
        record = {"format": FORMAT, "key": key(facts), "facts": facts, "bytes": len(data), "checksum": digest(data)}
        record["built"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.record.unlink(missing_ok=True)
        for path, content in ((self.engine, data), (self.record, json.dumps(record, indent=1, sort_keys=True).encode())):
            with replacing(path) as file:
                file.write(content)

    def sweep(self) -> None:
        """Delete what an interrupted build has left. The lock must be held."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for path in (self.scratch, *self.directory.glob(f".{self.stem}.*.tmp")):
            with suppress(OSError):
                path.unlink()

    def locked(self, timeout: float = -1) -> AbstractContextManager:
        """Hold the lock of this entry among all processes. filelock.Timeout: another one holds it for `timeout` seconds."""
        from filelock import FileLock

        folder = self.directory / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{self.stem}.lock").acquire(timeout)


def own_folder(directory: Path) -> Path:
    """The folder, created for this user only if it is missing.

    PermissionError, on POSIX, if other users can write to it: they could put an engine there, which runs as code.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix":
        status, user, remedy = directory.stat(), os.geteuid(), "or pass another engine_dir"
        if (owner := status.st_uid) not in (0, user):
            problem = f"the engine cache {directory} belongs to user {owner}, and this process runs as user {user}"
            raise PermissionError(f"{problem}: `chown {user} {directory}`, {remedy}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problem = f"other users can write to the engine cache {directory} (mode {stat.S_IMODE(status.st_mode):o})"
            raise PermissionError(f"{problem}: `chmod go-w {directory}`, {remedy}")
    return directory


def entry_for(directory: Path, name: str, facts: Arguments) -> Entry:
    """The entry of the engine with these facts, whether it exists or not."""
    return Entry(Path(directory), f"{name}-{key(facts)}")


def get_or_build(entry: Entry, facts: Arguments, build: Callable[[Path], bytes], rebuild: bool = False) -> bytes:
    """The engine out of the cache, or from `build(scratch folder)`, which is then kept. A damaged engine is logged and built
    again. PermissionError: see `own_folder`."""
    own_folder(entry.directory)
    with entry.locked():
        if not rebuild and (entry.engine.exists() or entry.record.exists()):
            try:
                return entry.read()
            except DamagedEngine as error:
                logger.warning("engine cache: %s; building anew", error)
        entry.sweep()
        entry.scratch.mkdir()
        try:
            data = build(entry.scratch)
            entry.write(data, facts)
        finally:
            entry.sweep()
        logger.info("%s: kept as %s", entry.stem, entry.engine)
        return data


def list_engines(directory: Path, patterns: Sequence[str] = ("*-*.engine", "*-*.json")) -> list[Entry]:
    """All entries of a folder with such files, damaged ones too, by name. Empty if there is no folder."""
    found = {_STEM.fullmatch(path.stem) for pattern in patterns for path in Path(directory).glob(pattern)}
    return [Entry(Path(directory), stem) for stem in sorted({match.group(1) for match in found if match})]


def clear_engines(directory: Path) -> tuple[int, int, list[str]]:
    """Delete all engines of a folder. Returns how many, the bytes freed, and the names of those that a process is building
    at the moment, which stay. Other files stay, too."""
    from filelock import Timeout

    count, freed, busy = 0, 0, []
    for entry in list_engines(directory, ("*-*.engine", "*-*.json", ".*-*.work")):
        try:
            with entry.locked(timeout=0):
                for path in (path for path in (entry.record, entry.engine) if path.exists()):
                    count, freed = count + (path == entry.engine), freed + path.stat().st_size
                    path.unlink()
                entry.sweep()
        except Timeout:
            busy.append(entry.stem)
    return count, freed, busy
