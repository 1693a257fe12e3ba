"""A walk from seed to seed: the noise moves on a great circle, the prompt stays, and the image changes shape.

python examples/seed_walk.py --prompt "a fox, 3d render" --output outputs/walk.gif
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import postprocess_image


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--frames", type=int, default=32, help="default: %(default)s")
    p.add_argument("--period", type=int, default=16, help="frames from one noise to the next (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/seed_walk.gif"), help="default: %(default)s")
    a = p.parse_args(argv)

    walking = {"noise": "interpolated", "noise_period": a.period}
    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", warmup=0, stream_options=walking) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        frames = wrapper.stream.frames([None] * a.frames)
        images = [postprocess_image(frame.wait().image[None])[0] for frame in frames]
    a.output.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(a.output, save_all=True, append_images=images[1:], duration=60, loop=0)
    print(f"wrote {len(images)} frames to {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
