"""The README says what is so: its Python blocks run, its links lead somewhere; and the list of substitutions that the page
for StreamDiffusion's users prints is the tests'."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
from diffusers import StableDiffusion3Pipeline
from family_table import RESULTS, in_readme, table
from PIL import Image
from readme_substitutions import SUBSTITUTIONS

from streamflow import StreamFlow, models
from streamflow.image_utils import postprocess_image
from streamflow.pretrained import embedded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    monkeypatch.setattr(models, "PIPELINES", dict(models.PIPELINES))
    scope: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), scope)
    saved = sorted(p.name for p in tmp_path.glob("*.png"))
    frames = ["frame0.png", "frame1.png", "frame2.png", "frame3.png", "frame4.png"]
    prompts = {
        "a fox.png": "a fox, 3d render",
        "a rocket.png": "a rocket, flat vector",
        "picture.png": "a red apple, 3d render",
    }
    prompts["a castle.png"] = "a castle, soft gradient, on a lavender background"
    assert saved == sorted([*frames, *prompts])
    for name in saved:
        assert Image.open(tmp_path / name).size == (128, 128)
    for name, prompt in prompts.items():  # each image is of its own prompt, and of no other
        drawn = np.asarray(Image.open(tmp_path / name), np.float32)
        off = {text: min(np.abs(drawn - one).mean() for one in drawn_alone(text)) for text in prompts.values()}
        assert min(off, key=off.get) == prompt and off[prompt] < 1, (name, off)


@cache
def drawn_alone(prompt: str) -> list[np.ndarray]:
    """The first frames of this prompt, each drawn to its end by itself."""
    pipe = StableDiffusion3Pipeline.from_pretrained(embedded(), text_encoder_3=None, tokenizer_3=None)
    stream = StreamFlow(pipe, [0, 1, 2, 3], cfg_type="none", use_denoising_batch=False)
    stream.prepare(prompt, num_inference_steps=4, max_sequence_length=0)
    return [np.asarray(one, np.float32) for one in postprocess_image(stream.txt2img(16))]


def test_links_and_images_are_there():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert not missing


def test_every_substitution_is_printed():
    page = (ROOT / "docs/from-streamdiffusion.md").read_text(encoding="utf-8")
    for what, _, replacement, why in SUBSTITUTIONS:
        row = next((line for line in page.splitlines() if line.startswith(f"| {what} |")), "")
        assert why.split(": ")[-1] in row
        assert (replacement.splitlines()[-1] if replacement else "removed") in row


def test_every_family_is_named():
    for name in models.FAMILIES:
        assert f"`{name}`" in README


def test_the_table_of_families_is_the_one_that_was_measured():
    text, result = (ROOT / "README.md").read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(result["families"]) == set(models.FAMILIES) - {"fallback"}
    assert in_readme(text, table(result)) == text
    assert all(found["error"] <= 1e-4 and found["guidance"] for found in result["families"].values())
