"""StreamFlow: rectified-flow models in real time. `StreamFlow` is StreamDiffusion's class for flows."""

from streamflow._version import __version__
from streamflow.requirements_check import check_environment

check_environment()

from streamflow import pretrained  # noqa: E402, F401  (after the check, whose error names the remedy)
from streamflow.pipeline import StreamFlow  # noqa: E402
from streamflow.wrapper import StreamFlowWrapper  # noqa: E402

__all__ = ["StreamFlow", "StreamFlowWrapper", "__version__"]
