"""Models of the hub with the settings that suit them.

    python examples/real_models.py flux-schnell --prompt "a lighthouse in a storm"
    python examples/real_models.py instaflow

sd3.5, sd3.5-turbo, flux-schnell, sana, instaflow and perflow. Some ask for an account and a licence on the hub first.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from streamflow import StreamFlowWrapper


@dataclass(frozen=True)
class Model:
    """Where it is, the steps and the guidance it was made for, and its family where the pipeline's class does not tell."""

    where: str
    steps: int
    cfg_type: str = "none"
    scale: float | None = None
    family: str | None = None


MODELS = {
    "sd3.5": Model("stabilityai/stable-diffusion-3.5-medium", 28, "full", 4.5),
    "sd3.5-turbo": Model("stabilityai/stable-diffusion-3.5-large-turbo", 4),
    "flux-schnell": Model("black-forest-labs/FLUX.1-schnell", 4),
    "sana": Model("Efficient-Large-Model/Sana_600M_512px_diffusers", 20, "full", 4.5),
    "instaflow": Model("XCLiu/instaflow_0_9B_from_sd_1_5", 1, family="instaflow"),
    "perflow": Model("hansyan/perflow-sd15-dreamshaper", 4, "full", 7.5, "perflow"),
    "embedded": Model("embedded", 4),
}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=MODELS, help="which")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--count", type=int, default=4, help="images (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs"), help="folder (default: %(default)s)")
    a = p.parse_args(argv)

    model = MODELS[a.name]
    a.output.mkdir(parents=True, exist_ok=True)
    with StreamFlowWrapper(model.where, mode="txt2img", cfg_type=model.cfg_type, family=model.family, warmup=0) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=model.steps, guidance_scale=model.scale)
        for k in range(a.count):
            wrapper().save(a.output / f"{a.name}-{k}.png")
    print(f"wrote {a.count} images to {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
