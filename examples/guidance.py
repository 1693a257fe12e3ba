"""What guidance does and costs: the same noise without it, with the full kind, and with the cheap residual kinds.

    python examples/guidance.py --prompt "a red apple, 3d render" --scale 1.2

Writes one sheet: none, full, self, initialize.
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import image_grid

KINDS = {"none": "no rows more", "full": "S more rows a tick", "self": "none", "initialize": "one"}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--negative-prompt", default="", help="what not to draw")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--scale", type=float, default=1.2, help="of guidance; initialize acts most (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/guidance.png"), help="default: %(default)s")
    a = p.parse_args(argv)

    images = []
    for kind, cost in KINDS.items():
        with StreamFlowWrapper(a.model, mode="txt2img", cfg_type=kind, warmup=0) as wrapper:
            guided = {} if kind == "none" else {"negative_prompt": a.negative_prompt, "guidance_scale": a.scale}
            wrapper.prepare(a.prompt, num_inference_steps=a.steps, **guided)
            images.append(wrapper())
        print(f"{kind}: {cost}")
    a.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, columns=len(images)).save(a.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
