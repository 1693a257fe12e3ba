"""Part to engine bytes through the cache: what an engine's name is made of, and the way from module to file."""

from __future__ import annotations

from typing import Any

from streamflow.acceleration import Part
from streamflow.acceleration.tensorrt import cache, export, fingerprint, library
from streamflow.acceleration.tensorrt.build import Target, build
from streamflow.acceleration.tensorrt.options import Options
from streamflow.acceleration.tensorrt.profile import Profile


def facts(part: Part, profile: Profile, options: Options, target: Target, version: str) -> dict[str, Any]:
    """All that changes an engine's bytes, as JSON; `version`: the library's kind and version."""
    return {
        "part": part.name,
        "class": type(part.module).__qualname__,
        "weights": fingerprint.weights(part.module),
        "structure": fingerprint.structure(part.module),
        "inputs": {name: str(value.dtype).removeprefix("torch.") for name, value in part.inputs.items()},
        "shared": sorted(part.shared),
        "profile": profile.as_json(),
        "tensorrt": version,
        "gpu": {"name": target.name, "capability": list(target.capability)},
        "builder": {
            "tf32": options.tf32,
            "workspace_gb": options.workspace_gb,
            "optimization_level": options.optimization_level,
        },
        "export": {"version": export.VERSION, **fingerprint.versions()},
    }


def make(part: Part, profile: Profile, options: Options, target: Target, kind: str) -> tuple[cache.Entry, bytes]:
    """The engine of a part, from the cache or exported and built. Raises what the stages raise."""
    export.check_exportable(part)
    loaded = library.load(kind)
    known = facts(part, profile, options, target, str(loaded))
    entry = cache.entry_for(options.engine_dir, part.name, known)

    def build_it(scratch: Any) -> bytes:
        return build(export.export(part, profile, scratch), profile, options, loaded, target)

    return entry, cache.get_or_build(entry, known, build_it, options.rebuild)
