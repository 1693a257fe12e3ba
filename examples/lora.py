"""A LoRA in a running stream: the same noise at several strengths of it, changed between two images.

python examples/lora.py --lora owner/name --model stabilityai/stable-diffusion-3.5-medium --strengths 0 0.5 1
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import image_grid


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lora", required=True, help="hub id, folder or file of a LoRA for this model")
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/lora.png"), help="default: %(default)s")
    a = p.parse_args(argv)

    images = []
    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", warmup=0) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        wrapper.stream.load_lora(a.lora, "style")
        for strength in a.strengths:
            wrapper.stream.set_adapters({"style": strength})
            wrapper.stream.reset()  # so that every step of the next image has it
            images.append(wrapper())
        wrapper.stream.unload_lora()
    a.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, columns=len(images), labels=[f"strength {one:g}" for one in a.strengths]).save(a.output)
    print(f"wrote {a.output}: strengths {a.strengths}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
