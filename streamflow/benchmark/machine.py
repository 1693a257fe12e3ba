"""The machine of a measurement: hardware, versions, clocks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from streamflow._files import Json

PACKAGES = ("streamflow-rf", "torch", "diffusers", "transformers", "triton", "torchao", "tensorrt", "numpy")
QUERY = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu", "driver_version")


def machine(device: torch.device) -> Json:
    """Hardware and versions, as JSON."""
    found = {
        "device": device_name(device),
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES if any(metadata.distributions(name=name))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def compile_cache() -> str:
    """The state of the compiler's cache: "warm" where torch finds generated code on disk, else "cold"."""
    from torch._inductor.runtime.runtime_utils import default_cache_dir

    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())
    return "warm" if folder.is_dir() and any(folder.iterdir()) else "cold"


def clocks(device: torch.device) -> dict[str, str] | None:
    """The GPU's clocks (MHz), power (W) and temperature from nvidia-smi; None where there is no nvidia-smi, or it does not
    answer for this GPU."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", "-i", gpu]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    values = [value.strip() for value in answer.stdout.split(",")]
    return dict(zip(QUERY, values, strict=True)) if answer.returncode == 0 and len(values) == len(QUERY) else None
