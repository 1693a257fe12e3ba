"""TensorRT, by StreamDiffusion's own call: engines of the network and the VAE, built once and kept in a folder.

    python examples/with_tensorrt.py --model stabilityai/stable-diffusion-3.5-medium --engine-dir engines

Needs a GPU and pip install "streamflow-rf[tensorrt-rtx]" or "streamflow-rf[tensorrt]"; `streamflow doctor` says which.
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.acceleration.tensorrt import accelerate_with_tensorrt


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--engine-dir", default="engines", help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/with_tensorrt.png"), help="default: %(default)s")
    a = p.parse_args(argv)

    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", warmup=0, acceleration="none") as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        accelerate_with_tensorrt(wrapper.stream, a.engine_dir, max_batch_size=a.steps, use_cuda_graph=True)
        a.output.parent.mkdir(parents=True, exist_ok=True)
        wrapper().save(a.output)
    print(f"wrote {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
