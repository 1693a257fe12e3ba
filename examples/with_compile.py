"""torch.compile, with CUDA graphs on a GPU: the same images, sooner. How long it takes to begin is printed too.

python examples/with_compile.py --model stabilityai/stable-diffusion-3.5-medium
python examples/with_compile.py --acceleration cuda-graph
"""

import argparse
import time
from pathlib import Path

from streamflow import StreamFlowWrapper


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--acceleration", default="compile", help="or cuda-graph, tensorrt, onnxruntime (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/with_compile.png"), help="default: %(default)s")
    a = p.parse_args(argv)

    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", warmup=0, acceleration="none") as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        begun = time.perf_counter()
        wrapper.stream.accelerate(a.acceleration)
        image = wrapper()
        print(f"first image after {time.perf_counter() - begun:.1f} s")
        begun = time.perf_counter()
        image = wrapper()
        print(f"the next one after {1e3 * (time.perf_counter() - begun):.1f} ms")
        wrapper.stream.accelerate("none")  # and back
    a.output.parent.mkdir(parents=True, exist_ok=True)
    image.save(a.output)
    print(f"wrote {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
