"""env/install.py: what it refuses, what it decides about torch, that it passes arguments and exit codes on, and that a
second run installs nothing. The whole installation, for real, is what .ci/run does."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE_PYTHON = Path(sys._base_executable)  # outside any virtual environment


@pytest.fixture
def installer():
    """env/install.py as a module, fresh for each test."""
    spec = importlib.util.spec_from_file_location("streamflow_installer", ROOT / "env" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add_distribution(prefix: Path, name: str, version: str, **files: str) -> None:
    """Put the metadata of a distribution into an environment, without its code."""
    site = next(prefix.glob("lib/python*/site-packages"), prefix / "Lib" / "site-packages")
    for old in site.glob(f"{name.replace('-', '_')}-*.dist-info"):
        shutil.rmtree(old)
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    for file, text in {"METADATA": metadata, **files}.items():
        (folder / file).write_text(text)


class Clone:
    """A clone of the repository with an environment in which pip is missing, so that nothing can be installed."""

    def __init__(self, root: Path):
        self.root = root
        shutil.copytree(ROOT / "env", root / "env", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "streamflow").mkdir()
        for file in ("setup.py", "pyproject.toml", "streamflow/_version.py"):
            shutil.copy(ROOT / file, root / file)
        venv.create(root / ".venv", with_pip=False, symlinks=os.name != "nt")

    def pretend_installed(self, installer) -> None:
        """What a completed installation leaves behind, as far as the check looks."""
        pins = installer.read_pins(installer.requirement_files([]))
        for name, version in {**pins, "streamdiffusion": "0.1.1"}.items():
            add_distribution(self.root / ".venv", name, version)
        direct = json.dumps({"url": self.root.resolve().as_uri(), "dir_info": {"editable": True}})
        add_distribution(self.root / ".venv", "streamflow-rf", "0.1.0", **{"direct_url.json": direct})
        stamp = {"digest": installer.digest([]), "extras": [], "torch_action": "pinned", "torch": pins["torch"]}
        installer.save_stamp(self.root / ".venv", stamp)

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        """env/install.py, with the system's Python and no active environment."""
        names = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        command = [str(BASE_PYTHON), str(self.root / "env" / "install.py"), *arguments]
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path, installer):
    made = Clone(tmp_path / "a clone")  # the space is on purpose
    made.pretend_installed(installer)
    return made


def state(installer, torch="2.13.0", gpu=None, **versions):
    """What `probe` tells of an environment in which all is as pinned, but for what is given."""
    pins = installer.read_pins(installer.requirement_files([]))
    found = {**pins, "streamdiffusion": "0.1.1", "torch": torch, **versions}
    return {"versions": found, "torch_gpu": gpu, "source": ROOT.as_uri()}


# --- the command line ------------------------------------------------------------------------------------------------


def test_parses_on_old_pythons_and_says_what_it_needs(installer):
    ast.parse((ROOT / "env" / "install.py").read_text(), feature_version=(3, 8))
    with pytest.raises(installer.InstallError, match="needs Python 3.11 or newer; /usr/bin/python3 is 3.8.18"):
        installer.require_python((3, 8, 18), "/usr/bin/python3")


def test_help_names_every_option(clone):
    done = clone.run("--help")
    assert done.returncode == 0
    for option in ("--tensorrt-rtx", "--tensorrt", "--web", "--video", "--dev", "--torch {keep,cpu,auto}", "demo", "test"):
        assert option in done.stdout


@pytest.mark.parametrize("arguments", [["tset"], ["--torch", "demo"], ["--wbe"], ["--torch", "gpu"]])
def test_a_wrong_word_is_refused_without_a_traceback(clone, arguments):
    done = clone.run(*arguments)
    assert done.returncode == 2
    assert "error:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "argv, extras, command, rest",
    [
        ([], None, None, []),
        (["--web", "demo", "--frames", "4"], ["web"], "demo", ["--frames", "4"]),
        (["test", "-m", "slow", "--dev"], None, "test", ["-m", "slow", "--dev"]),
        (["test", "--", "tests/test_flow.py"], None, "test", ["tests/test_flow.py"]),
    ],
)
def test_options_stand_before_the_command_and_arguments_after(installer, argv, extras, command, rest):
    options, found, arguments = installer.parse(argv)
    assert (options.extras, found, arguments) == (extras, command, rest)


def test_every_option_has_its_pins(installer):
    for name in installer.EXTRAS:
        assert installer.read_pins([ROOT / "env" / f"requirements-{name}.txt"])


