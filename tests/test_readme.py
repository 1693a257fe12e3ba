"""The README says what is so: its blocks run as they are printed, in an empty folder, and draw what was prompted; its links
lead somewhere. The tables of families are those that were measured, and the list of substitutions that the page for
StreamDiffusion's users prints is the tests'."""

import json
import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import stand_ins
from diffusers import StableDiffusion3Pipeline
from family_table import PAGE, RESULTS, in_page, tables
from PIL import Image
from readme_substitutions import SUBSTITUTIONS

from streamflow import StreamFlow, models
from streamflow.app import cli
from streamflow.image_utils import postprocess_image
from streamflow.pretrained import embedded
from streamflow.samples import IMAGE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OTHERS = ("a red apple, 3d render", "a rocket, flat vector", "a peach, 3d render")


def test_it_is_short():
    assert len(README.splitlines()) <= 180 and len(README) <= 12_000


@pytest.mark.slow
def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for needs, block in stand_ins.blocks(README, "python"):
        if not needs:
            stand_ins.run_python(block, "README.md", scope)
    saved = sorted(path.name for path in tmp_path.glob("*.png"))
    assert saved == ["fox.png", "tangerine0.png", "tangerine1.png", "tangerine2.png"]
    for name in saved:  # each image is of its own prompt, and of no other
        prompt, image = ("a fox, 3d render", None) if name == "fox.png" else ("a tangerine, 3d render", IMAGE)
        drawn = np.asarray(Image.open(tmp_path / name), np.float32)
        assert drawn.shape == (128, 128, 3)
        prompts = {"a fox, 3d render", "a tangerine, 3d render", *OTHERS}
        off = {text: min(np.abs(drawn - one).mean() for one in drawn_alone(text, image)) for text in prompts}
        assert min(off, key=off.get) == prompt and off[prompt] < 1, (name, off)
    shown = np.asarray(Image.open(ROOT / "static/fox.png").convert("RGB").resize((128, 128)), np.float32)
    assert np.abs(shown - np.asarray(Image.open(tmp_path / "fox.png"), np.float32)).mean() < 3  # what the README shows


@cache
def drawn_alone(prompt: str, image: Path | None) -> list[np.ndarray]:
    """The first frames of this prompt, each drawn to its end by itself."""
    pipe = StableDiffusion3Pipeline.from_pretrained(embedded(), text_encoder_3=None, tokenizer_3=None)
    stream = StreamFlow(pipe, [0, 1, 2, 3] if image is None else [1, 2, 3], cfg_type="none", use_denoising_batch=False)
    stream.prepare(prompt, num_inference_steps=4, max_sequence_length=0)
    frames = stream.txt2img(16) if image is None else stream(Image.open(image))
    return [np.asarray(one, np.float32) for one in postprocess_image(frames)]


@pytest.mark.slow
def test_every_block_runs_with_what_stands_in_for_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    left_out = []
    for needs, block in stand_ins.blocks(README, "python", "bash"):
        if reasons := stand_ins.not_run(needs):
            left_out += reasons
            continue
        stand_ins.stand_in(needs, monkeypatch, tmp_path)
        if block.startswith("streamflow "):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                assert cli.main(stand_ins.arguments(words, needs)) == 0, line
        else:
            stand_ins.run_python(block, "README.md", scope)
    with capsys.disabled():
        print("\nREADME, not run:", *sorted(set(left_out)), sep="\n  ")
    assert {one.partition(":")[0] for one in left_out} == {"shell-install"}
    assert scope["image"].size == (512, 512)  # of the model that a hub would give
    for name in ("tangerine.mp4", "out.mp4"):
        assert (tmp_path / name).stat().st_size > 1000, name


def test_it_says_why_streamdiffusion_is_installed():
    for page in ("README.md", "docs/install.md"):
        said = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert "`StreamFlow` subclasses its class; it needs no weights" in said, page


def test_links_and_images_are_there():
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert not missing


def test_the_workflow_runs_its_two_commands():
    workflow = (ROOT / ".github/workflows/readme.yml").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 (env/install\.py .*)$", README, re.MULTILINE)[:2]
    assert [one.strip() for one in re.findall(r"run: .*?(env/install\.py .*)", workflow)] == commands


def test_every_substitution_is_printed():
    page = (ROOT / "docs/from-streamdiffusion.md").read_text(encoding="utf-8")
    for what, _, replacement, why in SUBSTITUTIONS:
        row = next((line for line in page.splitlines() if line.startswith(f"| {what} |")), "")
        assert why.split(": ")[-1] in row
        assert (replacement.splitlines()[-1] if replacement else "removed") in row


def test_every_family_is_named():
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in models.FAMILIES if f"`{name}`" not in page and f'`family="{name}"`' not in page] == []


def test_the_tables_of_families_are_those_that_were_measured():
    text, result = PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(result["families"]) == set(models.FAMILIES) - {"fallback"}
    assert in_page(text, tables(result)) == text
    own, exact = result["families"], [one for one in result["families"].values() if one["equal"]]
    assert (
        f"row by row to the bit in {len(exact)} of {len(own)} families" in README
        and f"{len(own)} families, of which" in README
    )
    assert all(found["error"] <= 1e-4 and found["guidance"] for found in result["families"].values())
