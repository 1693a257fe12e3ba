"""Flags of the commands that draw: one for every field of `Settings`, with the field's description as its help, beside
`--config`. The command line overrides the file, and all mistakes are reported at once."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Literal, Union, get_args, get_origin

from tqdm import tqdm

from streamflow._command_line import Parser, quiet_libraries, say_download, unusable
from streamflow._files import Json, read_yaml
from streamflow.app import config
from streamflow.app.config import Section, Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from streamflow.image_utils import Images

SECTIONS = ("video", "live", "control", "server")  # read by some commands only; a file may hold them all
GROUPS = {  # the settings that `--help` shows
    "image": ("prompt", "strength", "seed", "width", "height"),
    "model": ("model", "device"),
    "sampling": ("num_inference_steps", "cfg_type", "guidance_scale"),
    "speed": ("acceleration.kind",),
    "live": ("live.target_fps",),
}
WRONG = (ValueError, TypeError, ImportError, NotImplementedError)  # of arguments: exit code 2
# Errors that end a command in one line; those that are not of arguments with exit code 1.
ERRORS = (*WRONG, OSError, MemoryError, RuntimeError, FloatingPointError)
SHORT = {
    "num_inference_steps": "--steps",
    "acceleration.kind": "--accelerate",
    "references": "--reference",
    "controlnet.net": "--control-net",
    "controlnet.maker": "--control-maker",
    "control.page": "--osc-page",
}  # beside the setting's own name


def parser(
    command: str,
    description: str,
    example: str,
    *sections: str,
    unused: Sequence[str] = ("mode",),
    defaults: Mapping[str, object] | None = None,
) -> Parser:
    """A parser with `--config`, `--json`, `--verbose` and the settings' flags: of `SECTIONS` those that the command reads,
    and no flag for a setting that it does not use. A file may hold them all. defaults: the command's own, for the help."""
    p = Parser(
        prog=f"streamflow {command}",
        description=description,
        epilog=f"example:\n  {example}\n\nLists are YAML: --t-index-list '[0, 2]', --prompt '[[a cat, 0.6], [a dog, 0.4]]'.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML (`streamflow config init` writes one)")
    p.add_argument("--json", action="store_true", help="print one line of JSON at the end")
    p.add_argument("-v", "--verbose", action="store_true", help="show the messages and progress bars of the libraries too")
    fields = {path: field for path, field in _fields(Settings) if _is_read(path, sections, unused)}
    own = defaults or {}
    texts = {path: _help(field, own.get(path, field.default)) for path, field in fields.items()}
    shown = {path: title for title, paths in GROUPS.items() for path in paths if path in fields}
    groups = {title: p.add_argument_group(title) for title in dict.fromkeys(shown.values())}
    rest = p.add_argument_group("more settings")
    for path in (*shown, *(path for path in fields if path not in shown)):
        flag, given = f"--{path.replace('_', '-')}", {"dest": path, "metavar": _metavar(fields[path])}
        group = groups.get(shown.get(path, ""), rest)
        if short := SHORT.get(path):
            action = group.add_argument(short, help=texts[path], **given)
            if group is rest:
                p.add_rare(action)
            p.add_rare(rest.add_argument(flag, help=f"the same as {short}", **given))
        elif group is rest:
            p.add_rare(rest.add_argument(flag, help=texts[path], **given))
        else:
            group.add_argument(flag, help=texts[path], **given)
    return p


def _is_read(path: str, sections: Sequence[str], unused: Sequence[str]) -> bool:
    section = path.split(".")[0]
    return (section not in SECTIONS or section in sections) and section not in unused


def _metavar(field: FieldInfo) -> str:
    """What a flag takes: its choices, or the kind of its value."""
    kinds = _kinds(field)
    choices = [one for kind in kinds if get_origin(kind) is Literal for one in get_args(kind)]
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    names = {bool: "{true,false}", int: "N", float: "X", str: "TEXT"}
    return next((names[kind] for kind in kinds if isinstance(kind, type) and kind in names), "VALUE")