def test_pip_is_asked_for_the_requirements_extras_and_for_the_torch_that_is_kept(installer, monkeypatch):
    asked = []
    monkeypatch.setattr(installer, "run", asked.append)
    monkeypatch.setattr(installer, "probe", lambda python, names: {"versions": {"torch": "2.11.0+cu130"}})
    state = {"pip": True, "versions": {"torch": "2.11.0+cu130", "streamdiffusion": None}}
    installer.install("python", state, {}, ["docs"], "keep")
    files = [ROOT / "env" / "requirements.txt", ROOT / "env" / "requirements-docs.txt"]
    wanted = installer.read_requirements(files)
    assert any("[" in line for line in wanted)
    kept = ["torch==2.11.0+cu130" if line.startswith("torch==") else line for line in wanted]
    assert asked[0][-2 - len(kept) : -2] == kept and asked[0][-2:] == ["-e", str(ROOT)]


# --- the second run --------------------------------------------------------------------------------------------------


def test_second_run_installs_nothing_and_passes_arguments_and_exit_code_on(clone):
    (clone.root / "test_demo_gen.py").write_text("import sys\nprint(sys.argv[1:], sys.prefix)\nsys.exit(7)\n")
    done = clone.run("demo", "--frames", "3", "a word")
    assert done.returncode == 7, done.stderr
    checked, activate, last = done.stdout.splitlines()
    assert "is installed in" in checked and "checked in" in checked
    assert activate.startswith("To use it: ") and "activate" in activate
    assert last == f"{['--frames', '3', 'a word']} {clone.root / '.venv'}"


def test_an_active_environment_is_used(clone, installer, monkeypatch):
    monkeypatch.setattr(installer.sys, "prefix", installer.sys.base_prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert installer.active_python() is None
    for name in ("CONDA_PREFIX", "VIRTUAL_ENV"):
        with monkeypatch.context() as context:
            context.setenv(name, str(clone.root / ".venv"))
            assert clone.root in installer.active_python().parents


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"diffusers": "0.24.0"}, "diffusers is 0.24.0, wanted is"),
        ({"streamdiffusion": None}, "streamdiffusion is missing, wanted is 0.1.1"),
        ({"torch": None}, "torch is missing, wanted is"),
    ],
)
def test_what_was_pulled_down_or_removed_is_installed_again(installer, change, reason):
    seen = state(installer, **change)
    stamp = {"digest": installer.digest([]), "extras": [], "torch_action": "pinned", "torch": "2.13.0"}
    action = installer.torch_action(None, seen, stamp, False, "linux")
    pins = {**installer.read_pins(installer.requirement_files([])), "streamdiffusion": "0.1.1"}
    (found,) = installer.reasons(seen, stamp, [], action, pins)
    assert reason in found


@pytest.mark.parametrize(
    "stamp, extras, source, reason",
    [
        ({}, [], ROOT, "not installed here yet"),
        ({"digest": None}, [], ROOT, "did not end well"),
        ({"digest": "of another time"}, [], ROOT, "requirements have changed"),
        ({"extras": []}, ["web"], ROOT, "--web is not installed yet"),
        ({"extras": []}, [], ROOT.parent / "elsewhere", "not installed in place from this folder"),
    ],
)
def test_why_an_installation_is_due(installer, stamp, extras, source, reason):
    whole = {"digest": installer.digest([]), "extras": [], "torch_action": "keep", "torch": "2.13.0", **stamp}
    seen = {**state(installer), "source": source.as_uri()}
    pins = installer.read_pins(installer.requirement_files([]))
    (found,) = installer.reasons(seen, whole if stamp else {}, extras, "keep", pins)
    assert reason in found


def test_the_digest_follows_the_files(installer, clone):
    installer.ROOT = clone.root
    before = installer.digest([])
    with (clone.root / "env" / "requirements.txt").open("a") as file:
        file.write("tqdm==0\n")
    assert installer.digest([]) != before
    assert installer.digest(["web"]) != installer.digest([])


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_the_other_streamflow_is_refused_with_the_command_that_removes_it(clone, installer):
    add_distribution(clone.root / ".venv", "streamflow", "0.1.6")
    done = clone.run("demo")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "streamflow 0.1.6" in line and "-m pip uninstall -y streamflow" in line
    assert installer.read_stamp(clone.root / ".venv")["digest"] is None  # its removal breaks our console script


