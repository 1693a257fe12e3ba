"""StreamFlow: rectified-flow models in real time. `StreamFlow` is StreamDiffusion's class for flows."""

from streamflow._environment import check_environment
from streamflow._version import __version__

check_environment()

# After the check, whose error names the remedy. `pretrained`, since diffusers loads the embedded model's folder by it.
from streamflow import pretrained  # noqa: E402, F401
from streamflow.app.wrapper_config import create_wrapper_from_config, load_config  # noqa: E402
from streamflow.pipeline import StreamFlow  # noqa: E402
from streamflow.wrapper import StreamFlowWrapper  # noqa: E402

__all__ = ["StreamFlow", "StreamFlowWrapper", "__version__", "create_wrapper_from_config", "load_config"]
