"""A family of your own in one class: here Stable Diffusion 3 written again.

    python examples/own_family.py --output outputs/own_family.png

The class says which arguments of the network belong to the prompt, and turns its output into dx/dsigma.
"""

import argparse
from pathlib import Path

from torch import nn

from streamflow import StreamFlowWrapper, models
from streamflow.models.adapter import FlowAdapter


class MyVelocity(nn.Module):
    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, x, t, encoder_hidden_states, pooled_projections, **extra):
        return self.transformer(x, encoder_hidden_states, pooled_projections, t, return_dict=False, **extra)[0]


class MyFamily(FlowAdapter):
    Velocity = MyVelocity
    row_inputs = ("encoder_hidden_states", "pooled_projections")
    widths = {"encoder_hidden_states": "joint_attention_dim", "pooled_projections": "pooled_projection_dim"}
    text_pipeline, image_pipeline = "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"
    multiple = property(lambda self: self.factor * self.net.config.patch_size)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/own_family.png"), help="default: %(default)s")
    a = p.parse_args(argv)

    models.FAMILIES["my-family"] = MyFamily
    with StreamFlowWrapper("embedded", mode="txt2img", cfg_type="none", family="my-family", warmup=0) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=4)
        a.output.parent.mkdir(parents=True, exist_ok=True)
        wrapper().save(a.output)
    print(f"wrote {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
