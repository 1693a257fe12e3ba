"""A walk from seed to seed: the noise moves on a great circle, the prompt stays, and the image changes shape.

    python examples/seed_walk.py --prompt "a face, 3d render" --seeds 2 3 8 11

Writes outputs/seed_walk.gif, which ends where it began. Each seed's own image is among the frames. The embedded model draws
a prompt that names one emoji, such as "a fox, 3d render", nearly alike for every seed; "a face" leaves it a choice.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import postprocess_image


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a face, 3d render", help="default: %(default)s")
    p.add_argument(
        "--seeds", type=int, nargs="+", default=[2, 3, 8, 11], help="in the order of the walk (default: 2 3 8 11)"
    )
    p.add_argument("--frames", type=int, default=16, help="from each seed to the next (default: %(default)s)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/seed_walk.gif"), help="default: %(default)s")
    a = p.parse_args(argv)

    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", warmup=0) as wrapper:
        stream, noises = wrapper.stream, []
        for seed in (*a.seeds, a.seeds[0]):
            wrapper.prepare(a.prompt, num_inference_steps=a.steps, seed=seed)
            noises.append(stream.frame_noise(0))
        latents = []
        for one, other in pairwise(noises):
            for k in range(a.frames):
                angle = math.pi / 2 * k / a.frames
                latents.append(stream.predict_x0_batch(math.cos(angle) * one + math.sin(angle) * other))
        finished = [x for x in latents if x is not None] + stream.flush()  # None while the ring fills
        images = [postprocess_image(stream.decode_image(x))[0] for x in finished]
    a.output.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(a.output, save_all=True, append_images=images[1:], duration=60, loop=0)
    print(f"wrote {a.output}: {len(images)} frames, over the seeds {', '.join(map(str, a.seeds))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
