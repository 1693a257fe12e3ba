"""All images of a folder restyled, streamed: each enters the denoising batch as the one before it moves on.

python examples/img2img/multi.py --input photos --prompt "a fox, flat vector" --output outputs/restyled
"""

import argparse
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import as_rgb, open_image, postprocess_image


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", type=Path, required=True, help="a folder of .png and .jpg")
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--strength", type=float, default=0.6, help="0 to 1 (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/restyled"), help="folder (default: %(default)s)")
    a = p.parse_args(argv)

    files = sorted(one for one in a.input.iterdir() if one.suffix.lower() in (".png", ".jpg", ".jpeg"))
    a.output.mkdir(parents=True, exist_ok=True)
    with StreamFlowWrapper(a.model, cfg_type="none", warmup=0) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps, strength=a.strength)
        images = (as_rgb(open_image(file)) for file in files)
        for file, frame in zip(files, wrapper.stream.frames(images), strict=True):
            postprocess_image(frame.wait().image[None])[0].save(a.output / f"{file.stem}.png")
    print(f"wrote {len(files)} images to {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
