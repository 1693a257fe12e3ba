"""Files that users and this package write: YAML and JSON as plain data within limits, and files that are written
whole or not at all. Knows no settings and no engines."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml
from yaml.composer import ComposerError

Json = dict[str, Any]  # an object of JSON, or a mapping of YAML
LARGEST = 2**20  # bytes of a file
DEEPEST = 32  # levels of lists and mappings
LONGEST = 64  # characters of a number
SPECIAL = ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")  # how YAML reads the keys << and =


@contextmanager
def replacing(path: Path, mode: int = 0o600, durable: bool = True) -> Iterator[IO[bytes]]:
    """A new file, open for writing, that takes the place of `path` when the block ends without an error, and is deleted
    otherwise. Until then it lies in the same folder under a name that nobody can guess.

    mode: its permissions. durable: wait until it is on the disk, so that it survives a loss of power.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_text(path: Path) -> str:
    """A file's text. ValueError: more than `LARGEST` bytes, or no UTF-8. OSError: it cannot be read."""
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"{path.name} has more than {LARGEST:,} bytes")
    return data.decode("utf-8-sig")


def read_yaml(text: str) -> Any:
    """A YAML document as lists, mappings, texts, numbers and dates.

    ValueError: it is no YAML, has aliases, tags such as !!int, a key twice, a number of more than `LONGEST` characters or
    more than `DEEPEST` levels.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{position}{error.problem}") from error
    except yaml.YAMLError as error:  # of characters that YAML does not allow
        raise ValueError(" ".join(str(error).split())) from error


def read_json(text: str) -> Any:
    """A JSON document. ValueError: it is no JSON, has a key twice, or is nested without end."""
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise ValueError("lists and objects are nested too deeply") from error


def _without_repetition(pairs: list[tuple[str, object]]) -> Json:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} is given more than once")
    return made


class _Loader(yaml.SafeLoader):
    """Builds trees only: an alias would let a short file stand for data of any size."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "an alias (*name) is not allowed: write the value itself", mark)
        if self.peek_event().tag is not None:
            raise ComposerError(None, None, "a tag (!name) is not allowed: leave it out", mark)
        if self._depth == DEEPEST:
            raise ComposerError(None, None, f"there are more than {DEEPEST} levels", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST:
            raise ComposerError(None, None, f"a number has more than {LONGEST} characters", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        seen: set[str] = set()
        for key in keys:
            name = key.value if key.tag in SPECIAL else str(self.construct_object(key, deep=True))
            if name == "<<" or name in seen:
                wrong = "a merge key (<<) is not allowed" if name == "<<" else f"the key {name!r} is given more than once"
                raise yaml.constructor.ConstructorError(None, None, wrong, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
