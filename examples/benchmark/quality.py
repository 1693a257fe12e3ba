"""Draw how the embedded model's images depend on the number of steps, from the figures of its evaluation.

    python examples/benchmark/quality.py --output outputs/quality.png

The figures are those of examples/train_emoji/evaluate.py: how many images are nearest to the prompted concept among all
training images of their style, and the median PSNR to the training image that the prompt names.
Needs matplotlib: pip install "streamflow-rf[bench]".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from streamflow.benchmark.plot import OTHERS, OURS, figure, style
from streamflow.pretrained import FOLDER

SETS = {"seen": ("trained concepts", OURS), "withheld_3d": ("concepts whose 3d image was withheld", OTHERS[1])}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--input",
        type=Path,
        default=FOLDER / "evaluation.json",
        help="JSON of an evaluation (default: the embedded model's)",
    )
    p.add_argument("--output", type=Path, default=Path("outputs/quality.png"), help="default: %(default)s")
    a = p.parse_args(argv)
    found = json.loads(a.input.read_text(encoding="utf-8"))
    with style():
        made, (named, near) = figure(10, 3.8, 1, 2)
        for name, (label, colour) in SETS.items():
            steps = {int(n): figures for n, figures in found[name].items() if n.isdigit()}
            line = {"color": colour, "marker": "o", "label": f"{label} ({found[name]['prompts']})"}
            named.plot(list(steps), [100 * one["named"] for one in steps.values()], **line)
            near.plot(list(steps), [one["median_psnr_to_the_image"] for one in steps.values()], **line)
        for axes, what, top in (
            (named, "images of the prompted concept, %", 105),
            (near, "median PSNR to its image, dB", 45),
        ):
            axes.set_xscale("log", base=2)
            axes.set_xticks([1, 2, 4, 8, 28], ["1", "2", "4", "8", "28"])
            axes.set_xticks([], minor=True)
            axes.set(xlabel="steps", ylabel=what, ylim=(0, top))
            axes.grid(axis="y")
        named.legend(loc="lower right")
        a.output.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(a.output, dpi=150)
    print(f"wrote {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
