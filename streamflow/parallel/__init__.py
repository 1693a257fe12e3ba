"""Several devices in one process, processes of torchrun, and Ray actors.

from streamflow.parallel import decode, shard_denoiser, shard_vae
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "RayModule": "streamflow.parallel.ray_actors",
    "ShardedVAE": "streamflow.parallel.vae",
    "decode": "streamflow.parallel.decoding",
    "decode_tiled": "streamflow.parallel.tiles",
    "shard_denoiser": "streamflow.parallel.rows",
    "shard_vae": "streamflow.parallel.vae",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_WHERE[name]), name)
