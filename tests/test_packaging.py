"""The names, versions and files of the distribution, the doctor, and what no file of the repository may say."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import types
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import streamflow
from streamflow import _environment as requirements_check
from streamflow.app import doctor

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
THIS = Path(__file__).relative_to(ROOT)


def tracked() -> list[Path]:
    """The files of the repository, with new ones that are not committed yet and without ignored ones."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> dict[Path, str]:
    """The text of every tracked file that has one, this file left out."""
    found = {}
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content and path.relative_to(ROOT) != THIS:
            found[path.relative_to(ROOT)] = content.decode("utf-8")
    return found


def offenders(pattern: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """`path:line: text` of every line that matches, in all tracked texts."""
    expression = re.compile(pattern)
    return [
        f"{path}:{number}: {line.strip()[:120]}"
        for path, text in texts().items()
        if str(path) not in allowed
        for number, line in enumerate(text.splitlines(), 1)
        if expression.search(line)
    ]


def setup_lists() -> tuple[list[str], dict[str, list[str]]]:
    """INSTALL_REQUIRES and EXTRAS_REQUIRE of setup.py, without running setup()."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id.isupper()]
    scope = {"Path": Path, "__file__": str(ROOT / "setup.py")}
    exec(compile(tree, "setup.py", "exec"), scope)
    return scope["INSTALL_REQUIRES"], scope["EXTRAS_REQUIRE"]


def pins(name: str) -> dict[str, str]:
    """The pins in a file of env/, {canonical name: version}."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "env" / name).read_text().splitlines())
    return {canonicalize_name(re.split(r"[\[=]", line)[0]): line.partition("==")[2] for line in lines if line}


# --- names -----------------------------------------------------------------------------------------------------------


FOREIGN_INSTALL = r"(pip3? install|uv add)\b[^\n|;&`#]*?(?<![\w./-])streamflow(?![\w/.-])"


def test_nobody_is_told_to_install_the_other_streamflow():
    """`pip install streamflow` brings another project; ours is streamflow-rf, or `.`."""
    for wrong in ("streamflow", "-U streamflow", '"streamflow[web]"', "torch streamflow==1"):
        assert re.search(FOREIGN_INSTALL, f"python -m pip install {wrong}"), wrong
    for right in ("streamflow-rf", '"streamflow-rf[web]"', "-e .", "-e path/streamflow", ". && streamflow doctor"):
        assert not re.search(FOREIGN_INSTALL, f"python -m pip install {right}"), right
    assert offenders(FOREIGN_INSTALL) == []


def test_no_index_or_host_of_packages_is_named():
    hosts = r"pypi\.org|pythonhosted|download\.pytorch|pypi\.nvidia|registry\.npmjs|--(extra-)?index-url|--find-links"
    assert offenders(hosts) == []


def test_no_path_of_a_machine_is_named():
    assert offenders(r"(?<![\w.$}~])/(work|root)/\w") == []


def test_readme_begins_with_the_two_commands():
    blocks = re.findall(r"^```\w*\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python3 env/install.py")]
    assert lines[:2] == ["python3 env/install.py demo", "python3 env/install.py test"]


def test_licence_and_notice():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert "StreamDiffusion" in (ROOT / "NOTICE").read_text()


# --- versions --------------------------------------------------------------------------------------------------------


def test_the_version_is_written_once():
    version = re.search(r'"([^"]+)"$', (ROOT / "streamflow" / "_version.py").read_text().strip()).group(1)
    assert streamflow.__version__ == version == metadata.version("streamflow-rf")
    assert offenders(rf"__version__ *= *['\"]{re.escape(version)}", ("streamflow/_version.py",)) == []


