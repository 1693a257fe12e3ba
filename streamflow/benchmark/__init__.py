"""Measures one model on one machine, and says where each factor of the speed comes from.

    python -m streamflow.benchmark --model sd15 --random-weights --steps 4 --width 512 --height 512

Ways of drawing (`ways.VARIANTS`) are timed one after another on the same noise and prompt: plain diffusers, the same
compiled, the denoising batch, and what acceleration adds to it. `settings` reads the command line, `subject` brings the
model, `timing` the clock, `measure` one way's figures, `report` the table and the JSON, `plot` the picture, `machine`
what it ran on.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 1 where a variant failed, 2 for an argument that cannot be."""
    from streamflow.benchmark.command import main as run

    return run(argv)
