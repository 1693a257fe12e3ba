"""How the rate grows with the frames that enter together.

    python examples/benchmark/multi.py --frame-buffer-sizes 1 2 4 8

The last line is JSON: images a second by frame buffer size.
"""

import argparse
import json
import time

import torch

from streamflow import StreamFlowWrapper


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--frame-buffer-sizes", type=int, nargs="+", default=[1, 2, 4], help="default: %(default)s")
    p.add_argument("--iterations", type=int, default=8, help="calls that are timed (default: %(default)s)")
    p.add_argument("--acceleration", default="auto", help="default: %(default)s")
    a = p.parse_args(argv)

    rates = {}
    for size in a.frame_buffer_sizes:
        options = {"cfg_type": "none", "acceleration": a.acceleration, "frame_buffer_size": size, "warmup": 2}
        with StreamFlowWrapper(a.model, mode="txt2img", **options) as wrapper:
            wrapper.prepare("a red apple, 3d render", num_inference_steps=a.steps)
            stream = wrapper.stream
            stream.txt2img()  # fills the batch
            begun = time.perf_counter()
            for _ in range(a.iterations):
                images = stream.txt2img()
            if images.is_cuda:
                torch.cuda.synchronize()
            rates[size] = round(size * a.iterations / (time.perf_counter() - begun), 2)
    print(json.dumps({"images_per_second": rates}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
