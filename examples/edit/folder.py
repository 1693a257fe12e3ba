"""A folder of images edited by one prompt, as a stream: image after image enters, and one leaves with every call.

    python examples/edit/folder.py --input photos --prompt "the same object as a pencil drawing"

Writes outputs/edited/, a.jpg as a.jpg.png. Offline: `--model outputs/klein` of random_klein.py.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageOps

from streamflow import StreamFlowWrapper
from streamflow.image_utils import postprocess_image


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", type=Path, required=True, help="folder of images")
    p.add_argument("--model", default="black-forest-labs/FLUX.2-klein-4B", help="hub id or folder (default: %(default)s)")
    p.add_argument("--prompt", default="the same object as a pencil drawing", help="default: %(default)s")
    p.add_argument("--style", type=Path, help="an image that every image has as a second reference")
    p.add_argument("--size", type=int, nargs=2, default=(512, 512), help="width and height (default: 512 512)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/edited"), help="folder (default: %(default)s)")
    a = p.parse_args(argv)

    def opened(path: Path) -> Image.Image:
        return ImageOps.fit(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), tuple(a.size))

    paths = sorted(path for path in a.input.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not paths:
        p.error(f"{a.input} has no images")
    a.output.mkdir(parents=True, exist_ok=True)
    width, height = a.size
    options = {"cfg_type": "none", "width": width, "height": height, "use_tiny_vae": False, "warmup": 0}
    with StreamFlowWrapper(a.model, **options) as wrapper:
        if a.style:
            wrapper.stream.set_reference("style", opened(a.style))
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        for path, frame in zip(paths, wrapper.stream.frames(map(opened, paths)), strict=True):
            postprocess_image(frame.wait().image[None])[0].save(a.output / f"{path.name}.png")
    print(f"wrote {len(paths)} images to {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
