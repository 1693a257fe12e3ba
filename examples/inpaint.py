"""Part of an image drawn anew: white in the mask is drawn, the rest is kept to the pixel.

python examples/inpaint.py --input photo.png --mask mask.png --prompt "a fox, 3d render"
"""

import argparse
from pathlib import Path

from PIL import Image

from streamflow import StreamFlowWrapper
from streamflow.image_utils import as_rgb, open_image
from streamflow.samples import IMAGE


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", type=Path, default=IMAGE, help="an image (default: the sample drawing)")
    p.add_argument("--mask", type=Path, help="an image, white where to draw (default: the left half)")
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a fox, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/inpaint.png"), help="default: %(default)s")
    a = p.parse_args(argv)

    with StreamFlowWrapper(a.model, cfg_type="none", warmup=0) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        size = wrapper.stream.width, wrapper.stream.height
        if a.mask:
            mask = open_image(a.mask).convert("L").resize(size)
        else:
            mask = Image.new("L", size)
            mask.paste(255, (0, 0, size[0] // 2, size[1]))
        image = as_rgb(open_image(a.input)).resize(size)
        wrapper.stream.inpaint(image, mask)  # holds for all frames until inpaint(None)
        a.output.parent.mkdir(parents=True, exist_ok=True)
        wrapper(image).save(a.output)
    print(f"wrote {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
