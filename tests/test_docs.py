"""The guides say what is so: their Python runs, their commands are the parsers' own, their messages are the code's, and the
site builds without a warning."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import stand_ins
from test_imports import ROWS

from streamflow import StreamFlow, StreamFlowWrapper, models
from streamflow.app import cli
from streamflow.app.cli import COMMANDS
from streamflow.app.config import Settings
from streamflow.io import SINKS

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next((found for one in ("chromium", "chromium-browser") if (found := shutil.which(one))), None)
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]


def blocks(page, language):
    """(what it needs, the text) of every block in a language."""
    return stand_ins.blocks(page.read_text(encoding="utf-8"), language)


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", [one for one in PAGES if blocks(one, "python")], ids=name)
def test_its_python_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    monkeypatch.setattr("streamflow.io.addresses.SINKS", dict(SINKS))
    scope: dict = {}
    for needs, text in blocks(page, "python"):
        if reasons := stand_ins.not_run(needs):
            print(f"{name(page)}, not run: {'; '.join(reasons)}")
            imported(ast.parse(text))
        else:
            stand_ins.stand_in(needs, monkeypatch, tmp_path)
            stand_ins.run_python(text, name(page), scope)
    if page.name == "CONTRIBUTING.md":
        check_recipes(scope, capsys.readouterr().out)


def check_recipes(scope, said):
    """The family draws what the package's own draws, the sink has counted, the condition has acted."""
    with StreamFlowWrapper("embedded", mode="txt2img", cfg_type="none", warmup=0) as wrapper:
        wrapper.prepare("a fox, 3d render", num_inference_steps=4)
        fox = np.asarray(wrapper(), np.float32)
    assert np.abs(fox - np.asarray(scope["fox"])).max() <= 1 and fox.std() > 10
    assert "mine: 1 images" in said
    assert np.abs(np.clip(fox - 0.5 * 127.5, 0, 255) - np.asarray(scope["dark_fox"])).max() <= 2


@pytest.mark.slow
def test_the_quickstart_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _, text in blocks(ROOT / "docs/quickstart.md", "bash"):
        for line in text.splitlines():
            assert cli.main(shlex.split(line)[1:]) == 0, line
    assert (tmp_path / "streamflow.yaml").is_file() and list(tmp_path.glob("outputs/*.png"))


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
        said = ""
        for help_flag in ("--help-all", "--help"):  # some commands have more options than --help shows
            with contextlib.suppress(SystemExit):
                main([help_flag])
            said += capsys.readouterr().out
    elif words[:2] == ["python", "-m"]:
        said = (ROOT / Path(*words[2].split("."))).with_suffix(".py")
        said = said if said.exists() else ROOT / Path(*words[2].split(".")) / "__main__.py"
        said = said.read_text(encoding="utf-8") if said.exists() else pytest.fail(f"{page}: {line}")
    else:
        script = next(word for word in words if word.endswith(".py"))
        demo = ["test_demo_gen.py"] if "demo" in words else []  # the installer passes on what follows
        said = "".join((ROOT / one).read_text(encoding="utf-8") for one in (script, *demo)) + "".join(installer_options())
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


@pytest.mark.parametrize(("one", "file"), [(StreamFlow, "streamflow"), (StreamFlowWrapper, "wrapper")])
def test_the_reference_lists_every_member(one, file):
    page = (ROOT / f"docs/reference/{file}.md").read_text(encoding="utf-8")
    listed = re.search(
        rf"^::: streamflow\.{one.__name__}\n    options:.*?members:\s*\[(.*?)\]", page, re.MULTILINE | re.DOTALL
    )
    public = {name for name in dir(one) if not name.startswith("_")} | {"__call__"}
    assert sorted(re.split(r",\s*", listed[1])) == sorted(public)


def test_the_reference_has_a_page_for_what_it_lists():
    listed = re.findall(r"`(streamflow[\w.]*)`", (ROOT / "docs/reference/index.md").read_text(encoding="utf-8"))
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    assert len(listed) > 20 and [one for one in listed if f"::: {one}\n" not in pages] == []


def test_every_guide_has_an_image():
    for page in (ROOT / "docs/guides").glob("*.md"):
        assert re.search(r"^!\[[^\]]+\]\(", page.read_text(encoding="utf-8"), re.MULTILINE), name(page)


