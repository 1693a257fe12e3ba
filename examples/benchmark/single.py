"""How fast one image a tick is drawn: the denoising batch, and the same images one after another.

    python examples/benchmark/single.py --model stabilityai/stable-diffusion-3.5-medium --steps 4

`streamflow benchmark` measures more, with spreads, and says where each factor comes from. The last line is JSON.
"""

import argparse
import json
import time

import torch
from tqdm import tqdm

from streamflow import StreamFlowWrapper


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--iterations", type=int, default=20, help="calls that are timed (default: %(default)s)")
    p.add_argument("--acceleration", default="auto", help="default: %(default)s")
    a = p.parse_args(argv)

    rates = {}
    for name, batched in (("batch", True), ("one_after_another", False)):
        options = {"cfg_type": "none", "acceleration": a.acceleration, "use_denoising_batch": batched, "output_type": "pt"}
        with StreamFlowWrapper(a.model, mode="txt2img", warmup=3, **options) as wrapper:
            wrapper.prepare("a red apple, 3d render", num_inference_steps=a.steps)
            wrapper()  # fills the batch
            begun = time.perf_counter()
            for _ in tqdm(range(a.iterations), desc=name, unit="image"):
                image = wrapper()
            if image.is_cuda:
                torch.cuda.synchronize()
            rates[name] = round(a.iterations / (time.perf_counter() - begun), 2)
    print(json.dumps({"images_per_second": rates, "ratio": round(rates["batch"] / rates["one_after_another"], 3)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
