"""Install StreamFlow, then run the demo or the tests.

    python3 env/install.py                    install, or check that all is installed
    python3 env/install.py demo [arguments]   ... then run test_demo_gen.py with the arguments
    python3 env/install.py test [arguments]   ... then run pytest with the arguments

Options of the installer stand before `demo` or `test`. It installs into the active virtual or conda environment, else
into .venv in this folder, which it makes. Standard library only. Needs Python 3.11, and parses on 3.8 to say so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
WINDOWS = os.name == "nt"
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 6)
STREAMDIFFUSION = "streamdiffusion==0.1.1"
STAMP = "streamflow-install.json"
EXTRAS = {
    "tensorrt-rtx": "TensorRT for RTX (Linux and Windows; GeForce and RTX cards)",
    "tensorrt": "TensorRT (Linux and Windows; its build fetches the libraries from NVIDIA)",
    "onnxruntime": "onnxruntime, for a CPU",
    "openvino": "OpenVINO, the quickest on a CPU that computes in bfloat16",
    "web": "the page and its server",
    "webrtc": "WebRTC, WHIP and WHEP for the page's server (with --web)",
    "video": "video files",
    "live": "cameras, screens, windows, NDI and recordings",
    "control": "knobs by OSC and MIDI",
    "audio": "sound of devices and files, and its beat, as knobs",
    "control-images": "control images made from the frames (OpenCV)",
    "bench": "plots of the benchmark",
    "ray": "Ray: several machines with failover, many users or many prompts (0.7 GB)",
    "quantize": "matrices of eight bits (torchao)",
    "fa3": "FlashAttention 3 for Hopper (Linux on x86-64, CUDA 13)",
    "fa4": "FlashAttention 4 for Hopper and Blackwell (Linux, CUDA 13; 0.3 GB)",
    "docs": "the site of docs/ (mkdocs build)",
    "dev": "the linter, and uv for env/resolve.py",
}
NOT_ON_MACOS = ("tensorrt-rtx", "tensorrt", "fa3", "fa4")


class InstallError(Exception):
    """Something the user can mend; its text is the one line that says how."""


def say(text):
    """Print at once, so that the order with the output of pip is right."""
    print(text, flush=True)


# --- the command line ------------------------------------------------------------------------------------------------


def parse(argv):
    """Split the command line at `demo` or `test`: (the installer's options, the command or None, its arguments)."""
    split = next((i for i, word in enumerate(argv) if word in COMMANDS), len(argv))
    command = argv[split] if split < len(argv) else None
    rest = argv[split + 1 :]
    parser = argparse.ArgumentParser(
        prog="env/install.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in EXTRAS.items():
        parser.add_argument(f"--{name}", dest="extras", action="append_const", const=name, help=f"also {text}")
    parser.add_argument(
        "--torch",
        choices=("keep", "cpu", "auto"),
        help="keep: the torch that is installed (the default where there is one); cpu: a CPU build; auto: the build "
        "for this machine's driver, chosen by uv, unless you had put a GPU build there before (the default on Windows "
        "with an NVIDIA driver). Without any: torch as pinned in env/requirements.txt",
    )
    parser.add_argument("command", nargs="?", choices=tuple(COMMANDS), help="what to run when all is installed")
    options = parser.parse_args(argv[:split])
    return options, command, rest[1:] if rest[:1] == ["--"] else rest


# --- the environment -------------------------------------------------------------------------------------------------


def require_python(version, where):
    """Refuse a Python that diffusers and transformers do not run on."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise InstallError(
            "StreamFlow needs Python {}.{} or newer; {} is {}. Run env/install.py with a newer one.".format(
                *OLDEST_PYTHON, where, ".".join(str(part) for part in version[:3])
            )
        )


def interpreter(prefix):
    """The Python of an environment, or None where the folder has none."""
    prefix = Path(prefix)
    places = ("Scripts/python.exe", "python.exe") if WINDOWS else ("bin/python",)
    return next((prefix / place for place in places if (prefix / place).exists()), None)


def active_python():
    """The Python of the active virtual or conda environment, or None."""
    if sys.prefix != sys.base_prefix:
        return Path(sys.executable)
    active = (os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX"))
    return next((python for prefix in active if prefix for python in [interpreter(prefix)] if python), None)


def make_venv(prefix):
    """Make a virtual environment; one line where Python came without the modules for it (Debian, Ubuntu)."""
    from importlib.util import find_spec

    if find_spec("venv") is None or find_spec("ensurepip") is None:
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        raise InstallError(
            f"This Python came without its venv module. On Debian and Ubuntu: sudo apt install {package}   Then run "
            "the same command again."
        )
    say(f"Making a virtual environment in {prefix}")
    if subprocess.call([sys.executable, "-m", "venv", str(prefix)]) != 0:
        shutil.rmtree(prefix, ignore_errors=True)
        raise InstallError(f"'{sys.executable} -m venv {prefix}' failed: the lines above say why.")


def target_python():
    """The Python to install for: the active environment's, or that of .venv, which is made where it is missing."""
    python = active_python()
    if python is not None:
        return python
    prefix = ROOT / ".venv"
    if not prefix.exists():
        make_venv(prefix)
    python = interpreter(prefix)
    if python is None:
        raise InstallError(f"{prefix} has no Python that runs. Delete the folder and run the same command again.")
    return python


def probe(python, names):
    """What the environment of `python` holds, seen from inside it: see `tell`."""
    done = subprocess.run([str(python), str(HERE), "--tell", *names], capture_output=True, text=True)
    if done.returncode != 0:
        advice = "Delete its environment and run the same command again."
        raise InstallError(f"{python} does not run. {advice}\n{done.stderr}")
    return json.loads(done.stdout)


def tell(names):
    """Print as JSON: this Python's version and prefix, the versions of the named distributions, what torch is built
    for, and where streamflow-rf comes from. Torch is not imported."""
    from importlib import metadata
    from importlib.util import find_spec

    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu, torch = None, find_spec("torch")
    if torch is not None and torch.origin is not None:
        text = (Path(torch.origin).parent / "version.py").read_text(encoding="utf-8")
        found = re.search(r"^(?:cuda|hip)\b[^=\n]*= *['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        gpu = found.group(1) if found else None
    source = None
    if versions.get("streamflow-rf") is not None:
        direct = json.loads(metadata.distribution("streamflow-rf").read_text("direct_url.json") or "{}")
        source = direct.get("url") if direct.get("dir_info", {}).get("editable") else None
    here = {"python": list(sys.version_info[:3]), "prefix": sys.prefix, "versions": versions}
    print(json.dumps(dict(here, torch_gpu=gpu, source=source, pip=find_spec("pip") is not None)))


# --- what is wanted --------------------------------------------------------------------------------------------------


def requirement_files(extras):
    """The files of pins for these extras."""
    return [ROOT / "env" / f"requirements{suffix}.txt" for suffix in ["", *(f"-{name}" for name in sorted(extras))]]


def read_requirements(files):
    """What requirements files ask for, as pip takes it: name==version or name[extra]==version."""
    lines = [line.partition("#")[0].strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def read_pins(files):
    """The pinned versions in requirements files, {name: version}."""
    split = (requirement.partition("==") for requirement in read_requirements(files))
    return {name.partition("[")[0]: version for name, _, version in split}


def digest(extras):
    """A hash of everything in the repository that decides what is installed."""
    names = ("setup.py", "pyproject.toml", "streamflow/_version.py")
    files = [*requirement_files(extras), *(ROOT / name for name in names)]
    content = b"\0".join(file.read_bytes() for file in files)
    return hashlib.sha256(content + STREAMDIFFUSION.encode()).hexdigest()


def read_stamp(prefix):
    """What an earlier, completed installation noted in the environment; {} where there was none."""
    stamp = Path(prefix) / STAMP
    return json.loads(stamp.read_text(encoding="utf-8")) if stamp.exists() else {}


def save_stamp(prefix, stamp):
    """Note the state of the installation in the environment."""
    (Path(prefix) / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def refuse_foreign(python, state, stamp):
    """Stop where the other project called streamflow, which has the same import name, is installed."""
    foreign = state["versions"]["streamflow"]
    if foreign is not None:
        if stamp:  # removing it also removes its command `streamflow`, which is ours too: install again afterwards
            save_stamp(state["prefix"], dict(stamp, digest=None))
        raise InstallError(
            f"streamflow {foreign} is installed here: another project with the same import name. "
            f"Remove it with: {shlex.quote(str(python))} -m pip uninstall -y streamflow"
        )


def numbers(version):
    """The leading two numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def torch_action(choice, state, stamp, nvidia, platform):
    """What to do about torch: 'keep' it, 'pinned' (from PyPI with pip), or 'cpu', 'auto' (with uv, which knows builds).

    choice: the option or None. nvidia: whether there is a driver. A torch that an earlier run of this installer brought
    is treated as that run was told to, so that it follows the pin; any other torch is the user's own.
    """
    version = state["versions"]["torch"]
    ours = version is not None and stamp.get("torch") == version and stamp["torch_action"] != "keep"
    if choice == "keep" and version is None:
        raise InstallError("--torch keep: no torch is installed here to be kept.")
    if choice is None and ours:
        choice = stamp["torch_action"]
    elif choice is None:
        choice = "keep" if version else "auto" if platform == "win32" and nvidia else "pinned"
    if choice == "auto" and state["torch_gpu"] and not ours:
        choice = "keep"
    if choice == "cpu" and platform != "linux":
        choice = "pinned"  # PyPI's own builds for Windows and macOS are without CUDA
    if choice == "keep" and numbers(version) < OLDEST_TORCH:
        oldest = ".".join(str(part) for part in OLDEST_TORCH)
        raise InstallError(
            f"torch {version} is installed here and StreamFlow needs {oldest} or newer. Upgrade it, or use a new "
            "environment."
        )
    return choice


def public(version):
    """A version without its local part: 2.13.0 of 2.13.0+cpu."""
    return (version or "").partition("+")[0]


def torch_is_due(action, state, stamp, pin):
    """Whether torch must be brought: always the pinned version, and for uv's builds the build that was asked for."""
    version = state["versions"]["torch"]
    if action == "keep":
        return False
    other_build = action != "pinned" and (stamp.get("torch_action"), stamp.get("torch")) != (action, version)
    return public(version) != pin or other_build


def reasons(state, stamp, extras, action, pins):
    """Why something must be installed, one line each; empty where all is as wanted."""
    found = []
    if not stamp:
        found.append("StreamFlow is not installed here yet")
    elif stamp["digest"] is None:
        found.append("the last installation did not end well")
    elif stamp["digest"] != digest(stamp["extras"]):
        found.append("the requirements have changed")
    found += [f"--{name} is not installed yet" for name in extras if stamp and name not in stamp["extras"]]
    for name, wanted in pins.items():
        version = state["versions"][name]
        if name != "torch" and public(version) != wanted:
            found.append(f"{name} is {version or 'missing'}, wanted is {wanted}")
    if torch_is_due(action, state, stamp, pins["torch"]):
        build = "" if action == "pinned" else f" (--torch {action})"
        found.append(f"torch is {state['versions']['torch'] or 'missing'}, wanted is {pins['torch']}{build}")
    if state["source"] is None or state["source"].rstrip("/") != ROOT.as_uri():
        found.append("streamflow-rf is not installed in place from this folder")
    return found


# --- installing ------------------------------------------------------------------------------------------------------


def run(command):
    """Run a step of the installation, or stop with its exit code."""
    say("$ " + " ".join(shlex.quote(word) for word in command))
    code = subprocess.call(command, cwd=str(ROOT))
    if code != 0:
        raise InstallError(f"The command failed with exit code {code}; the lines above say why.")


def pip_install(python, *arguments):
    """pip install, for that Python."""
    run([str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments])


def install_torch(python, action, pin):
    """Let uv put in the build of torch for this machine's driver ('auto') or for the CPU ('cpu')."""
    pip_install(python, f"uv=={read_pins([ROOT / 'env' / 'requirements-dev.txt'])['uv']}")
    uv = [str(python), "-m", "uv", "pip", "install", "--python", str(python)]
    run([*uv, f"--torch-backend={action}", "--reinstall-package", "torch", f"torch=={pin}"])


def install(python, state, stamp, extras, action):
    """Install everything; the torch that is there, or has just come, is held fast while pip does the rest."""
    if not state["pip"]:
        run([str(python), "-m", "ensurepip", "--upgrade"])
    wanted = read_requirements(requirement_files(extras))
    pin = read_pins(requirement_files(extras))["torch"]
    if action in ("cpu", "auto") and torch_is_due(action, state, stamp, pin):
        install_torch(python, action, pin)
    if action != "pinned":
        there = probe(python, ["torch"])["versions"]["torch"]
        wanted[wanted.index(f"torch=={pin}")] = f"torch=={there}"
    if state["versions"]["streamdiffusion"] is not None:
        say("(pip may complain that streamdiffusion wants an older diffusers: that is expected.)")
    pip_install(python, *wanted, "-e", str(ROOT))
    pip_install(python, "--no-deps", STREAMDIFFUSION)


def ensure(python, extras, choice):
    """Bring the environment to what is wanted, or find that it is; say which."""
    started = time.monotonic()
    unpinned = ["torch", "streamflow", "streamflow-rf"]
    state = probe(python, [*unpinned, *read_pins([*requirement_files(EXTRAS)]), "streamdiffusion"])
    require_python(state["python"], python)
    prefix = Path(state["prefix"])
    stamp = read_stamp(prefix)
    refuse_foreign(python, state, stamp)
    extras = sorted(set(extras) | set(stamp.get("extras", ())))
    pins = dict(read_pins(requirement_files(extras)), streamdiffusion=STREAMDIFFUSION.partition("==")[2])
    nvidia = shutil.which("nvidia-smi") is not None
    action = torch_action(choice, state, stamp, nvidia, sys.platform)
    why = reasons(state, stamp, extras, action, pins)
    if not why:
        say(f"StreamFlow is installed in {prefix} (checked in {time.monotonic() - started:.1f} s)")
        return prefix
    say(f"Installing into {prefix}:\n" + "\n".join(f"  {reason}" for reason in (why if stamp else why[:1])))
    if action == "keep" and WINDOWS and nvidia and not state["torch_gpu"]:
        say("The torch here is built for the CPU and is kept. For the NVIDIA GPU: env/install.py --torch auto")
    if stamp:
        save_stamp(prefix, dict(stamp, digest=None))  # what is begun and not ended must be done again
    install(python, state, stamp, extras, action)
    note_success(python, prefix, extras, action, pins)
    say(f"StreamFlow is installed in {prefix} ({time.monotonic() - started:.0f} s)")
    return prefix


def note_success(python, prefix, extras, action, pins):
    """Look once more, and note what was installed so that the next run need not."""
    state = probe(python, ["streamflow-rf", *pins])
    stamp = {"digest": digest(extras), "extras": extras, "torch_action": action, "torch": state["versions"]["torch"]}
    why = reasons(state, stamp, extras, action, pins)
    if why:
        raise InstallError("pip ended well and yet " + "; ".join(why) + ". Delete the environment and try again.")
    save_stamp(prefix, stamp)


# --- running ---------------------------------------------------------------------------------------------------------


def activation(python, prefix):
    """The command that activates the environment, or None where it is active."""
    active = os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")
    if any(path and Path(path).resolve() == prefix.resolve() for path in active):
        return None
    if (prefix / "conda-meta").exists():
        return f"conda activate {shlex.quote(str(prefix))}"
    if WINDOWS:
        return str(prefix / "Scripts" / "activate")
    return f"source {shlex.quote(str(prefix / 'bin' / 'activate'))}"


def demo(python, arguments):
    """Run test_demo_gen.py where the user stands, so that paths among the arguments mean what they say."""
    return subprocess.call([str(python), str(ROOT / "test_demo_gen.py"), *arguments])


def test(python, arguments):
    """Run pytest at the root of the repository."""
    return subprocess.call([str(python), "-m", "pytest", *arguments], cwd=str(ROOT))


COMMANDS = {"demo": demo, "test": test}


def main(argv):
    """Install or check, then run; the exit code is the command's."""
    if argv[:1] == ["--tell"]:
        tell(argv[1:])
        return 0
    try:
        require_python(sys.version_info, sys.executable)
        options, command, arguments = parse(argv)
        refused = [f"--{name}" for name in options.extras or () if sys.platform == "darwin" and name in NOT_ON_MACOS]
        if refused:
            raise InstallError(f"{', '.join(refused)}: NVIDIA has no libraries for macOS.")
        python = target_python()
        prefix = ensure(python, options.extras or [], options.torch)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    activate = activation(python, prefix)
    if activate is not None:
        say(f"To use it: {activate}")
    if command is None:
        return 0
    code = COMMANDS[command](python, arguments)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
