"""The code that torch.compile has generated in this process, as a file for other machines of the same kind.

`save` writes torch's cache artifacts, which torch collects while it compiles or finds compiled code on disk. `load` puts
them into the cache on disk (`TORCHINDUCTOR_CACHE_DIR`) before anything is compiled, where torch finds them.

The file is two lines of text, a name and a header in JSON, followed by the artifacts. The header says for which software and
hardware they are, with their size and their SHA-256, which detects damage. It does not prove who made the file: torch stores
compiled graphs as pickles, and reading those runs code. Load only files that you or someone you trust has made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from streamflow._files import Json, read_json, replacing

logger = logging.getLogger(__name__)
NAME = b"streamflow compile cache 1\n"
LONGEST_HEADER = 2**16  # bytes
KINDS = ("inductor", "aot_autograd", "autotune")  # of artifacts; others are not needed, and their keys are no file names
KEY = re.compile(r"[\w=-][\w.=-]*(/[\w=-][\w.=-]*)?")  # torch makes file names of keys: a name, or a folder and a name


@dataclass(frozen=True)
class CompileCache:
    """What a file holds. entries: compiled graphs and tuned kernels. bytes: of the artifacts. made_for: software and
    hardware."""

    entries: int
    bytes: int
    made_for: Mapping[str, str | None]


def machine_facts(device: torch.device | str) -> dict[str, str | None]:
    """What compiled code depends on."""
    device = torch.device(device)
    facts: dict[str, str | None] = {
        "torch": torch.__version__,
        "triton": next((metadata.version(name) for name in ("triton", "pytorch-triton") if _installed(name)), None),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    else:
        facts["cpu"] = torch.backends.cpu.get_cpu_capability()
    return facts


def _installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def save(path: str | Path, device: torch.device | str) -> CompileCache:
    """Write all that was compiled in this process, whole or not at all. device: for which it was compiled.

    Raises:
        RuntimeError: nothing was compiled. OSError: the file cannot be written.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise RuntimeError(
            "nothing was compiled in this process: accelerate('compile'), prepare and draw an image before saving"
        )
    data, _ = saved
    facts = machine_facts(device)
    header = {"made_for": facts, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with replacing(Path(path)) as file:
        file.write(NAME)
        file.write(json.dumps(header).encode() + b"\n")
        file.write(data)
    return CompileCache(sum(map(len, _artifacts(data, str(path)).values())), len(data), facts)


def load(path: str | Path, device: torch.device | str) -> CompileCache:
    """Put a file's artifacts into the cache on disk. This runs code that the file holds: load only trusted files.

    Raises:
        ValueError: the file is damaged or is no such file. RuntimeError: it was made for other software or hardware, with
        every difference. OSError: it cannot be read, or the cache cannot be written.
    """
    from torch.compiler._cache import CacheArtifactManager

    header, data = _read(Path(path))
    here, made_for = machine_facts(device), header["made_for"]
    differing = [name for name in {**made_for, **here} if made_for.get(name) != here.get(name)]
    if differing:
        found = ", ".join(f"{name} {made_for.get(name)} and not {here.get(name)}" for name in differing)
        raise RuntimeError(f"{path} was made for another machine ({found}): make one here, streamflow engines export FILE")
    artifacts = _artifacts(data, str(path))
    CacheArtifactManager.populate_caches(artifacts)
    return CompileCache(sum(map(len, artifacts.values())), len(data), made_for)


def _read(path: Path) -> tuple[Json, bytes]:
    """The header and the artifacts of a file. ValueError: they do not belong together."""
    with path.open("rb") as file:
        if file.readline(len(NAME)) != NAME:
            raise ValueError(f"{path} is no compile cache of streamflow: it does not begin with {NAME.decode().strip()!r}")
        line = file.readline(LONGEST_HEADER)
        data = file.read()
    try:
        header = read_json(line.decode())
        facts, size, digest = header["made_for"], header["bytes"], header["sha256"]
        known = isinstance(facts, dict) and all(isinstance(one, (str, type(None))) for one in facts.values())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read ({error})") from error
    if not known or size != len(data) or digest != hashlib.sha256(data).hexdigest():
        raise ValueError(
            f"{path} is damaged: it holds {len(data)} bytes that are not the {size} that were written; copy it again"
        )
    return header, data


def _artifacts(data: bytes, path: str) -> dict:
    """Torch's artifacts by kind. Nothing is unpickled here. ValueError: a key that is no plain file name."""
    from torch.compiler._cache import CacheArtifactManager

    artifacts = CacheArtifactManager.deserialize(data)
    if artifacts is None:
        raise ValueError(f"{path} is damaged: torch cannot read its artifacts")
    chosen = {kind: artifacts[kind] for kind in KINDS if kind in artifacts}
    for one in (one for entries in chosen.values() for one in entries):
        if not KEY.fullmatch(one.key):
            raise ValueError(f"{path} is damaged: {one.key[:80]!r} is no file name of torch's cache")
    return chosen
