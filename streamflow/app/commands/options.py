"""Flags of the commands that draw: one for every field of `Settings`, with the field's description as its help, beside
`--config`. The command line overrides the file, and all mistakes are reported at once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, get_args, get_origin

from streamflow._command_line import Parser
from streamflow._files import Json, read_yaml
from streamflow.app import config
from streamflow.app.config import Section, Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from streamflow.image_utils import Images

SECTIONS = ("live", "control", "server")  # read by some commands only; a file may hold them all


def parser(command: str, description: str, example: str, *sections: str) -> Parser:
    """A parser with `--config`, `--json` and the settings' flags, of `SECTIONS` those that the command reads."""
    p = Parser(
        prog=f"streamflow {command}",
        description=description,
        epilog=f"example:\n  {example}\n\nLists are YAML: --t-index-list '[0, 2]', --prompt '[[a cat, 0.6], [a dog, 0.4]]'.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML (`streamflow config init` writes one)")
    p.add_argument("--json", action="store_true", help="print one line of JSON at the end")
    group = p.add_argument_group("settings")
    for path, field in _fields(Settings):
        if (section := path.split(".")[0]) in SECTIONS and section not in sections:
            continue
        flag = f"--{path.replace('_', '-')}"
        group.add_argument(flag, dest=path, metavar="VALUE", help=(field.description or "").replace("%", "%%"))
    return p


def _fields(section: type[Section], before: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted path, field) of every field, those of sections within included."""
    for name, field in section.model_fields.items():
        inner = [kind for kind in _kinds(field) if isinstance(kind, type) and issubclass(kind, Section)]
        if inner:
            yield from _fields(inner[0], f"{before}{name}.")
        else:
            yield before + name, field


def _kinds(field: FieldInfo) -> tuple[object, ...]:
    """The types that a field may be of."""
    kind = field.annotation
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def settings(p: Parser, a: argparse.Namespace, **defaults: object) -> Settings:
    """The settings of the file and the flags, over the command's own `defaults`; exit code 2 where they are invalid."""
    try:
        data = {**defaults, **(config.load(a.config).model_dump(mode="json", exclude_unset=True) if a.config else {})}
        for path, _ in _fields(Settings):
            if (text := getattr(a, path, None)) is not None:
                _put(data, path.split("."), _value(path, text))
        return config.parse(data)
    except (ValueError, OSError) as error:
        raise SystemExit(p.failed(error, 2)) from None


def with_start(settings: Settings) -> Settings:
    """Image to image starts half way where neither `strength` nor `t_index_list` says where."""
    if settings.mode == "txt2img" or (settings.t_index_list, settings.strength) != (None, None):
        return settings
    return settings.model_copy(update={"strength": 0.5})


def _value(path: str, text: str) -> object:
    """A text stays one where the field takes texts, unless it opens a list and the field takes lists; all else is YAML."""
    if path in _TEXTS and not (path in _LISTS and text.lstrip().startswith("[")):
        return text
    return read_yaml(text)


def _put(data: Json, path: list[str], value: object) -> None:
    for name in path[:-1]:
        data[name] = data = dict(data.get(name) or {})
    data[path[-1]] = value


def draw(settings: Settings, images: Iterable[Images | None], names: Sequence[str], folder: Path) -> Json:
    """A PNG file for each of these images, or for each None of one drawn from text; the files, and the seconds that it took.
    names: of the files. They are needed only once an image has been taken."""
    from streamflow.image_utils import postprocess_image
    from streamflow.wrapper import StreamFlowWrapper

    folder.mkdir(parents=True, exist_ok=True)
    files: list[str] = []
    with StreamFlowWrapper.from_settings(settings) as wrapper:
        began = time.perf_counter()
        for frame in wrapper.stream.frames(images):
            files.append(str(folder / f"{names[len(files)]}.png"))
            postprocess_image(frame.wait().image[None])[0].save(files[-1])
        return {"files": files, "seconds": round(time.perf_counter() - began, 3)}


_TEXTS = frozenset(path for path, field in _fields(Settings) if str in _kinds(field) and bool not in _kinds(field))
_LISTS = frozenset(path for path, field in _fields(Settings) if any(get_origin(kind) is tuple for kind in _kinds(field)))
