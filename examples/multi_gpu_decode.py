"""The VAE on several GPUs: frames go round the devices while the next ones denoise, and come back in order.

python examples/multi_gpu_decode.py --devices cuda:0 cuda:1
python examples/multi_gpu_decode.py --devices cpu cpu
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import image_grid, postprocess_image
from streamflow.parallel import shard_vae


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--devices", nargs="+", default=["all"], help="default: all GPUs")
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--count", type=int, default=8, help="images (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/decode.png"), help="all of them (default: %(default)s)")
    a = p.parse_args(argv)

    devices = "all" if a.devices == ["all"] else a.devices
    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", warmup=0) as wrapper:
        wrapper.stream.vae = shard_vae(wrapper.stream.vae, devices)
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        images = []
        for frame in wrapper.stream.frames([None] * a.count):
            print(f"frame {frame.id} was decoded on {frame.image.device}")
            images.append(postprocess_image(frame.wait().image[None])[0])
    a.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images).save(a.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
