"""Prove by resolution that the requirements can be installed on platforms and Pythons that nobody ran here.

    python env/resolve.py            pins and ranges, with every extra (some minutes)
    python env/resolve.py --quick    pins and ranges, without extras

Prints a table in Markdown: for the pins (env/requirements*.txt) and the ranges (setup.py), on which Python versions
`uv pip compile` finds a wheel of everything for each platform. Nothing is installed. Needs uv (env/install.py --dev)
and the package index. Exit code 1 where something expected does not resolve.
"""

import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux arm64": "aarch64-manylinux_2_35",
    "Windows x86-64": "x86_64-pc-windows-msvc",
    "macOS 14 arm64": "aarch64-apple-darwin",
}
EXTRAS = (
    *("tensorrt-rtx", "tensorrt", "onnxruntime", "openvino", "quantize", "bench", "ray"),
    *("web", "webrtc", "video", "live", "control", "control-images", "audio", "docs", "dev"),
)
NOT_ON_MACOS = ("tensorrt-rtx", "tensorrt")
FROM_SOURCE = ("tensorrt",)  # a metapackage without wheels: its build fetches them from NVIDIA
AT_ONCE = 4


def pins(extra: str | None) -> str:
    """The tested pins, as the text of a requirements file."""
    files = ["requirements.txt"] + ([f"requirements-{extra}.txt"] if extra else [])
    return "".join((ROOT / "env" / file).read_text(encoding="utf-8") for file in files)


@cache
def setup_arguments() -> dict:
    """What setup.py hands to setup(), which is not run."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def ranges(extra: str | None) -> str:
    """The ranges of setup.py, as the text of a requirements file."""
    arguments = setup_arguments()
    return "\n".join(arguments["install_requires"] + (arguments["extras_require"][extra] if extra else []))


SETS = {"pins": pins, "ranges": ranges}


@dataclass(frozen=True)
class Case:
    """One resolution: which requirements, for which platform and Python."""

    name: str
    extra: str | None
    platform: str
    python: str

    @property
    def exists(self) -> bool:
        """Whether the platform has this extra at all."""
        return not (self.extra in NOT_ON_MACOS and "macOS" in self.platform)

    def command(self) -> list[str]:
        """The uv command line; the requirements go in by its standard input."""
        uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        wheels = [] if self.extra in FROM_SOURCE else ["--only-binary", ":all:"]
        place = ["--python-platform", PLATFORMS[self.platform], "--python-version", self.python]
        return [*uv, *wheels, *place, "-"]

    def failure(self) -> str | None:
        """None where the resolution succeeds, else what uv said."""
        settings = {
            "MACOSX_DEPLOYMENT_TARGET": "14.0",  # the oldest that torch has wheels for
            "UV_PYTHON_DOWNLOADS": "never",  # resolving for a Python does not need that Python
        }
        wanted, environment = SETS[self.name](self.extra), {**os.environ, **settings}
        done = subprocess.run(self.command(), input=wanted, env=environment, capture_output=True, text=True)
        return None if done.returncode == 0 else done.stderr.strip()


def row(name: str, extra: str | None, failures: dict[Case, str | None]) -> str:
    """One row of the table: for each platform the Pythons on which it resolves."""
    cells = []
    for platform in PLATFORMS:
        cases = [Case(name, extra, platform, python) for python in PYTHONS]
        good = ", ".join(case.python for case in cases if case.exists and failures[case] is None)
        cells.append((good or "**no**") if cases[0].exists else "does not exist")
    return f"| {name}{f' [{extra}]' if extra else ''} | {' | '.join(cells)} |"


def main(argv: list[str]) -> int:
    """Resolve all cases, a few at once; print the table, then what failed."""
    if argv not in ([], ["--quick"]):
        print(__doc__)
        return 2
    rows = list(product(SETS, (None,) if argv else (None, *EXTRAS)))
    cases = [Case(*which, *where) for which in rows for where in product(PLATFORMS, PYTHONS)]
    cases = [case for case in cases if case.exists]
    setup_arguments()  # once, before there are threads: it patches a module
    with ThreadPoolExecutor(AT_ONCE) as pool:
        failures = dict(zip(cases, pool.map(Case.failure, cases), strict=True))
    print(f"| requirements | {' | '.join(PLATFORMS)} |\n| --- |{' --- |' * len(PLATFORMS)}")
    for name, extra in rows:
        print(row(name, extra, failures))
    failed = {case: said for case, said in failures.items() if said is not None}
    for case, said in failed.items():
        print(f"\n{case}:\n{said}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
