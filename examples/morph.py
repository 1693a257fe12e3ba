"""One image turns into another: the prompts' blend moves from the first to the second while the noise stays.

    python examples/morph.py

Writes outputs/morph.gif, which goes there and back. `streamflow morph PROMPT PROMPT ...` does it for any number of prompts,
as a GIF or a video.
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import postprocess_image


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="the first (default: %(default)s)")
    p.add_argument("--to", default="a tangerine, 3d render", help="the second (default: %(default)s)")
    p.add_argument("--frames", type=int, default=30, help="from the one to the other (default: %(default)s)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/morph.gif"), help="default: %(default)s")
    a = p.parse_args(argv)

    with StreamFlowWrapper(a.model, mode="txt2img", cfg_type="none", warmup=0) as wrapper:
        wrapper.prepare([(a.prompt, 1.0), (a.to, 0.0)], num_inference_steps=a.steps, blend="slerp")
        stream = wrapper.stream
        noise = stream.frame_noise(0)
        latents = []
        for k in range(a.frames):
            share = k / (a.frames - 1)
            stream.update(prompt_weights=[1 - share, share], scope="frame")  # a frame keeps its blend at every step
            latents.append(stream.predict_x0_batch(noise))  # None while the ring fills
        finished = [x for x in latents if x is not None] + stream.flush()
        frames = [postprocess_image(stream.decode_image(x))[0] for x in finished]

    there_and_back = frames + frames[-2:0:-1]
    a.output.parent.mkdir(parents=True, exist_ok=True)
    there_and_back[0].save(a.output, save_all=True, append_images=there_and_back[1:], duration=60, loop=0)
    print(f"wrote {a.output}: {len(frames)} frames from {a.prompt!r} to {a.to!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
