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
from collections.abc import Sequence
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


def foreign_streamflow() -> str | None:
    """The version of the other project called streamflow (a workflow system), if it is installed."""
    for distribution in metadata.distributions(name="streamflow"):
        return distribution.version
    return None


def problems(torch_error: str | None) -> list[Line]:
    """Whatever keeps StreamFlow from working, each with its command."""
    found = []
    foreign = foreign_streamflow()
    if foreign is not None:
        state = f"streamflow {foreign} is another project (a workflow system) with the same import name"
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
    lines = [
        Line("python", f"{platform.python_version()}  {sys.executable}"),
        Line("platform", platform.platform()),
    ]
    return lines + [Line(name, installed_version(name) or "not installed") for name in DISTRIBUTIONS]


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
    if torch.cuda.is_available():
        lines = []
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = device.total_memory / 2**30
            state = f"{device.name}, {memory:.0f} GiB, compute capability {device.major}.{device.minor}"
            lines.append(Line(f"cuda:{index}", f"{state}, CUDA {torch.version.cuda}"))
        return lines
    if shutil.which("nvidia-smi") is None:
        return [Line("cuda", "no NVIDIA driver found")]
    if torch.version.cuda is None:
        state = "an NVIDIA driver is there, but this torch is built for the CPU only"
        return [Line("cuda", state, "python env/install.py --torch auto")]
    return [
        Line(
            "cuda",
            f"this torch is built for CUDA {torch.version.cuda} and finds no device",
            "python env/install.py --torch auto",
        )
    ]


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
        command = {
            "win32": "install the Visual Studio build tools (C++)",
            "darwin": "xcode-select --install",
        }.get(sys.platform, "sudo apt install g++")
        return Line("compile", "torch.compile needs a C++ compiler on the CPU", command)
    return Line("compile", "available")


def tensorrt_lines() -> list[Line]:
    """TensorRT for RTX and TensorRT: installed or not, and whether this platform has them at all."""
    if sys.platform == "darwin":
        return [Line("tensorrt", "not on macOS: NVIDIA has no libraries for it")]
    kinds = {
        "tensorrt-rtx": ("tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "polygraphy"),
        "tensorrt": ("tensorrt-cu13", "polygraphy"),
    }
    return [
        Line(kind, "installed") if have(*needed) else Line(kind, "not installed", install_command(kind))
        for kind, needed in kinds.items()
    ]


EXTRAS = {
    "web": ("fastapi", "uvicorn", "websockets", "prometheus-client"),
    "video": ("av",),
    "live": ("av", "opencv-python-headless", "mss", "pygame-ce"),
    "control": ("python-osc", "mido", "python-rtmidi"),
    "bench": ("matplotlib",),
}


def accelerations(torch: ModuleType | None) -> list[Line]:
    """What could be faster or reach further, available or with the command that brings it."""
    if torch is None:
        return []
    cuda = torch.cuda.is_available()
    gpus = torch.cuda.device_count() if cuda else 0
    lines = [
        compile_line(cuda),
        Line("cuda-graph", "available" if cuda else "needs a CUDA device"),
        *tensorrt_lines(),
        Line("several GPUs", f"available, {gpus} devices" if gpus > 1 else f"needs two CUDA devices, found {gpus}"),
    ]
    for option, needed in EXTRAS.items():
        line = Line(option, "installed") if have(*needed) else Line(option, "not installed", install_command(option))
        lines.append(line)
    return lines


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
    sections = {
        "Versions": report.versions,
        "Devices": report.devices,
        "Accelerations": report.accelerations,
        "Problems": report.problems,
    }
    out = []
    for title, lines in sections.items():
        if not lines:
            continue
        out.append(title)
        for line in lines:
            out.append(f"  {line.label:<16} {line.state}")
            if line.command is not None:
                out.append(f"  {'':<16} -> {line.command}")
        out.append("")
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
