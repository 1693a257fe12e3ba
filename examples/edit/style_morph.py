"""One photo drawn in one style and then in another: the prompts' blend moves while the reference and the noise stay.

    python examples/edit/style_morph.py --input photo.png --prompt "as an oil painting" --to "as a pencil drawing"

Writes outputs/style_morph.gif, which goes there and back. Offline: `--model outputs/klein` of random_klein.py.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from streamflow import StreamFlowWrapper
from streamflow.image_utils import postprocess_image
from streamflow.samples import IMAGE


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", type=Path, default=IMAGE, help="an image (default: the sample)")
    p.add_argument("--model", default="black-forest-labs/FLUX.2-klein-4B", help="hub id or folder (default: %(default)s)")
    p.add_argument("--prompt", default="the same object as an oil painting", help="the first (default: %(default)s)")
    p.add_argument("--to", default="the same object as a pencil drawing", help="the second (default: %(default)s)")
    p.add_argument("--frames", type=int, default=24, help="from the one to the other (default: %(default)s)")
    p.add_argument("--size", type=int, nargs=2, default=(512, 512), help="width and height (default: 512 512)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/style_morph.gif"), help="default: %(default)s")
    a = p.parse_args(argv)
    if a.frames < 2:
        p.error(f"--frames must be 2 or more, not {a.frames}")

    width, height = a.size
    options = {"cfg_type": "none", "width": width, "height": height, "use_tiny_vae": False, "warmup": 0}
    photo = ImageOps.fit(ImageOps.exif_transpose(Image.open(a.input)).convert("RGB"), (width, height))
    with StreamFlowWrapper(a.model, **options) as wrapper:
        wrapper.prepare([(a.prompt, 1.0), (a.to, 0.0)], num_inference_steps=a.steps)

        def inputs() -> Iterator[Image.Image]:
            for k in range(a.frames):
                share = k / (a.frames - 1)
                wrapper.stream.update(prompt_weights=[1 - share, share], scope="frame")  # of the frame that enters next
                yield photo

        frames = [postprocess_image(frame.wait().image[None])[0] for frame in wrapper.stream.frames(inputs())]

    there_and_back = frames + frames[-2:0:-1]
    a.output.parent.mkdir(parents=True, exist_ok=True)
    there_and_back[0].save(a.output, save_all=True, append_images=there_and_back[1:], duration=60, loop=0)
    print(f"wrote {a.output}: {len(frames)} frames from {a.prompt!r} to {a.to!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
