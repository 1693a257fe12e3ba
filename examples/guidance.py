"""What guidance does and costs: the same image restyled without it, with the full kind, and with the cheap residual kinds.

    python examples/guidance.py --prompt "a tangerine, 3d render" --scale 1.2

Writes one labelled sheet: the input, none, full, self, initialize.
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import as_rgb, image_grid, open_image
from streamflow.samples import IMAGE

KINDS = {"none": "no more rows", "full": "S more rows", "self": "no more rows", "initialize": "one more row"}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--input", type=Path, default=IMAGE, help="an image (default: the sample drawing)")
    p.add_argument("--prompt", default="a tangerine, 3d render", help="default: %(default)s")
    p.add_argument("--negative-prompt", default="flat vector", help="what not to draw (default: %(default)s)")
    p.add_argument("--strength", type=float, default=0.75, help="above 0 to 1 (default: %(default)s)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--scale", type=float, default=1.2, help="guidance scale (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/guidance.png"), help="default: %(default)s")
    a = p.parse_args(argv)

    images = {}
    for kind, cost in KINDS.items():
        with StreamFlowWrapper(a.model, cfg_type=kind, warmup=0) as wrapper:
            guided = {} if kind == "none" else {"negative_prompt": a.negative_prompt, "guidance_scale": a.scale}
            wrapper.prepare(a.prompt, num_inference_steps=a.steps, strength=a.strength, **guided)
            images[kind] = wrapper(a.input)
        print(f"{kind}: {cost}")
    shown = {"input": as_rgb(open_image(a.input)).resize(images["none"].size), **images}
    a.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(list(shown.values()), columns=len(shown), labels=list(shown)).save(a.output)
    print(f"wrote {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
