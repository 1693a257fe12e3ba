"""Several devices in one process, processes of torchrun, and Ray actors.

from streamflow.parallel import decode, shard_denoiser, shard_vae
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamflow.parallel.in_turn import interleave
    from streamflow.parallel.ray_actors import RayModule
    from streamflow.parallel.rows import shard_denoiser
    from streamflow.parallel.split import spread
    from streamflow.parallel.tiles import decode, decode_tiled
    from streamflow.parallel.vae import ShardedVAE, shard_vae

__all__ = ["RayModule", "ShardedVAE", "decode", "decode_tiled", "interleave", "shard_denoiser", "shard_vae", "spread"]

_FILES = {
    "RayModule": "ray_actors",
    "decode": "tiles",
    "decode_tiled": "tiles",
    "interleave": "in_turn",
    "shard_denoiser": "rows",
    "spread": "split",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_FILES.get(name, 'vae')}"), name)
