"""StreamFlow: rectified-flow models in real time. `StreamFlow` is StreamDiffusion's class for flows.

The public names are imported when they are first used, so that a command of `streamflow` is ready within a moment and not
after the seconds that torch and diffusers take.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streamflow import pretrained as pretrained  # diffusers finds the embedded model's classes among the imported modules
from streamflow._environment import check_environment
from streamflow._version import __version__

if TYPE_CHECKING:
    from streamflow.app.wrapper_config import create_wrapper_from_config, load_config
    from streamflow.pipeline import StreamFlow
    from streamflow.video import VideoStream
    from streamflow.wrapper import StreamFlowWrapper

check_environment()

__all__ = ["StreamFlow", "StreamFlowWrapper", "VideoStream", "__version__", "create_wrapper_from_config", "load_config"]

_MODULES = {
    "StreamFlow": "streamflow.pipeline",
    "StreamFlowWrapper": "streamflow.wrapper",
    "VideoStream": "streamflow.video",
    "create_wrapper_from_config": "streamflow.app.wrapper_config",
    "load_config": "streamflow.app.wrapper_config",
}


_ENTRIES = (
    "acceleration app benchmark conditioning flow image_filter image_utils io live models parallel pipeline stream video "
    "wrapper"
).split()


def __getattr__(name: str) -> Any:
    if name in _ENTRIES:
        return import_module(f"streamflow.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
