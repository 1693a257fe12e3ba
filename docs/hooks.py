"""Hooks of mkdocs: files of the repository that pages link to become files of the site, CONTRIBUTING.md becomes a page, each
public class of the reference has a page of its own, and the lists of commands and of settings are generated.

Links in pages lead to files as they lie in the repository, so that they work on GitHub too.
"""

from __future__ import annotations

import io
import os
import re
import typing
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)")  # the path of a Markdown link or image, without its anchor
PAGES = {"CONTRIBUTING.md": "contributing.md"}  # pages outside docs/
DIRECTIVE = re.compile(r"^::: (streamflow[\w.]*)\n", re.MULTILINE)
HELP_COLUMNS = 80
WIDE = 4  # columns of a table that are too many for a phone


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of classes under those of their modules."""
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    for entry in reference[1:]:
        title, uri = next(iter(entry.items()))
        if classes := classes_of(uri):
            entry[title] = [uri, *({path.rpartition(".")[2]: _class_page(uri, path)} for path in classes)]
    return config


@cache
def classes_of(uri: str) -> tuple[str, ...]:
    """The classes with pages of their own under a page of the reference: those that it lists after its first entry, and the
    public ones of its modules but exceptions, which stay on the module's page."""
    listed = DIRECTIVE.findall((DOCS / uri).read_text(encoding="utf-8"))
    found = []
    for path in listed:
        named = _package()[path.removeprefix("streamflow.")]
        if named.is_class:
            found += [path] if path != listed[0] else []
        elif named.is_module:
            found += [f"{path}.{name}" for name, one in named.members.items() if _has_page(named, name, one)]
    return tuple(found)


@cache
def _package() -> griffe.Module:
    return griffe.load("streamflow", search_paths=[ROOT])


def _has_page(module: griffe.Module, name: str, one: griffe.Object | griffe.Alias) -> bool:
    public = name in module.exports if module.exports is not None else not (one.is_alias or name.startswith("_"))
    return public and one.is_class and not any(str(base).endswith("Error") for base in _bases(one))


def _bases(one: griffe.Object | griffe.Alias) -> list[griffe.Expr | str]:
    """The bases of a class, with those of its own classes."""
    cls = one.final_target if isinstance(one, griffe.Alias) else one
    return [*cls.bases, *(base for parent in cls.resolved_bases for base in parent.bases)]


def _class_page(uri: str, path: str) -> str:
    return f"{uri.removesuffix('.md')}/{path.rpartition('.')[2]}.md"


def _with_links(markdown: str, uri: str) -> str:
    """A page of the reference with links to the pages of its classes, which it leaves out itself."""
    classes = classes_of(uri)
    names = [path.rpartition(".")[2] for path in classes]
    links = "\n".join(f"- [`{path}`]({_class_page(Path(uri).name, path)})" for path in classes)
    options = f"    options:\n      filters: ['!^_', '!^({'|'.join(names)})$']\n"
    first = DIRECTIVE.search(markdown)
    assert first is not None, f"{uri} lists nothing"
    rest = DIRECTIVE.sub(lambda one: "" if one[1] in classes else one[0] + options, markdown[first.start() :] + "\n")
    return f"{markdown[: first.start()]}Classes:\n\n{links}\n\n{rest}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages show or link to."""
    pages = {file.src_uri: DOCS / file.src_uri for file in files.documentation_pages()}
    pages |= {uri: ROOT / name for name, uri in PAGES.items()}
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for uri in [uri for uri in pages if uri.startswith("reference/")]:
        for path in classes_of(uri):
            text = f"# {path.rpartition('.')[2]}\n\n::: {path}\n"
            files.append(File.generated(config, _class_page(uri, path), content=text))
    for page in pages.values():
        for target in _targets(page):
            uri = target.relative_to(ROOT).as_posix()
            if target.suffix != ".md" and not target.is_relative_to(DOCS) and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
    return files


def _targets(page: Path) -> set[Path]:
    """The files that a page links to."""
    found = {(page.parent / link).resolve() for link in LINK.findall(page.read_text(encoding="utf-8"))}
    return {path for path in found if path.is_file() and path.is_relative_to(ROOT)}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and turn paths of the repository into paths of the site."""
    for marker, generate in GENERATED.items():
        if marker in markdown:
            markdown = markdown.replace(marker, generate())
    here = page.file.src_uri
    if here.startswith("reference/") and (DOCS / here).is_file() and classes_of(here):
        markdown = _with_links(markdown, here)
    source = ROOT / next((name for name, uri in PAGES.items() if uri == here), f"docs/{here}")

    def in_site(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[1]  # mkdocs says that it leads nowhere
        inside = target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT).as_posix()
        return os.path.relpath(PAGES.get(inside, inside), os.path.dirname(here)).replace(os.sep, "/")

    return LINK.sub(in_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Give each cell of a wide table the name of its column, which docs/extra.css shows on narrow screens."""
    return re.sub(r"<table>.*?</table>", _with_labels, html, flags=re.DOTALL)


def _with_labels(table: re.Match[str]) -> str:
    names = [re.sub(r"<[^>]+>", "", head) for head in re.findall(r"<th\b[^>]*>(.*?)</th>", table[0], re.DOTALL)]
    if len(names) < WIDE:
        return table[0]

    def labelled(row: re.Match[str]) -> str:
        labels = iter(names)
        return re.sub(r"<td\b[^>]*>(.*?)</td>", lambda cell: _cell(next(labels), cell[1]), row[0], flags=re.DOTALL)

    return re.sub(r"<tr>.*?</tr>", labelled, table[0].replace("<table>", "<table data-wide>"), flags=re.DOTALL)


def _cell(label: str, content: str) -> str:
    return f'<td data-label="{label}"><div>{content}</div></td>' if content else "<td></td>"


def command_line() -> str:
    """The help of every command."""
    from streamflow.app.cli import COMMANDS, main

    os.environ["COLUMNS"] = str(HELP_COLUMNS)
    parts = [f"```text\n{_help(main, '--help')}\n```"]
    for name in COMMANDS:
        text = _help(main, name, "--help-all") or _help(main, name, "--help")
        parts.append(f"## streamflow {name}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def _help(main: typing.Callable[[list[str]], int], *arguments: str) -> str:
    """What a command prints; empty where it does not know the arguments."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()), suppress(SystemExit):
        main(list(arguments))
    return out.getvalue().strip()


def settings() -> str:
    """A table of the settings of each section."""
    from streamflow.app.config import Settings

    return "\n\n".join(_tables(Settings))


def _tables(section: type, path: str = "") -> typing.Iterator[str]:
    """The section's own settings, then those of the sections inside it."""
    lines, inside = ["| Setting | Type | Default | Meaning |", "|---|---|---|---|"], []
    for name, field in section.model_fields.items():
        kinds = typing.get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
        sections = [kind for kind in kinds if isinstance(kind, type) and hasattr(kind, "model_fields")]
        if sections:
            inside.append((sections[0], f"{path}{name}.", field.description or ""))
        else:
            default = field.get_default(call_default_factory=True)
            meaning = re.sub(r"([\[\]<|*_])", r"\\\1", field.description or "")
            lines.append(f"| `{path}{name}` | {_type(field.annotation)} | {_value(default)} | {meaning} |")
    yield "\n".join(lines)
    for kind, start, description in inside:
        yield f"## {start.rstrip('.')}\n\n{description}"
        yield from _tables(kind, start)


def _is_union(annotation: object) -> bool:
    return isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union


def _type(annotation: object) -> str:
    """A type in words: `str`, `list of int`, the values of a Literal."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is NoneType:
        return "empty"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if _is_union(annotation):
        return " or ".join(_type(kind) for kind in inner)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin in (tuple, list):
        kinds = [kind for kind in inner if kind is not Ellipsis]
        many = origin is list or Ellipsis in inner
        return f"list of {_type(kinds[0])}" if many else f"({', '.join(map(_type, kinds))})"
    if origin is dict:
        return f"{_type(inner[0])} to {_type(inner[1])}"
    return getattr(annotation, "__name__", "any value")


def _value(default: object) -> str:
    from pydantic_core import PydanticUndefined

    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "empty"
    text = (
        str(default).lower() if isinstance(default, bool) else str(list(default) if isinstance(default, tuple) else default)
    )
    return f"`{text}`" if text else '`""`'


GENERATED = {"<!-- generated: command line -->": command_line, "<!-- generated: settings -->": settings}
