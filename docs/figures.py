"""Draw the sheets of images that the guides show, with the embedded model on a CPU.

    python docs/figures.py

Writes guidance.webp, steps.webp, strength.webp, mistakes.webp and control-images.webp to docs/static/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from streamflow import StreamFlowWrapper
from streamflow.conditioning.control_makers import ControlMaker
from streamflow.samples import IMAGE

STATIC = Path(__file__).parent / "static"
SIZE, MARGIN, CAPTION, COLUMNS = 160, 10, 48, 3


def draw(prompt: str, *, steps: int = 4, image: Path | None = None, **options: Any) -> Image.Image:
    """One image; `options` are those of the wrapper and of `prepare`."""
    prepare = {name: options.pop(name) for name in ("strength", "guidance_scale", "negative_prompt") if name in options}
    mode = "txt2img" if image is None else "img2img"
    with StreamFlowWrapper("embedded", mode=mode, warmup=0, **{"cfg_type": "none", **options}) as wrapper:
        wrapper.prepare(prompt, num_inference_steps=steps, **prepare)
        return wrapper(str(image)) if image else wrapper()


def sheet(images: dict[str, Image.Image], name: str) -> None:
    """The images on white in rows of `COLUMNS`, each above its caption."""
    rows, wide, high = -(-len(images) // COLUMNS), SIZE + MARGIN, SIZE + MARGIN + CAPTION
    page = Image.new("RGB", (COLUMNS * wide + MARGIN, rows * high + MARGIN), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=16)
    for k, (caption, image) in enumerate(images.items()):
        x, y = MARGIN + k % COLUMNS * wide, MARGIN + k // COLUMNS * high
        page.paste(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS), (x, y))
        pen.rectangle((x - 1, y - 1, x + SIZE, y + SIZE), outline="#d0d7de")
        pen.multiline_text((x, y + SIZE + 3), caption, fill="#222222", font=font)
    page.save(STATIC / name, quality=88)


def control_images() -> None:
    """An image and what the makers without a model make of it."""
    image = Image.open(IMAGE).convert("RGB")
    sheet({"the input": image, **{name: ControlMaker(name)(image) for name in ("canny", "lineart")}}, "control-images.webp")


def main() -> int:
    apple, fox = "a red apple, 3d render", "a fox, 3d render"
    guided = {"negative_prompt": "flat vector", "guidance_scale": 1.2, "image": IMAGE, "strength": 0.75}
    sheet(
        {
            "the input": Image.open(IMAGE),
            "none": draw("a tangerine, 3d render", image=IMAGE, strength=0.75),
            **{kind: draw("a tangerine, 3d render", cfg_type=kind, **guided) for kind in ("full", "self", "initialize")},
        },
        "guidance.webp",
    )
    sheet({f"{n} step{'s' * (n > 1)}": draw(fox, steps=n) for n in (1, 2, 4)}, "steps.webp")
    strengths = (0.25, 0.5, 0.75, 1.0)
    sheet(
        {
            "the input": Image.open(IMAGE),
            **{f"strength {s}": draw("a tangerine, 3d render", image=IMAGE, strength=s) for s in strengths},
        },
        "strength.webp",
    )
    sheet(
        {
            "as it should be": draw(apple),
            "text, late steps:\nt_index_list=[2, 3]": draw(apple, t_index_list=[2, 3]),
            "too much guidance:\nguidance_scale=8": draw(apple, cfg_type="full", guidance_scale=8.0),
            'an unknown prompt:\n"a street at night"': draw("a street at night"),
            "the image is ignored:\nstrength=1": draw(fox, image=IMAGE, strength=1.0),
        },
        "mistakes.webp",
    )
    control_images()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
