"""StreamFlow: rectified-flow models in real time. `StreamFlow` is StreamDiffusion's class for flows."""

from streamflow._version import __version__
from streamflow.requirements_check import check_environment

check_environment()

from streamflow.pipeline import StreamFlow  # noqa: E402  (after the check, whose error names the remedy)
from streamflow.wrapper import StreamFlowWrapper  # noqa: E402

__all__ = ["StreamFlow", "StreamFlowWrapper", "__version__"]