def test_a_broken_environment_is_refused_in_one_line(clone):
    shutil.rmtree(clone.root / ".venv")
    (clone.root / ".venv").mkdir()
    done = clone.run()
    assert done.returncode == 1 and "Delete the folder and run the same command again" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_python_without_venv_is_told_the_package(installer, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(installer.InstallError, match=r"sudo apt install python3\.\d+-venv"):
        installer.make_venv(tmp_path / ".venv")
    assert not (tmp_path / ".venv").exists()


def test_a_failed_step_ends_the_installation_and_is_noted(installer, monkeypatch, tmp_path):
    monkeypatch.setattr(installer, "say", lambda text: None)
    with pytest.raises(installer.InstallError, match="exit code 3"):
        installer.run([sys.executable, "-c", "raise SystemExit(3)"])


# --- torch -----------------------------------------------------------------------------------------------------------

BROUGHT = {"torch": "2.13.0+cpu", "torch_action": "cpu"}


@pytest.mark.parametrize(
    "choice, torch, gpu, stamp, nvidia, platform, action",
    [
        (None, None, None, {}, True, "linux", "pinned"),
        (None, None, None, {}, True, "win32", "auto"),  # PyPI's wheel for Windows is CPU-only
        (None, None, None, {}, False, "win32", "pinned"),
        (None, None, None, {}, False, "darwin", "pinned"),
        (None, "2.9.1+cu128", "12.8", {}, True, "linux", "keep"),
        (None, "2.9.1", None, {}, True, "win32", "keep"),
        ("auto", "2.9.1+cu128", "12.8", {}, True, "win32", "keep"),  # a CUDA torch that is there is kept
        ("auto", "2.13.0+cpu", None, {}, True, "win32", "auto"),
        ("cpu", None, None, {}, True, "linux", "cpu"),
        ("cpu", None, None, {}, True, "win32", "pinned"),
        (None, "2.13.0+cpu", None, BROUGHT, True, "linux", "cpu"),  # what we brought stays as it was asked for
        ("keep", "2.13.0+cpu", None, BROUGHT, True, "linux", "keep"),
    ],
)
def test_torch_action(installer, choice, torch, gpu, stamp, nvidia, platform, action):
    assert installer.torch_action(choice, state(installer, torch, gpu), stamp, nvidia, platform) == action


def test_torch_is_due(installer):
    seen = state(installer, "2.13.0+cpu")
    assert not installer.torch_is_due("pinned", seen, {}, "2.13.0")
    assert installer.torch_is_due("pinned", seen, {}, "2.14.0")
    assert not installer.torch_is_due("keep", seen, {}, "2.14.0")
    assert not installer.torch_is_due("cpu", seen, BROUGHT, "2.13.0")
    assert installer.torch_is_due("auto", seen, BROUGHT, "2.13.0")


def test_keep_says_what_there_is_not(installer):
    with pytest.raises(installer.InstallError, match="no torch is installed here"):
        installer.torch_action("keep", state(installer, None), {}, False, "linux")
    with pytest.raises(installer.InstallError, match="torch 2.4.1 is installed here and StreamFlow needs 2.6"):
        installer.torch_action(None, state(installer, "2.4.1"), {}, False, "linux")


def test_a_kept_torch_is_held_fast_and_uv_brings_the_builds(installer, monkeypatch):
    ran = []
    monkeypatch.setattr(installer, "run", ran.append)
    monkeypatch.setattr(installer, "probe", lambda *_: {"versions": {"torch": "2.9.1+cu128"}})
    seen = {**state(installer, "2.9.1+cu128", "12.8"), "pip": True}
    installer.install("python", seen, {}, [], "keep")
    pip, streamdiffusion = ran
    assert "torch==2.9.1+cu128" in pip and "torch==2.13.0" not in pip and pip[-2:] == ["-e", str(ROOT)]
    assert streamdiffusion[-2:] == ["--no-deps", "streamdiffusion==0.1.1"]
    ran.clear()
    installer.install("python", {**state(installer, None), "pip": True}, {}, [], "auto")
    assert any("--torch-backend=auto" in command and "torch==2.13.0" in command for command in ran)


def test_probe_reads_what_torch_is_built_for_without_importing_it(installer, clone):
    package = next((clone.root / ".venv").glob("lib/python*/site-packages")) / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for text, gpu in (("cuda: Optional[str] = '12.8'", "12.8"), ("cuda = None\nhip = None", None), ("hip = '6.4'", "6.4")):
        (package / "version.py").write_text(f"__version__ = '2.9.1'\n{text}\n")
        assert installer.probe(installer.interpreter(clone.root / ".venv"), ["torch"])["torch_gpu"] == gpu
