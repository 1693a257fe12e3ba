"""Several images a call: frames that enter the denoising batch together and leave it together.

python examples/txt2img/multi.py --frame-buffer-size 3 --output outputs/txt2img-multi
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--frame-buffer-size", type=int, default=3, help="images a call (default: %(default)s)")
    p.add_argument("--calls", type=int, default=2, help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/txt2img-multi"), help="folder (default: %(default)s)")
    a = p.parse_args(argv)

    a.output.mkdir(parents=True, exist_ok=True)
    size = a.frame_buffer_size
    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", frame_buffer_size=size, warmup=0) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        for call in range(a.calls):
            for k, image in enumerate(wrapper.txt2img()):
                image.save(a.output / f"{call * size + k}.png")
    print(f"wrote {a.calls * size} images to {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