def _help(field: FieldInfo, default: object) -> str:
    """The description, and the default where the description does not say it."""
    text = (field.description or "").replace("empty:", "default:").replace("%", "%%")
    if default in (None, "", (), {}) or "default" in text:
        return text
    return f"{text} (default: {str(default).lower() if isinstance(default, bool) else default})"


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
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def settings(p: Parser, a: argparse.Namespace, **defaults: object) -> Settings:
    """The settings of the file and the flags, over the command's own `defaults`; exit code 2 where they are invalid or torch
    cannot use the device. The libraries' messages are hidden from here on, without `--verbose`."""
    if not a.verbose:
        quiet_libraries()
    try:
        data = {**defaults, **(config.load(a.config).model_dump(mode="json", exclude_unset=True) if a.config else {})}
        if "mode" in defaults:
            data["mode"] = defaults["mode"]  # the command's, whatever the file says
        for path, _ in _fields(Settings):
            if (text := getattr(a, path, None)) is not None:
                _put(data, path.split("."), _value(path, text))
        made = config.parse(data)
        if made.device not in (None, "cpu") and (problem := unusable(made.device)):
            raise ValueError(f"device: torch cannot use {made.device}: {problem}")
    except (ValueError, OSError) as error:
        failed(p, error)
        raise SystemExit(2) from None
    p.verbose = a.verbose
    return made


def failed(p: Parser, error: Exception) -> int:
    """Print what ended the command, with options in the place of the settings' names; the exit code. With --verbose it is
    raised again, which shows where it came from."""
    if p.verbose:
        raise error
    message = "\n".join(_with_options(p, line) for line in str(error).splitlines())
    return p.failed(message, 2 if isinstance(error, WRONG) else 1)


def _with_options(p: Parser, line: str) -> str:
    """A line of a message: the setting that it begins with as the option that was typed, the others as options too."""
    start, _, text = line.partition(": ")
    while start not in p.typed and "." in start:  # an entry of a list or a mapping
        start = start.rpartition(".")[0]
    if start in p.typed:
        return f"{p.typed[start]}: {text}"
    own = start == "settings"  # a message of `Settings`, in which every such word is a setting
    names = r"\w+" if own else r"^\w+|\b[a-z]+_\w+"
    return re.sub(names, lambda word: p.typed.get(word[0]) or _option(word[0]), text if own else line)


def _option(name: str) -> str:
    """The option of a setting whose name has several words, or the word itself."""
    return SHORT.get(name, f"--{name.replace('_', '-')}") if "_" in name and name in Settings.model_fields else name


def _value(path: str, text: str) -> object:
    """A text stays one where the field takes texts, unless it opens a list and the field takes lists; where it takes a list
    of texts only, it is the only one of that. All else is YAML."""
    a_list = path in _LISTS and text.lstrip().startswith("[")
    if not a_list and path in _ONLY_LISTS:
        return [text]
    if not a_list and path in _TEXTS:
        return text
    try:
        return read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _put(data: Json, path: list[str], value: object) -> None:
    for name in path[:-1]:
        data[name] = data = dict(data.get(name) or {})
    data[path[-1]] = value


def draw(
    settings: Settings,
    images: Iterable[Images | None],
    names: Sequence[str],
    folder: Path,
    prompts: Sequence[str] = (),
    count: int | None = None,
    quiet: bool = False,
) -> Json:
    """A PNG file for each of these images, or for each None of one drawn from text; the files, and the seconds it took.
    names: of the files. They are needed only once an image has been taken. prompts: one for each image, if they differ.
    count: how many images there are. quiet: without a progress bar."""
    folder.mkdir(parents=True, exist_ok=True)  # before a model is loaded
    from streamflow.image_utils import postprocess_image
    from streamflow.wrapper import StreamFlowWrapper

    files: list[str] = []
    say_download(settings.model)
    with StreamFlowWrapper.from_settings(settings) as wrapper:

        def entering() -> Iterator[Images | None]:
            for number, image in enumerate(images):
                if prompts:
                    wrapper.stream.update_prompt(prompts[number], scope="frame")
                yield image

        began = time.perf_counter()
        for frame in tqdm(wrapper.stream.frames(entering()), total=count, unit="image", disable=quiet):
            files.append(str(folder / f"{names[len(files)]}.png"))
            postprocess_image(frame.wait().image[None])[0].save(files[-1])
        return {"files": files, "seconds": round(time.perf_counter() - began, 3)}


_TEXTS = frozenset(path for path, field in _fields(Settings) if str in _kinds(field) and bool not in _kinds(field))
_ONLY_LISTS = frozenset(path for path, field in _fields(Settings) if field.annotation == tuple[str, ...])
_LISTS = frozenset(path for path, field in _fields(Settings) if any(get_origin(kind) is tuple for kind in _kinds(field)))
