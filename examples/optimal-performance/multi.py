"""As many images as one GPU draws: several frames a tick, a tiny VAE, compilation and CUDA graphs; the rate is printed.

python examples/optimal-performance/multi.py --model stabilityai/stable-diffusion-3.5-medium --frame-buffer-size 8
"""

import argparse
import time
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import image_grid, postprocess_image


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--frame-buffer-size", type=int, default=4, help="frames a tick (default: %(default)s)")
    p.add_argument("--count", type=int, default=16, help="images (default: %(default)s)")
    p.add_argument("--acceleration", default="auto", help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/multi.png"), help="all of them (default: %(default)s)")
    a = p.parse_args(argv)

    fast = {"use_tiny_vae": True, "acceleration": a.acceleration, "cfg_type": "none"}
    size = a.frame_buffer_size
    with StreamFlowWrapper(a.model, mode="txt2img", frame_buffer_size=size, warmup=2, **fast) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        begun = time.perf_counter()
        images = [frame.wait().image for frame in wrapper.stream.frames([None] * a.count)]
        seconds = time.perf_counter() - begun
    a.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid([postprocess_image(one[None])[0] for one in images]).save(a.output)
    print(f"{a.count / seconds:.1f} images a second, filling and emptying the batch included")
    print(f"wrote {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
