"""What must be installed beside StreamFlow, read from the distributions' metadata alone: nothing heavy is imported.

Knows the two requirements that pip cannot keep for us: streamdiffusion, installed with --no-deps because it pins
diffusers 0.24, and a diffusers that nothing has pulled below our minimum. Knows nothing of devices (doctor does).
"""

from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DIFFUSERS_MINIMUM = "0.33"
DIFFUSERS_RANGE = ">=0.33,<0.50"
DIFFUSERS_COMMAND = f'pip install "diffusers{DIFFUSERS_RANGE}"'
STREAMDIFFUSION_COMMAND = "pip install --no-deps streamdiffusion==0.1.1"


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the one command that mends it."""

    state: str
    command: str


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirers_below_minimum(installed: str) -> list[str]:
    """The installed distributions that ask for a diffusers which is `installed` and never our minimum."""
    found = set()
    for distribution in metadata.distributions():
        for text in distribution.requires or ():
            if not text.lower().startswith("diffusers"):
                continue  # parsing every requirement of an environment would take a second
            requirement = Requirement(text)
            if canonicalize_name(requirement.name) != "diffusers":
                continue
            wanted = requirement.specifier
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and wanted.contains(installed, True) and not wanted.contains(DIFFUSERS_MINIMUM, True):
                name, version = distribution.metadata["Name"], distribution.version
                found.add(f"{name} {version} (it asks for {requirement.name}{wanted})")
    return sorted(found)


def streamdiffusion_problem() -> Problem | None:
    """What is wrong with streamdiffusion, or None."""
    if installed_version("streamdiffusion") is None:
        return Problem("StreamFlow subclasses streamdiffusion, which is not installed", STREAMDIFFUSION_COMMAND)
    return None


def diffusers_problem() -> Problem | None:
    """What is wrong with diffusers and what brought it about, or None."""
    installed = installed_version("diffusers")
    if installed is None:
        return Problem(f"StreamFlow needs diffusers{DIFFUSERS_RANGE}, which is not installed", DIFFUSERS_COMMAND)
    if Version(installed) >= Version(DIFFUSERS_MINIMUM):
        return None
    culprits = requirers_below_minimum(installed)
    cause = f"pulled down by {', '.join(culprits)}" if culprits else "though no installed distribution asks for that"
    state = f"StreamFlow needs diffusers{DIFFUSERS_RANGE} and found {installed}, {cause}"
    return Problem(state, DIFFUSERS_COMMAND)


def check_environment() -> None:
    """Raise ImportError, with the one command that mends it, where streamdiffusion or diffusers will not do."""
    for problem in (streamdiffusion_problem(), diffusers_problem()):
        if problem is not None:
            raise ImportError(f"{problem.state}. Mend it with: {problem.command}")
