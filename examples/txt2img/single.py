"""An image of a prompt, or several, drawn one a call.

python examples/txt2img/single.py --prompt "a fox, 3d render" --output outputs/txt2img
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--count", type=int, default=2, help="images (default: %(default)s)")
    p.add_argument("--seed", type=int, default=2, help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/txt2img"), help="folder (default: %(default)s)")
    a = p.parse_args(argv)

    a.output.mkdir(parents=True, exist_ok=True)
    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", seed=a.seed, warmup=0) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        for k in range(a.count):
            wrapper().save(a.output / f"{k}.png")
    print(f"wrote {a.count} images to {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