def test_an_image_is_called_an_image():
    texts = [*PAGES, ROOT / "README.md", *ROOT.glob("examples/**/*.md"), *ROOT.glob("streamflow/pretrained/*/[NR]*")]
    assert len(texts) > 40
    assert [name(one) for one in texts if re.search("picture", one.read_text(encoding="utf-8"), re.IGNORECASE)] == []


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)[)#]", without_blocks(page.read_text(encoding="utf-8"))):
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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built without a warning."""
    pytest.importorskip("mkdocs", reason="needs mkdocs: python env/install.py --docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "not included in the" not in run.stderr  # every page is in the navigation
    return folder


def pages_of(site):
    """The paths of all pages, relative to the site."""
    return sorted(page.relative_to(site).as_posix() for page in site.rglob("*.html"))


@pytest.mark.slow
def test_the_site_has_the_reference(site):
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").rglob("index.html"))
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
    private = re.findall(r'<h\d id="(streamflow[^"]*\._[a-z]\w*)"', reference)
    assert private == [] and "Bases:" not in reference


@pytest.mark.slow
def test_each_class_of_the_reference_has_a_page(site):
    """No page documents two classes, exceptions aside, and every page of a module links to those of its classes."""
    crowded = {}
    for page in (site / "reference").rglob("index.html"):
        html = page.read_text(encoding="utf-8")
        names = re.findall(r'<h[23] id="(streamflow[\w.]*\.[A-Z]\w*)" class="doc doc-heading">', html)
        found = [pkgutil.resolve_name(one) for one in names]
        classes = {one for one in found if inspect.isclass(one) and not issubclass(one, Exception)}
        if len(classes) > 1:
            crowded[page.relative_to(site)] = classes
    assert crowded == {}
    for cls in ("io/Reading", "config/Settings", "live/Statistics", "ring/Ring", "frames/Input"):
        module, _, cls = cls.partition("/")
        assert f'href="{cls}/"' in (site / f"reference/{module}/index.html").read_text(encoding="utf-8")
        page = (site / f"reference/{module}/{cls}/index.html").read_text(encoding="utf-8")
        assert re.search(rf'<h2 id="streamflow[\w.]*\.{cls}" class="doc doc-heading">', page)


@pytest.mark.slow
def test_the_site_has_every_command_and_setting(site):
    commands = (site / "command-line/index.html").read_text(encoding="utf-8")
    assert [one for one in COMMANDS if f'id="streamflow-{one}"' not in commands] == []
    settings = (site / "settings/index.html").read_text(encoding="utf-8")
    assert [path for path in setting_paths(Settings) if f"<code>{path}</code>" not in settings] == []


def setting_paths(section, before=""):
    for key, field in section.model_fields.items():
        inner = getattr(field.default, "model_fields_set", None)
        if inner is None:
            yield f"{before}{key}" if before or key != "similar_image_filter" else "similar_image_filter.threshold"
        else:
            yield from setting_paths(type(field.default), f"{before}{key}.")


@pytest.mark.slow
def test_images_and_links_of_the_site_are_there(site):
    missing = []
    for page in pages_of(site):
        if page == "404.html":
            continue
        html = (site / page).read_text(encoding="utf-8")
        for target in re.findall(r'(?:src|href)="([^":#?]+)["#?]', html):
            path = (site / page).parent / target
            if not (path.is_file() or (path / "index.html").is_file()):
                missing.append((page, target))
    assert missing == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_no_page_scrolls_sideways_on_a_phone(site):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    handler = functools.partial(QuietHandler, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wide = {}
    try:
        with playwright.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 390, "height": 844})
            for path in pages_of(site):
                page.goto(f"http://127.0.0.1:{server.server_port}/{path}")
                width = page.evaluate("document.documentElement.scrollWidth")
                parts = page.evaluate(WIDE_PARTS)
                if width > 390 or parts:
                    wide[path] = width, parts
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
    assert wide == {}


WIDE_PARTS = """[...document.querySelectorAll('pre, pre > code, .md-typeset__scrollwrap')]
    .filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent.slice(0, 60))"""


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass
