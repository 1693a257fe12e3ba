"""The guides say what is so: their Python runs, their commands are the parsers' own, their messages are the code's, and the
site builds without a warning."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_imports import ROWS

from streamflow import StreamFlow, StreamFlowWrapper, models
from streamflow.app.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"(<!-- needs: [^>]+ -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page, language):
    """(what it needs, the text) of every block in a language."""
    return [(needs, text) for needs, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", [one for one in PAGES if blocks(one, "python")], ids=name)
def test_its_python_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    scope: dict = {}
    for needs, text in blocks(page, "python"):
        code = compile(text, name(page), "exec")
        if needs:
            imported(ast.parse(text))
        else:
            exec(code, scope)


def imported(tree):
    """Everything of ours that it imports is there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "streamflow":
            for one in node.names:
                assert hasattr(importlib.import_module(node.module), one.name), (node.module, one.name)


COMMAND_LINES = [
    (name(page), line)
    for page in [*PAGES, ROOT / "README.md"]
    for _, text in blocks(page, "bash")
    for line in text.splitlines()
    if re.match(r"streamflow |python -m streamflow|python3? (env|examples)/", line)
]


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_its_commands_have_the_flags_they_are_given(page, line, capsys):
    words = shlex.split(line, comments=True)
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    if words[0] == "streamflow":
        main = importlib.import_module(COMMANDS[words[1]][0]).main
        with pytest.raises(SystemExit):
            main(["--help"])
        said = capsys.readouterr().out
    elif words[:2] == ["python", "-m"]:
        said = (ROOT / Path(*words[2].split("."))).with_suffix(".py")
        said = said if said.exists() else ROOT / Path(*words[2].split(".")) / "__main__.py"
        said = said.read_text(encoding="utf-8") if said.exists() else pytest.fail(f"{page}: {line}")
    else:
        script = next(word for word in words if word.endswith(".py"))
        said = (ROOT / script).read_text(encoding="utf-8") + "".join(installer_options())
    assert all(re.search(rf"{flag}\b", said) for flag in flags), (page, line)


def installer_options():
    return [f"--{path.stem.removeprefix('requirements-')}\n" for path in (ROOT / "env").glob("requirements-*.txt")]


def test_the_messages_that_are_explained_are_messages_of_the_code():
    source = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "streamflow").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a text over two lines
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs/guides/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [part for row in rows for part in re.findall(r"`([^`]+)`", row)]
    missing = []
    for text in quoted:
        pieces = [piece.strip() for piece in re.split(r"\.\.\.|\bprompt\b", text) if len(piece.strip()) > 5]
        missing += [piece for piece in pieces if piece not in source]
    assert quoted and missing == []


@pytest.mark.parametrize("one", [StreamFlow, StreamFlowWrapper])
def test_the_reference_lists_every_member(one):
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    listed = re.search(
        rf"^::: streamflow\.{one.__name__}\n    options:.*?members:\s*\[(.*?)\]", page, re.MULTILINE | re.DOTALL
    )
    public = {name for name in dir(one) if not name.startswith("_")} | {"__call__"}
    assert sorted(re.split(r",\s*", listed[1])) == sorted(public)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+\.md)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), (name(page), target)


def without_blocks(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


NAMES = [
    (name(page), token)
    for page in [*PAGES, ROOT / "README.md"]
    for token in sorted(set(re.findall(r"`([^`\n]+)`", without_blocks(page.read_text(encoding="utf-8")))))
]
PATHS = r"(?:streamflow|tests|examples|env|static|docs)/[\w./-]*"
DOTTED = r"streamflow(?:\.\w+)+(?<!\.yaml)"


@pytest.mark.parametrize(("page", "token"), [one for one in NAMES if re.fullmatch(PATHS, one[1])])
def test_files_that_are_named_exist(page, token):
    assert (ROOT / token).exists()


@pytest.mark.parametrize(("page", "token"), [one for one in NAMES if re.fullmatch(DOTTED, one[1])])
def test_names_that_are_written_with_their_module_exist(page, token):
    pkgutil.resolve_name(token)


def test_classes_and_members_of_the_architecture_exist():
    """`Class.member` and the names in capitals of the page, and the names in its figure."""
    members, constants = {}, set()
    for path in (ROOT / "streamflow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                members.setdefault(node.name, set()).update(members_of(node))
            constants |= {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    figure = (ROOT / "docs/static/one-image.svg").read_text(encoding="utf-8")
    tokens = [token for page, token in NAMES if page == "docs/architecture.md"]
    tokens += re.findall(r"\b[A-Z]\w+\.[a-z]\w+\b", figure)
    classes = [token for token in tokens if re.fullmatch(r"[A-Z][a-z]\w*(\.\w+)?", token)]
    missing = [token for token in classes if not defined(token, members)]
    missing += [token for token in tokens if re.fullmatch(r"_?[A-Z]+(_[A-Z]+)*", token) and token not in constants]
    assert len(classes) > 50 and missing == []


def members_of(cls):
    """Methods, names that are assigned or declared in the body, and attributes that are set on an instance."""
    for node in ast.walk(cls):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_the_import_order_is_the_one_that_is_tested():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\d+ +(\w+(?:  \w+)*)(?: {2,}\(.*\))?$", page, re.MULTILINE)
    public = [[entry for entry in row if entry and not entry.startswith("_")] for row in ROWS]
    assert [row.split() for row in shown] == [row for row in public if row]
    table = re.findall(r"^\| `streamflow/(\w+)(?:/|\.py)` \|", page, re.MULTILINE)
    assert sorted(table) == sorted(entry for row in public for entry in row)


def defined(token, members):
    cls, _, member = token.partition(".")
    return cls in members and (not member or member in members[cls])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: python env/install.py --docs")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    reference = (tmp_path / "site/reference/index.html").read_text(encoding="utf-8")
    for one in (
        "streamflow.StreamFlow.update",
        "streamflow.StreamFlow.live",
        "streamflow.io.open_source",
        "streamflow.flow.convention.euler",
    ):
        assert f'id="{one}"' in reference, one
    own = [member for member in vars(StreamFlow) if not member.startswith("_")]
    assert [member for member in own if f'id="streamflow.StreamFlow.{member}"' not in reference] == []
    update = reference.split('id="streamflow.StreamFlow.update"')[1].split("</code>")[0]
    assert "scope" in update and "seed" in update  # with the signature of the part's method
