"""Measures one model on one machine: the speed of plain diffusers and of each optimisation on top of it.

    python -m streamflow.benchmark --model sd15 --random-weights --steps 4 --width 512 --height 512

The variants (`settings.TITLES`) are timed one after another with the same noise and prompt: plain diffusers, the same
compiled, the denoising batch, and the batch accelerated. `settings` reads the command line, `subject` loads the model,
`timing` measures calls, `measure` measures a variant, `report` writes the table and the JSON, `plot` the plots, and
`machine` describes the hardware and the versions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 where a variant failed, 2 for an invalid argument."""
    from streamflow.benchmark.settings import parse

    argv = list(sys.argv[1:] if argv is None else argv)
    parser, settings = parse(argv)
    from streamflow.benchmark.command import main as run  # imports torch, which --help does not need

    return run(argv, parser, settings)
