"""Engines on disk. An engine's name is a hash of all that changes its bytes; beside it lies a JSON that says those facts
and its checksum. Written whole or not at all; one process builds while others wait. Knows bytes and facts, no TensorRT."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamflow.acceleration.tensorrt.fingerprint import DIGEST, digest, key

logger = logging.getLogger(__name__)

FORMAT = 1
_LOCKS = ".locks"
_STEM = re.compile(rf"[a-z]+-[0-9a-f]{{{2 * DIGEST}}}")


class DamagedEngine(RuntimeError):
    """A file in the cache is not the engine that its record tells of."""


@dataclass(frozen=True)
class Entry:
    """One engine: its file, and beside it the record."""

    directory: Path
    stem: str

    @property
    def engine(self) -> Path:
        """The engine's file."""
        return self.directory / f"{self.stem}.engine"

    @property
    def record(self) -> Path:
        """The file that says what the engine was built from."""
        return self.directory / f"{self.stem}.json"

    @property
    def scratch(self) -> Path:
        """A folder for what a build needs on the way; whoever holds the lock owns it."""
        return self.directory / f".{self.stem}.work"

    def read_record(self) -> dict[str, Any]:
        """The record. DamagedEngine where it is missing, unreadable or of another format."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DamagedEngine(f"{self.record.name}: {error}") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise DamagedEngine(f"{self.record.name} is not a record of format {FORMAT}")
        return record

    def read(self) -> bytes:
        """The engine. DamagedEngine where it is cut short, altered, or another one than its record tells of."""
        record = self.read_record()
        try:
            data = self.engine.read_bytes()
        except OSError as error:
            raise DamagedEngine(f"{self.engine.name}: {error}") from error
        if record.get("key") != key(record.get("facts", {})) or not self.stem.endswith(record["key"]):
            raise DamagedEngine(f"{self.record.name} tells of another engine")
        if (len(data), digest(data)) != (record.get("bytes"), record.get("checksum")):
            raise DamagedEngine(f"{self.engine.name} has {len(data)} bytes, not those {record.get('bytes')} that were built")
        return data

    def write(self, data: bytes, facts: Mapping[str, Any]) -> None:
        """Put an engine in place: each file under a temporary name first, the record last."""
        record = {
            **{"format": FORMAT, "key": key(facts), "bytes": len(data), "checksum": digest(data)},
            **{"built": datetime.now(UTC).isoformat(timespec="seconds"), "facts": facts},
        }
        self.record.unlink(missing_ok=True)
        _replace(self.engine, data)
        _replace(self.record, json.dumps(record, indent=1, sort_keys=True).encode())

    def remove(self) -> int:
        """Delete all of it; how many bytes that freed. The lock must be held."""
        freed = sum(path.stat().st_size for path in (self.engine, self.record) if path.exists())
        self.record.unlink(missing_ok=True)
        self.engine.unlink(missing_ok=True)
        self.sweep()
        return freed

    def sweep(self) -> None:
        """Delete what a build that was killed has left. The lock must be held."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for left in self.directory.glob(f".{self.stem}.*.tmp"):
            left.unlink(missing_ok=True)

    @contextmanager
    def locked(self, wait: bool = True) -> Iterator[bool]:
        """Hold the lock that only one process has, and yield whether it is held: always where `wait`."""
        from filelock import FileLock, Timeout

        folder = self.directory / _LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{self.stem}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                yield False
                return
            logger.info("%s: another process builds this engine, waiting for it", self.stem)
            lock.acquire()
        try:
            yield True
        finally:
            lock.release()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def entry_for(directory: Path, name: str, facts: Mapping[str, Any]) -> Entry:
    """Where the engine with these facts is or will be."""
    return Entry(Path(directory), f"{name}-{key(facts)}")


def get_or_build(entry: Entry, facts: Mapping[str, Any], build: Callable[[Path], bytes], rebuild: bool = False) -> bytes:
    """The engine with these facts, out of the cache, or by `build(scratch folder)`, then kept. Of several processes that
    want the same one, one builds. A damaged one is told of in the log and built anew."""
    entry.directory.mkdir(parents=True, exist_ok=True)
    with entry.locked():
        if not rebuild and (data := _kept(entry)) is not None:
            return data
        entry.sweep()
        entry.scratch.mkdir()
        try:
            data = build(entry.scratch)
            entry.write(data, facts)
        finally:
            entry.sweep()
        logger.info("%s: kept as %s", entry.stem, entry.engine)
        return data


def _kept(entry: Entry) -> bytes | None:
    if not entry.engine.exists() and not entry.record.exists():
        return None
    try:
        data = entry.read()
    except DamagedEngine as error:
        logger.warning("engine cache: %s; building anew", error)
        return None
    logger.info("%s: taken from %s", entry.stem, entry.directory)
    return data


def list_engines(directory: Path) -> list[Entry]:
    """All entries of a folder, whole or not, by name. No folder: none."""
    return _entries(directory, {path.stem for kind in ("engine", "json") for path in Path(directory).glob(f"*-*.{kind}")})


def _entries(directory: Path, stems: set[str]) -> list[Entry]:
    return [Entry(Path(directory), stem) for stem in sorted(stems) if _STEM.fullmatch(stem)]


def clear_engines(directory: Path) -> tuple[int, int, list[str]]:
    """Delete all engines of a folder: (how many, bytes freed, names of those that a process is building just now). Other
    files are left alone."""
    count = freed = 0
    busy = []
    abandoned = {path.name[1 : -len(".work")] for path in Path(directory).glob(".*-*.work")}
    for entry in _entries(directory, abandoned | {entry.stem for entry in list_engines(directory)}):
        with entry.locked(wait=False) as held:
            if not held:
                busy.append(entry.stem)
                continue
            count += entry.engine.exists()
            freed += entry.remove()
    return count, freed, busy
