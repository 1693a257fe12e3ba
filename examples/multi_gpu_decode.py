"""The VAE on several devices: frames go to the devices in turn while the next ones denoise, and come back in order.

python examples/multi_gpu_decode.py --devices cuda:0 cuda:1
python examples/multi_gpu_decode.py --devices cpu cpu
python examples/multi_gpu_decode.py --ray 2                # two Ray actors, on GPUs or CPU cores; Ray replaces lost ones
"""

import argparse
from pathlib import Path

from streamflow import StreamFlow, StreamFlowWrapper
from streamflow.image_utils import image_grid, postprocess_image
from streamflow.models.codec import Codec
from streamflow.parallel import RayModule, shard_vae


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--devices", nargs="+", default=["all"], help="default: all GPUs")
    p.add_argument("--ray", type=int, metavar="ACTORS", help="decode on this many Ray actors instead of --devices")
    p.add_argument("--address", help="of a running Ray cluster; by default Ray starts on this machine")
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--count", type=int, default=8, help="images (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/decode.png"), help="all of them (default: %(default)s)")
    a = p.parse_args(argv)

    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", warmup=0) as wrapper:
        if a.ray:
            decode_on_ray(wrapper.stream, a.ray, a.address)
        else:
            wrapper.stream.vae = shard_vae(wrapper.stream.vae, "all" if a.devices == ["all"] else a.devices)
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        images = []
        for frame in wrapper.stream.frames([None] * a.count):
            print(f"frame {frame.id} is on {frame.image.device}")
            images.append(postprocess_image(frame.wait().image[None])[0])
    a.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images).save(a.output)
    print(f"wrote {a.output}")
    return 0


def decode_on_ray(stream: StreamFlow, actors: int, address: str | None) -> None:
    """Decode the stream's frames on Ray actors, one for each GPU of the cluster, or for each CPU core without GPUs."""
    import ray

    ray.init(address=address, include_dashboard=False, log_to_driver=False)
    num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
    stream.codec = Codec.of(RayModule(stream.codec.decoder, actors, num_gpus=num_gpus), stream.codec.encoder)


if __name__ == "__main__":
    raise SystemExit(main())
