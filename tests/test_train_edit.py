"""The scripts that train the edit model: doodles, pairs, measures, and the folder that they write."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from PIL import Image, ImageDraw
from uploads import Uploads

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "examples" / "train_edit"
sys.path.insert(0, str(SCRIPTS))

import edit_model  # noqa: E402
import hand_drawn  # noqa: E402
import pairs  # noqa: E402
import scores  # noqa: E402
from captions import STYLES  # noqa: E402
from doodles import COLOURS, borders, doodle, palette, regions, thick  # noqa: E402
from emoji_modules import HOLDOUT  # noqa: E402
from evaluate import Judge, sheet  # noqa: E402
from pack import read_pack  # noqa: E402
from train import Recipe, Store, some_sigma  # noqa: E402

SIZE = 128
HELD_OUT = "zebra"
SHAPES = {  # label: (kind of the drawing, colour)
    "red ball": ("ball", "#dc2020"),
    "box": ("box", "#2050dc"),
    HELD_OUT: ("ball", "#20a040"),
}


def image(kind: str, colour: str, style: str) -> Image.Image:
    """A shape with a stripe whose colour depends on the style; in noto it is smaller, in blob another shape."""
    kind = {"ball": "box", "box": "ball"}[kind] if style == "blob" else kind
    found = Image.new("RGBA", (SIZE, SIZE))
    pen = ImageDraw.Draw(found)
    box = (40, 45, 88, 83) if style == "noto" else (16, 26, 112, 102)
    (pen.ellipse if kind == "ball" else pen.rectangle)(box, fill=colour)
    stripe = 30 * (1 + list(STYLES).index(style))
    pen.rectangle((56, 56, 72, 72), fill=(stripe, 255 - stripe, 40, 255))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a small pack in the form of the real one."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    with tarfile.open(folder / "emoji.tar", "w") as tar:

        def add(name: str, blob: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))

        for number, (label, (kind, colour)) in enumerate(SHAPES.items()):
            for style, words in STYLES.items():
                name = f"{style}/{number}.webp"
                blob = io.BytesIO()
                image(kind, colour, style).save(blob, "WEBP", lossless=True)
                add(name, blob.getvalue())
                rows.append({
                    "image": name, "id": str(number), "label": label, "style": style, "caption": f"a {label}, {words}",
                    "keywords": ["round thing", "x1"], "color": "red", "color_share": 0.9, "hue_conc": 0.9,
                    "group": "objects", "subgroup": "other",
                })  # fmt: skip
        add("captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return folder


@pytest.fixture(scope="module")
def pack(data):
    return read_pack(data / "emoji.tar")


def ids_of(pack) -> torch.Tensor:
    """Ids that say which image and which form of its prompt they belong to."""
    count, forms = len(pack.rows), len(pairs.FORMS)
    numbers = torch.arange(count)[:, None, None] * forms + torch.arange(forms)[None, :, None]
    return numbers.expand(-1, -1, edit_model.TOKENS).to(torch.int16)


def layer(colour=(0.9, 0.2, 0.1)) -> torch.Tensor:
    """One opaque ball, [1, 4, 128, 128]."""
    at = torch.arange(SIZE) - 63.5
    mask = (at[:, None] ** 2 + at**2 < 40**2).float()
    return torch.cat([torch.tensor(colour)[:, None, None] * mask, mask[None]])[None]


# -- doodles ---------------------------------------------------------------------------------------------------------------


def test_a_doodle_follows_the_outline_on_its_paper():
    torch.manual_seed(0)
    found = doodle(layer().repeat(8, 1, 1, 1), torch.ones(8, 3))
    assert found.shape == (8, 3, SIZE, SIZE) and found.min() >= 0 and found.max() <= 1
    assert torch.equal(found[..., :6, :], torch.ones_like(found[..., :6, :])), "the paper is white"
    assert (found[0] - found[1]).abs().mean() > 0.01, "no two are alike"
    agreement = scores.outline_agreement(found, layer()[:, :3] + 1 - layer()[:, 3:])
    assert agreement.median() > 0.85
    blue = doodle(layer(), torch.tensor([[0.2, 0.4, 0.8]]))
    assert torch.allclose(blue[0, :, 0, 0], torch.tensor([0.2, 0.4, 0.8]), atol=1e-4)


def test_a_palette_has_the_colours_of_the_image():
    torch.manual_seed(0)
    two = layer()
    two[:, :3, :64] = torch.tensor([0.1, 0.2, 0.9])[:, None, None] * two[:, 3:, :64]
    centres = palette(two, torch.tensor([2]))
    assert (centres[0, 2:] == 1e3).all(), "those beyond the number that is used"
    wanted = torch.tensor([[0.1, 0.2, 0.9], [0.9, 0.2, 0.1]])
    assert torch.cdist(wanted, centres[0, :2]).min(1).values.max() < 0.15
    label = regions(two, centres, torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    assert label[0, 0, 0, 0] == COLOURS and label[0, 0, 40, 64] != label[0, 0, 90, 64]


def test_a_pen_is_round_and_as_thick_as_it_should_be():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    lines = borders(mask)
    assert lines.sum() == 32 and lines[..., 15].all()
    assert thick(lines, 3)[0, 0, 16].sum() == 7
    dot = torch.zeros(1, 1, 32, 32)
    dot[..., 16, 16] = 1
    assert abs(thick(dot, 5).sum() - np.pi * 5**2) < 20


# -- pairs -----------------------------------------------------------------------------------------------------------------


def test_held_out_concepts_are_in_no_style_of_the_training(pack):
    train, held = pairs.split(pack, HOLDOUT)
    assert {row["label"] for row in held.rows} == {HELD_OUT} and len(held.rows) == len(STYLES)
    assert HELD_OUT not in {row["label"] for row in train.rows} and len(train.rows) == 2 * len(STYLES)
    assert len(pairs.held_out_labels(HOLDOUT)) == 90


def test_partners_have_the_outline_and_are_moved_onto_it(pack):
    found = pairs.find_partners(pack)
    for row, member in enumerate(pack.rows):
        partners = found.index[row, : int(found.count[row])].tolist()
        styles = {pack.rows[other]["style"] for other in partners}
        assert styles == (set() if member["style"] == "blob" else set(STYLES) - {"blob", member["style"]})
        assert {pack.rows[other]["id"] for other in partners} <= {member["id"]}
    flat = next(i for i, row in enumerate(pack.rows) if row["style"] == "flat")
    still = torch.eye(2, 3)[None]
    mask = pairs.placed(pack.rgba[flat][None], still)[:, 3:] > 0.5
    for k in range(int(found.count[flat])):
        other = int(found.index[flat, k])
        moved = pairs.placed(pack.rgba[other][None], pairs.onto(found.align[flat, k][None], still))[:, 3:] > 0.5
        assert pairs.overlap(moved, mask) > 0.93, pack.rows[other]["style"]


def test_reference_and_target_are_drawn_alike(pack):
    torch.manual_seed(0)
    only = pairs.Shares(style=0.0, of_other=0.0, same=1.0, soft=0.0)
    batch = pairs.Pairs(pack, ids_of(pack), torch.device("cpu"), only).draw(8)
    assert torch.equal(batch.reference, batch.target), "the same place, hue, background and second object"
    assert batch.target.shape == (8, 3, SIZE, SIZE) and batch.target.min() >= -1.001 and batch.target.max() <= 1.001
    corners = batch.target[:, :, 0, 0]
    assert 0 < (corners == 1).all(1).float().mean() < 1, "some backgrounds are white"


def test_another_style_has_the_targets_outline(pack):
    torch.manual_seed(0)
    train = pack.select(lambda row: row["style"] != "blob")
    only = pairs.Shares(style=1.0, of_other=0.0, same=0.0, two=0.0, white=1.0, soft=0.0)
    batch = pairs.Pairs(train, ids_of(train), torch.device("cpu"), only).draw(8)
    assert not torch.equal(batch.reference, batch.target)
    assert scores.outline_agreement(batch.reference / 2 + 0.5, batch.target / 2 + 0.5).min() > 0.85


def test_prompts_say_what_is_drawn(pack):
    torch.manual_seed(0)
    source = pairs.Pairs(pack, ids_of(pack), torch.device("cpu"))
    index, yes = torch.arange(len(pack.rows)).repeat(100), torch.ones(100 * len(pack.rows), dtype=torch.bool)
    forms = {}
    for name, turned, two in (("one", ~yes, ~yes), ("hue", yes, ~yes), ("two", ~yes, yes)):
        found = source.prompts(index, turned, two)[:, 0]
        assert torch.equal(found // len(pairs.FORMS), index.to(found.dtype)), "a prompt of that image"
        forms[name] = {pairs.FORMS[i] for i in (found % len(pairs.FORMS)).tolist()}
    assert forms["one"] == set(pairs.FORMS) and forms["two"] == {"style", "empty"}
    assert forms["hue"] == {"without colour", "style", "empty"}, "no prompt names a colour that was changed"
    texts = pairs.captions_of(pack.rows[0], random.Random(0))
    assert texts == ["a red ball, 3d render", "a ball, 3d render", "a round thing, 3d render", "3d render", ""]


def test_a_step_draws_without_the_host(pack):
    """On the meta device every question to the device raises, and `Uploads` raises at every copy to it."""
    device = torch.device("meta")
    source = pairs.Pairs(pack, ids_of(pack), device)
    doodle(torch.zeros(1, 4, 8, 8, device=device), torch.ones(1, 3, device=device))  # the paint's colours are copied once
    flow = edit_model.EditFlow(edit_model.TINY, 512).to(device)
    encode = edit_model.Encoder.of(edit_model.build_vae().to(device), torch.bfloat16)
    store = Store(source, encode, 16, torch.zeros(1, edit_model.TOKENS, dtype=torch.long, device=device))
    with Uploads():
        store.refresh(2)
        x0, reference, ids = store.draw(4)
        loss = (flow(x0, some_sigma(4, Recipe(), device), reference, ids) - x0).square().mean()
        gradients = torch.autograd.grad(loss, list(flow.parameters()))
    assert all(one.is_meta for one in gradients) and ids.shape == (4, edit_model.TOKENS)
    with pytest.raises(AssertionError, match="copies from the host"), Uploads():
        torch.ones(2).to(device)


# -- measures --------------------------------------------------------------------------------------------------------------


def test_the_foreground_is_what_the_background_does_not_reach():
    ball = layer()[:, :3] + 1 - layer()[:, 3:]
    ball[..., 60:68, 60:68] = 1  # a white hole
    mask = scores.foreground(ball)
    assert torch.equal(mask, layer()[:, 3:] > 0.5)
    assert scores.outline_agreement(ball, ball) == 1
    moved = ball.roll(20, -1)
    expected = (mask & mask.roll(20, -1)).sum() / (mask | mask.roll(20, -1)).sum()
    assert scores.outline_agreement(ball, moved) == expected


def test_the_nearest_style_is_the_right_one_and_a_missing_one_never(pack):
    judge = Judge(pack)
    cases = judge.style_cases()
    assert len(cases) == len(SHAPES) * 12, "four styles share an outline"
    targets, references = torch.stack([one.target for one in cases]), torch.stack([one.reference for one in cases])
    assert judge.right_style(targets, cases).all() and not judge.right_style(references, cases).any()
    blobs = [case for case in judge.doodle_cases() if pack.rows[case.row]["style"] == "blob"]
    assert judge.candidates(blobs[0].row).isnan().all((1, 2, 3)).tolist() == [True, True, True, True, False]
    assert judge.right_style(torch.stack([one.reference for one in blobs]), blobs).all(), "there is no other"


def test_ten_doodles_are_drawn():
    drawn = [hand_drawn.draw(name) for name in hand_drawn.DOODLES]
    assert len(drawn) == 10 and all(one.size == (SIZE, SIZE) for one in drawn)
    covered = [
        float(scores.foreground(torch.from_numpy(np.array(one)).permute(2, 0, 1)[None] / 255).float().mean())
        for one in drawn
    ]
    assert 0.1 < min(covered) and max(covered) < 0.7
    whole = sheet([drawn, drawn], ["doodle", "again"], list(hand_drawn.DOODLES))
    assert whole.size == (2 * 132, 16 + 10 * 144)


# -- the model -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, pack):
    """A network with random weights, its tokenizer, and the folder that it is written to."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = edit_model.train_tokenizer([row["caption"] for row in pack.rows], edit_model.TINY.words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = edit_model.EditFlow(edit_model.TINY, len(tokenizer))
        for parameter in flow.transformer.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.05)
        vae = edit_model.build_vae()
        edit_model.measure(vae, [torch.rand(2, 3, SIZE, SIZE) * 2 - 1 for _ in range(2)])
        edit_model.write(edit_model.pipeline(flow, tokenizer, vae), folder)
    return flow.float().eval(), tokenizer, folder


