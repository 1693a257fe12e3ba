"""An image restyled. What is given is noised to a level in the middle and drawn from there: low strength keeps more of it.

python examples/img2img/single.py --input photo.png --prompt "a fox, flat vector" --strength 0.6
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.samples import IMAGE


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", type=Path, default=IMAGE, help="an image (default: the sample drawing)")
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--strength", type=float, default=0.6, help="0 to 1 (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/img2img.png"), help="default: %(default)s")
    a = p.parse_args(argv)

    a.output.parent.mkdir(parents=True, exist_ok=True)
    with StreamFlowWrapper(a.model, cfg_type="none", warmup=0) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps, strength=a.strength)
        wrapper(a.input).save(a.output)  # the first call fills the batch with this image
    print(f"wrote {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
