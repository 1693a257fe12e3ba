"""Engines on disk. An engine's name is a hash of all that changes its bytes; beside it lies a JSON that says those facts
and its checksum. Written whole or not at all; one process builds while others wait. Knows bytes and facts, no TensorRT."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamflow._files import replacing
from streamflow.acceleration.tensorrt.fingerprint import DIGEST, digest, key

logger = logging.getLogger(__name__)

FORMAT = 1
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
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
        except (OSError, ValueError, RecursionError) as error:
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
        for path, content in ((self.engine, data), (self.record, json.dumps(record, indent=1, sort_keys=True).encode())):
            with replacing(path) as file:
                file.write(content)

    def remove(self) -> int:
        """Delete all of it; how many bytes that freed. The lock must be held."""
        freed = sum(path.stat().st_size for path in (self.engine, self.record) if path.exists())
        self.record.unlink(missing_ok=True)
        self.engine.unlink(missing_ok=True)
        self.sweep()
        return freed

    def sweep(self) -> None:
        """Delete what a build that was killed has left. The lock must be held."""
        if self.scratch.is_symlink() or self.scratch.is_file():
            self.scratch.unlink()
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


def own_folder(directory: Path) -> Path:
    """The folder, made for this user alone where it is missing.

    PermissionError, on POSIX: others can write to it, and could put an engine there, whose code would run on the GPU.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix":
        status, user = directory.stat(), os.geteuid()
        if status.st_uid not in (0, user):
            raise PermissionError(
                f"the engine cache {directory} belongs to user {status.st_uid}, and this process runs as user {user}: "
                f"`chown {user} {directory}`, or give another engine_dir"
            )
        if status.st_mode & OTHERS_WRITE:
            raise PermissionError(
                f"other users can write to the engine cache {directory} (mode {stat.S_IMODE(status.st_mode):o}): "
                f"`chmod go-w {directory}`, or give another engine_dir"
            )
    return directory


def entry_for(directory: Path, name: str, facts: Mapping[str, Any]) -> Entry:
    """Where the engine with these facts is or will be."""
    return Entry(Path(directory), f"{name}-{key(facts)}")


def get_or_build(entry: Entry, facts: Mapping[str, Any], build: Callable[[Path], bytes], rebuild: bool = False) -> bytes:
    """The engine with these facts, out of the cache, or by `build(scratch folder)`, then kept. Of several processes that
    want the same one, one builds. A damaged one is told of in the log and built anew. PermissionError: as `own_folder`."""
    own_folder(entry.directory)
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
