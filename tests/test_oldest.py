"""The oldest versions that setup.py allows: the core tests pass there, and a family that needs more says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_packaging import linked, setup_lists

from streamflow._environment import DIFFUSERS_MINIMUM

ROOT = Path(__file__).parents[1]
PINS = {
    canonicalize_name(pin.name): next(iter(pin.specifier)).version
    for line in (ROOT / "env" / "requirements.oldest.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}
UNREACHABLE = "NewConnectionError|ConnectTimeout|NameResolution|ProxyError|SSLError|from versions: none|No module named pip"
HIDDEN = {*PINS, "torchao"}  # of another age than these
CORE = ("tests/test_ring.py", "tests/test_schedule.py", "tests/test_parity.py")
NEWER = {
    "stochastic": "diffusers 0.33 has no stochastic_sampling",
    "precomputed": "its Stable Diffusion 3 without T5 takes no max_sequence_length",
    "enlarges": "diffusers 0.33 has no FlowMatchLCMScheduler",
    "default": "guidance by default is what guided cases test",
}


def test_the_oldest_pins_are_the_floor_of_the_ranges():
    ranges = {canonicalize_name(one.name): one for one in map(Requirement, setup_lists()[0])}
    assert PINS["diffusers"].startswith(f"{DIFFUSERS_MINIMUM}.")
    for name in set(PINS) & set(ranges):
        assert ranges[name].specifier.contains(PINS[name])
        lower = next(one.version for one in ranges[name].specifier if one.operator == ">=")
        assert PINS[name].startswith(lower), f"setup.py allows {name} {lower}, and {PINS[name]} is the oldest that is tested"


def python(folders, *arguments, timeout):
    """Python with nothing but these folders (`-S`: no site-packages)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run(
        [sys.executable, "-S", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.slow
def test_the_core_tests_pass_on_the_oldest_versions(tmp_path):
    overlay = tmp_path / "oldest"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(overlay)]
    pins = [f"{name}=={version}" for name, version in PINS.items()]
    made = subprocess.run([*install, *pins], capture_output=True, text=True, timeout=300)
    if made.returncode and (why := re.search(UNREACHABLE, made.stderr)):
        pytest.skip(f"needs a package index: pip says {why.group()}")
    assert made.returncode == 0, made.stderr
    folders = (overlay, linked(tmp_path / "others", HIDDEN), ROOT)

    asked = f"from importlib.metadata import version; print(*[version(name) for name in {list(PINS)}])"
    assert python(folders, "-c", asked, timeout=60).stdout.split() == list(PINS.values())
    needed = "from streamflow.models import adapter_class; adapter_class('flux2')"
    refused = python(folders, "-c", needed, timeout=120)
    assert f"family 'flux2' needs a newer diffusers than {PINS['diffusers']}" in refused.stderr

    newer = " or ".join(NEWER)
    run = python(folders, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CORE, "-k", f"not ({newer})", timeout=400)
    assert run.returncode == 0 and re.search(r"\d{2,} passed", run.stdout), run.stdout[-3000:] + run.stderr[-1000:]