def test_every_pin_lies_in_its_range_and_every_range_has_a_pin():
    install, extras = setup_lists()
    for requirement in map(Requirement, install):
        assert pins("requirements.txt")[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    for extra, requirements in extras.items():
        known = {**pins("requirements.txt"), **pins(f"requirements-{extra}.txt")}
        for requirement in map(Requirement, requirements):
            assert known[canonicalize_name(requirement.name)] in requirement.specifier, (extra, requirement)


def test_the_backup_contains_the_pins():
    backup = pins("requirements.backup.txt")
    assert pins("requirements.txt").items() <= backup.items()
    assert backup["streamdiffusion"] == "0.1.1"


def test_the_tests_run_with_the_pins():
    kept = {"torch"}  # a torch that was there before is kept
    wrong = {name: metadata.version(name) for name, pin in pins("requirements.txt").items() if metadata.version(name) != pin}
    assert wrong.keys() <= kept, f"not as pinned: {wrong}"


def test_the_minimum_of_diffusers_is_that_of_setup():
    (requirement,) = (Requirement(text) for text in setup_lists()[0] if text.startswith("diffusers"))
    assert str(requirement.specifier) == str(Requirement(f"diffusers{requirements_check.DIFFUSERS_RANGE}").specifier)
    assert requirement.specifier.contains(requirements_check.DIFFUSERS_MINIMUM)
    below = Version(requirements_check.DIFFUSERS_MINIMUM).minor - 1
    assert not requirement.specifier.contains(f"0.{below}.9")


# --- what import checks ----------------------------------------------------------------------------------------------


class FakeDistribution:
    """As much of a distribution as the check reads."""

    def __init__(self, name: str, version: str, *requires: str):
        self.metadata, self.version, self.requires = {"Name": name}, version, list(requires)


def pretend(monkeypatch, *distributions: FakeDistribution) -> None:
    """Let importlib.metadata, as the check sees it, know these distributions and no others."""
    known = {canonicalize_name(one.metadata["Name"]): one for one in distributions}

    def version(name: str) -> str:
        if canonicalize_name(name) not in known:
            raise metadata.PackageNotFoundError(name)
        return known[canonicalize_name(name)].version

    fake = types.SimpleNamespace(
        version=version,
        distributions=lambda **which: [one for one in distributions if not which or one.metadata["Name"] == which["name"]],
        PackageNotFoundError=metadata.PackageNotFoundError,
    )
    monkeypatch.setattr(requirements_check, "metadata", fake)
    monkeypatch.setattr(doctor, "metadata", fake)


STREAMDIFFUSION = FakeDistribution("streamdiffusion", "0.1.1", "diffusers ==0.24.0")


def test_a_good_environment_is_let_through(monkeypatch):
    requirements_check.check_environment()
    pretend(monkeypatch, STREAMDIFFUSION, FakeDistribution("diffusers", "0.42.0"))
    requirements_check.check_environment()


def test_import_without_streamdiffusion_names_the_command(monkeypatch):
    pretend(monkeypatch, FakeDistribution("diffusers", "0.42.1"))
    with pytest.raises(ImportError, match=r"pip install --no-deps streamdiffusion==0\.1\.1$"):
        requirements_check.check_environment()


def test_import_without_streamdiffusion_fails_for_real(tmp_path):
    """`import streamflow` in an interpreter whose metadata does not know streamdiffusion."""
    program = (
        "from importlib import metadata\n"
        "known = metadata.version\n"
        "def version(name):\n"
        "    if name == 'streamdiffusion': raise metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "metadata.version = version\n"
        "import streamflow\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and last.endswith("pip install --no-deps streamdiffusion==0.1.1")


def test_a_diffusers_that_was_pulled_down_names_what_did_it_and_the_command_back(monkeypatch):
    culprit = FakeDistribution("old-thing", "3.1", "numpy", "Diffusers[torch] (<0.31) ; python_version > '3'")
    bystanders = [
        FakeDistribution("fine", "1", "diffusers>=0.20"),
        FakeDistribution("extra-only", "1", "diffusers<0.31 ; extra == 'old'"),
        FakeDistribution("other-name", "1", "diffusers-interpret<0.1"),
    ]
    pretend(monkeypatch, STREAMDIFFUSION, FakeDistribution("diffusers", "0.30.3"), culprit, *bystanders)
    with pytest.raises(ImportError) as caught:
        requirements_check.check_environment()
    message = str(caught.value)
    assert "found 0.30.3, pulled down by old-thing 3.1 (it asks for Diffusers<0.31)" in message
    assert message.endswith('pip install "diffusers>=0.33,<0.50"')
    assert not any(one.metadata["Name"] in message for one in bystanders) and "0.24" not in message


# --- the doctor ------------------------------------------------------------------------------------------------------


def test_doctor_finds_this_environment_well():
    report = doctor.examine()
    assert report.problems == () and "cpu" in [line.label for line in report.devices]
    text = doctor.render(report)
    assert text.endswith("StreamFlow can run.")
    for line in report.accelerations:
        assert line.command is not None or line.state.startswith(("available", "installed", "needs", "not on"))


def test_doctor_tells_it_as_json(capsys):
    assert doctor.main(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["can_run"]
        and told["problems"] == []
        and {"label": "torch", "state": metadata.version("torch")}.items()
        <= next(one for one in told["versions"] if one["label"] == "torch").items()
    )


def test_doctor_tells_the_other_streamflow_and_what_is_missing(monkeypatch):
    pretend(monkeypatch, FakeDistribution("streamflow", "0.1.6"), FakeDistribution("diffusers", "0.42.1"))
    problems = {line.label: line for line in doctor.problems(None)}
    assert "another project" in problems["foreign"].state
    assert problems["foreign"].command.endswith("pip uninstall -y streamflow")
    assert problems["streamdiffusion"].command == "pip install --no-deps streamdiffusion==0.1.1"
    assert "streamflow-rf" in problems["packages"].state


@pytest.mark.slow
def test_check_prints_what_the_doctor_prints():
    script = subprocess.run([sys.executable, "env/check.py"], cwd=ROOT, capture_output=True, text=True)
    assert script.returncode == 0, script.stdout + script.stderr
    for title in ("Versions", "Devices", "Accelerations", "StreamFlow can run."):
        assert title in script.stdout


def test_check_says_where_nothing_is_installed(tmp_path):
    """In an environment without any package it is one line, with the command."""
    import venv

    venv.create(tmp_path / "bare", with_pip=False, symlinks=sys.platform != "win32")
    python = tmp_path / "bare" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = subprocess.run([python, ROOT / "env" / "check.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert line.endswith("Install it with: python3 env/install.py")


def test_the_console_script_is_there():
    (entry,) = metadata.entry_points(group="console_scripts", name="streamflow")
    assert entry.value == "streamflow.app.cli:main"


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_of_the_sdist_holds_the_model_and_runs_the_demo_elsewhere(tmp_path):
    source = tmp_path / "source"  # a copy, so that building leaves nothing here
    for path in tracked():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("streamflow_rf-*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", str(sdist), "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("streamflow_rf-*.whl")
    assert wheel.stat().st_size <= 90e6
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for path in tracked() if (ROOT / "streamflow") in path.parents}
    for model in ("emoji", "video"):
        assert any(f"pretrained/{model}/" in name and name.endswith(".safetensors") for name in wanted)
    assert wanted <= packed
    assert not any(name.startswith(("tests/", "examples/", "env/", "integrations/")) for name in packed)

    installed, others = tmp_path / "installed", tmp_path / "others"
    subprocess.run([*PIP_TARGET, str(installed), str(wheel)], cwd=tmp_path, check=True, capture_output=True)
    linked(others, {"streamflow-rf"})
    (tmp_path / "demo.py").write_bytes((ROOT / "test_demo_gen.py").read_bytes())
    drawn = ["demo.py", "--steps", "2", "--frames", "4", "--output", "sheet.png"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (installed, others)))}
    run = subprocess.run([sys.executable, "-S", *drawn], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and json.loads(run.stdout.splitlines()[-1]) and (tmp_path / "sheet.png").is_file(), run.stderr


PIP_TARGET = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target")


def linked(folder: Path, hidden: set[str]) -> Path:
    """This environment's packages but the hidden ones, as links."""
    folder.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if canonicalize_name(entry.name.split("-")[0].removesuffix(".py")) not in hidden:
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.slow
def test_pins_and_ranges_resolve_on_every_platform_and_python():
    pytest.importorskip("uv", reason="uv is needed: python env/install.py --dev")
    done = subprocess.run([sys.executable, "env/resolve.py", "--quick"], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
