"""A control net in the stream: every frame follows its own control image, such as its edges.

python examples/controlnet.py --control-net owner/name --images edges --model stabilityai/stable-diffusion-3.5-large
"""

import argparse
from pathlib import Path

import diffusers

from streamflow import StreamFlowWrapper
from streamflow.image_utils import as_rgb, open_image, postprocess_image
from streamflow.stream.frames import Input


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--control-net", required=True, help="hub id or folder of a diffusers control net for this model")
    p.add_argument("--net-class", default="SD3ControlNetModel", help="its class in diffusers (default: %(default)s)")
    p.add_argument("--images", type=Path, required=True, help="a folder of control images")
    p.add_argument("--scale", type=float, default=0.7, help="default: %(default)s")
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/controlnet"), help="folder (default: %(default)s)")
    a = p.parse_args(argv)

    a.output.mkdir(parents=True, exist_ok=True)
    files = sorted(a.images.glob("*.png"))
    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", warmup=0) as wrapper:
        stream = wrapper.stream
        net = getattr(diffusers, a.net_class).from_pretrained(a.control_net, torch_dtype=stream.dtype)
        stream.add_control("control", net.to(stream.device), scale=a.scale)
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        inputs = (Input(None, control={"control": as_rgb(open_image(file))}) for file in files)
        for file, frame in zip(files, stream.frames(inputs), strict=True):
            postprocess_image(frame.wait().image[None])[0].save(a.output / file.name)
    print(f"wrote {len(files)} images to {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