@pytest.fixture(scope="module")
def loaded(made):
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(made[2])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_plain_diffusers_loads_the_folder_in_float32(made, loaded):
    for name in ("transformer", "vae", "text_encoder"):
        assert {p.dtype for p in getattr(loaded, name).parameters()} == {torch.float32}, name
    assert loaded.config.is_distilled and loaded.vae_scale_factor == 8
    assert "Microsoft" in (made[2] / "NOTICE").read_text() and "max_sequence_length" in (made[2] / "README.md").read_text()


def test_the_text_encoder_gives_the_embeddings_that_were_trained(made, loaded):
    flow, tokenizer, _ = made
    prompts = ["a red ball, 3d render", ""]
    embeds, _ = loaded.encode_prompt(prompts, max_sequence_length=edit_model.TOKENS)
    ids = edit_model.token_ids(tokenizer, prompts)
    assert torch.equal(embeds, flow.words.weight.half().float()[ids].repeat(1, 1, 3))
    assert (ids[1, 1:] == 0).all() and not embeds[1, 1:].any(), "padding is zero"


def test_the_network_that_is_trained_is_the_pipelines(made, loaded):
    flow, tokenizer, _ = made
    flow.load_state_dict({name: value.half().float() for name, value in flow.state_dict().items()})
    reference = hand_drawn.draw("a house")
    noise = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = loaded(
        reference, "a house, 3d render", num_inference_steps=4, guidance_scale=1.0, max_sequence_length=edit_model.TOKENS,
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    encode = edit_model.Encoder.of(loaded.vae, torch.float32)
    pixels = torch.from_numpy(np.array(reference)).permute(2, 0, 1)[None] / 127.5 - 1
    latent, x = encode(pixels), noise
    ids = edit_model.token_ids(tokenizer, ["a house, 3d render"])
    with torch.no_grad():
        for step in range(4):
            x = x - flow(x, torch.full((1,), 1 - step / 4), latent, ids) / 4
    own = loaded._unpatchify_latents(x * encode.std + encode.mean)
    assert relative_error(own, drawn) <= 1e-5


def test_streamed_it_is_the_pipelines(loaded):
    from streamflow import StreamFlow

    stream = StreamFlow(loaded, width=SIZE, height=SIZE, cfg_type="none")
    stream.prepare("a tree, flat vector", num_inference_steps=4, max_sequence_length=edit_model.TOKENS)
    doodles = [hand_drawn.draw(name) for name in list(hand_drawn.DOODLES)[:5]]
    streamed = torch.stack([frame.image for frame in stream.frames(doodles)])
    own = torch.cat([
        loaded(
            one, "a tree, flat vector", num_inference_steps=4, guidance_scale=1.0, max_sequence_length=edit_model.TOKENS,
            latents=stream.frame_noise(k), output_type="pt",
        ).images
        for k, one in enumerate(doodles)
    ])  # fmt: skip
    assert relative_error(streamed / 2 + 0.5, own) <= 1e-5


def test_the_shipped_shape_fits(tmp_path):
    flow = edit_model.EditFlow(edit_model.SHIPPED, edit_model.SHIPPED.words)
    vae = edit_model.build_vae()
    parameters = [*flow.parameters(), *vae.parameters(), *edit_model.text_encoder(flow.words).parameters()]
    assert 2 * sum({id(p): p.numel() for p in parameters}.values()) / 2**20 < edit_model.LIMIT_MIB - 0.8


# -- the scripts -----------------------------------------------------------------------------------------------------------


def test_a_pack_without_a_style_is_refused(data, tmp_path, pack):
    from pack_data import check

    assert check(data / "emoji.tar").startswith("15 images")
    with tarfile.open(tmp_path / "less.tar", "w") as less, tarfile.open(data / "emoji.tar") as whole:
        rows = [row for row in pack.rows if row["style"] != "noto"]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        for member in whole:
            if member.name == "captions.jsonl":
                member.size = len(lines)
                less.addfile(member, io.BytesIO(lines))
            else:
                less.addfile(member, whole.extractfile(member))
    with pytest.raises(ValueError, match="no image in noto"):
        check(tmp_path / "less.tar")


@pytest.mark.slow
def test_it_trains_goes_on_and_is_evaluated(data, tmp_path):
    def python(script: str, *options: str) -> str:
        command = [sys.executable, str(SCRIPTS / script), "--data", str(data), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        return done.stdout if done.returncode == 0 else done.stderr

    sizes = ["--batch", "4", "--fresh", "1", "--stored", "16", "--drawn", "4", "--tiny", "--no-compile"]
    where = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "model")]
    assert "nothing was trained" in python("train.py", *sizes, *where, "--stop-after", "0")
    first = python("train.py", *sizes, *where, "--minutes", "0.2")
    assert "flow: step" in first and "pairs: 4 drawn" in first and "weights of reflow" in first
    (tmp_path / "work" / "reflow.pt").unlink()
    second = python("train.py", *sizes, *where, "--minutes", "0.2")
    assert "reflow: step" in second and "pairs:" not in second and "] flow: step" not in second
    sheets = tmp_path / "sheets"
    few = ["--device", "cpu", "--most", "3", "--rounds", "2"]
    python("evaluate.py", *few, "--model", str(tmp_path / "model"), "--sheets", str(sheets),
           "--json", str(tmp_path / "report.json"))  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"styles, style alone", "styles, named", "doodles, style alone", "doodles, named", "seconds"} <= set(report)
    assert 0 <= report["doodles, named"]["outline"] <= 1 and report["styles, named"]["vae_style"] == 1
    assert {path.name for path in sheets.iterdir()} == {
        "drawn.png", "styles_style.png", "styles_named.png", "doodles_style.png", "doodles_named.png",
    }  # fmt: skip
