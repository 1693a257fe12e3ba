"""What is installed, what can compute and what could be faster; for each missing thing, the command that installs it.

`streamflow doctor` and `python env/check.py` print it. Reads metadata and asks torch for its devices; imports no
other heavy package, and works where some of them are missing or broken.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType

from streamflow._environment import diffusers_problem, installed_version, streamdiffusion_problem

DISTRIBUTIONS = (
    "streamflow-rf",
    "streamdiffusion",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class Line:
    """One line of the report: what, how it is, and the command that mends it where it is not well."""

    label: str
    state: str
    command: str | None = None


@dataclass(frozen=True)
class Report:
    """The three sections, and the problems that keep StreamFlow from working."""

    versions: tuple[Line, ...]
    devices: tuple[Line, ...]
    accelerations: tuple[Line, ...]
    problems: tuple[Line, ...]


def install_command(option: str) -> str:
    """How an option of the installer is had, from a clone or from an installed package."""
    return f'python env/install.py --{option}   (or: pip install "streamflow-rf[{option}]")'


def have(*distributions: str) -> bool:
    """Whether all these distributions are installed."""
    return all(installed_version(name) is not None for name in distributions)


def problems(torch_error: str | None) -> list[Line]:
    """Whatever keeps StreamFlow from working, each with its command."""
    found = []
    for foreign in metadata.distributions(name="streamflow"):
        state = f"streamflow {foreign.version} is another project (a workflow system) with the same import name"
        found.append(Line("foreign", state, f'"{sys.executable}" -m pip uninstall -y streamflow'))
    for label, problem in (("streamdiffusion", streamdiffusion_problem()), ("diffusers", diffusers_problem())):
        if problem is not None:
            found.append(Line(label, problem.state, problem.command))
    if torch_error is not None:
        found.append(Line("torch", torch_error, "python env/install.py"))
    reported = {"streamdiffusion", "diffusers", "torch"}
    missing = [name for name in DISTRIBUTIONS if name not in reported and not have(name)]
    if missing:
        found.append(Line("packages", f"not installed: {', '.join(missing)}", "python env/install.py"))
    return found


def versions() -> list[Line]:
    """Python, the platform and the packages."""
    system = [Line("python", f"{platform.python_version()}  {sys.executable}"), Line("platform", platform.platform())]
    return system + [Line(name, installed_version(name) or "not installed") for name in DISTRIBUTIONS]


def import_torch() -> tuple[ModuleType | None, str | None]:
    """Torch and no error, or None and the reason why it cannot be imported."""
    if find_spec("torch") is None:
        return None, "torch is not installed"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it that does not load
        return None, f"torch does not import: {error}"
    return torch, None


def cuda_lines(torch: ModuleType) -> list[Line]:
    """Each CUDA device with its memory, or why there is none."""
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return [Line("cuda", "no NVIDIA driver found")]
        built = (
            f"CUDA {torch.version.cuda} and finds no device" if torch.version.cuda else "the CPU only, and a driver is there"
        )
        return [Line("cuda", f"this torch is built for {built}", "python env/install.py --torch auto")]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory, capability = f"{device.total_memory / 2**30:.0f} GiB", f"compute capability {device.major}.{device.minor}"
        lines.append(Line(f"cuda:{index}", f"{device.name}, {memory}, {capability}, CUDA {torch.version.cuda}"))
    return lines


def devices(torch: ModuleType | None) -> list[Line]:
    """What can compute."""
    if torch is None:
        return []
    lines = cuda_lines(torch)
    if torch.backends.mps.is_available():
        lines.append(Line("mps", "Apple GPU"))
    threads = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    return [*lines, Line("cpu", f"{platform.processor() or platform.machine()}, {threads}")]


def compile_line(cuda: bool) -> Line:
    """Whether torch.compile has the compiler it needs: Triton on CUDA, a C++ compiler on the CPU."""
    if cuda and not (have("triton") or have("triton-windows")):
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return Line("compile", "torch.compile needs Triton on CUDA", f"pip install {package}")
    compilers = [os.environ.get("CXX") or "", "cl" if sys.platform == "win32" else "g++", "clang++"]
    if not cuda and not any(name and shutil.which(name) for name in compilers):
        commands = {"win32": "install the Visual Studio build tools (C++)", "darwin": "xcode-select --install"}
        command = commands.get(sys.platform, "sudo apt install g++")
        return Line("compile", "torch.compile needs a C++ compiler on the CPU", command)
    return Line("compile", "available")


TENSORRT = {
    "tensorrt-rtx": ("tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "polygraphy"),
    "tensorrt": ("tensorrt-cu13", "polygraphy"),
}
EXTRAS = {
    "web": ("fastapi", "uvicorn", "websockets", "prometheus-client"),
    "webrtc": ("aiortc",),
    "video": ("av",),
    "live": ("av", "opencv-python-headless", "mss", "pygame-ce"),
    "control": ("python-osc", "mido", "python-rtmidi"),
    "audio": ("sounddevice", "soundfile"),
    "control-images": ("opencv-python-headless",),
    "bench": ("matplotlib",),
}


def installed_lines(options: Mapping[str, Sequence[str]]) -> list[Line]:
    """For each option of the installer: whether its packages are installed, or the command that brings them."""
    return [
        Line(option, "installed") if have(*needed) else Line(option, "not installed", install_command(option))
        for option, needed in options.items()
    ]


def portaudio_lines() -> list[Line]:
    """That sound devices lack their library, where they do: on Linux, sounddevice does not bring it."""
    if sys.platform != "linux" or not have("sounddevice") or find_library("portaudio") is not None:
        return []
    return [Line("sound devices", "need PortAudio", "sudo apt install libportaudio2")]


def accelerations(torch: ModuleType | None) -> list[Line]:
    """What could be faster or reach further, available or with the command that brings it."""
    if torch is None:
        return []
    cuda = torch.cuda.is_available()
    gpus = torch.cuda.device_count() if cuda else 0
    no_tensorrt = [Line("tensorrt", "not on macOS: NVIDIA has no libraries for it")]
    return [
        compile_line(cuda),
        Line("cuda-graph", "available" if cuda else "needs a CUDA device"),
        *(no_tensorrt if sys.platform == "darwin" else installed_lines(TENSORRT)),
        Line("several GPUs", f"available, {gpus} devices" if gpus > 1 else f"needs two CUDA devices, found {gpus}"),
        *installed_lines(EXTRAS),
        *portaudio_lines(),
    ]


def examine() -> Report:
    """Look at everything once."""
    torch, torch_error = import_torch()
    return Report(
        versions=tuple(versions()),
        devices=tuple(devices(torch)),
        accelerations=tuple(accelerations(torch)),
        problems=tuple(problems(torch_error)),
    )


def render(report: Report) -> str:
    """The report as text, one line each, commands on the line below."""
    out = []
    for name, lines in vars(report).items():
        out += [name.capitalize()] if lines else []
        for line in lines:
            out.append(f"  {line.label:<16} {line.state}")
            out += [] if line.command is None else [f"  {'':<16} -> {line.command}"]
        out += [""] if lines else []
    out.append("StreamFlow can run." if not report.problems else "StreamFlow cannot run yet: see Problems.")
    return "\n".join(out)


def main(argv: Sequence[str] = ()) -> int:
    """Print the report; 0 where StreamFlow can run, 1 where something it needs is missing."""
    parser = argparse.ArgumentParser(
        prog="streamflow doctor",
        description="Prints versions, devices, accelerations, and the command for whatever is missing.",
        epilog="example: streamflow doctor",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args(list(argv))
    report = examine()
    print(json.dumps({**asdict(report), "can_run": not report.problems}) if arguments.json else render(report))
    return 1 if report.problems else 0
