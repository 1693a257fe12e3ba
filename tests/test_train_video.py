"""The scripts that train the video model: motions, prompts, the VAE's convolutions, and the folder that they write."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from PIL import Image, ImageDraw
from uploads import Uploads

pytest.importorskip("diffusers", minversion="0.42", reason="the folder is of a class of diffusers 0.42")

from diffusers import HeliosPipeline  # noqa: E402

from streamflow import VideoStream  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "examples" / "train_video"
sys.path.insert(0, str(SCRIPTS))

import clips  # noqa: E402
import video_flow  # noqa: E402
import video_model  # noqa: E402
from captions import BACKGROUNDS, STYLES  # noqa: E402
from pack import read_pack  # noqa: E402
from training import Muon, Optimizers, Worker  # noqa: E402
from video_model import CALL, TINY, TOKENS  # noqa: E402

SIZE = 128
NAMED, OTHER, HELD_OUT = clips.CONCEPTS[:2], "box", "zebra"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small pack in the form of the real one."""
    path = tmp_path_factory.mktemp("data") / "pack.tar"
    rows = []
    with tarfile.open(path, "w") as tar:

        def add(name: str, blob: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))

        for number, label in enumerate((*NAMED, OTHER, HELD_OUT)):
            for style, words in STYLES.items():
                drawn, name = Image.new("RGBA", (SIZE, SIZE)), f"{style}/{number}.webp"
                colour = (60 * number, 40 * list(STYLES).index(style), 200, 255)
                ImageDraw.Draw(drawn).rectangle((16, 40, 112 - 20 * number, 88), fill=colour)
                blob = io.BytesIO()
                drawn.save(blob, "WEBP", lossless=True)
                add(name, blob.getvalue())
                rows.append({
                    "image": name, "id": str(number), "label": label, "style": style, "caption": f"a {label}, {words}",
                    "keywords": [], "color": "blue", "color_share": 0.9, "hue_conc": 0.9, "group": "objects",
                    "subgroup": "other",
                })  # fmt: skip
        add("captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


@pytest.fixture(scope="module")
def images(data):
    """The images that are trained, and how many have names."""
    return clips.training_images(read_pack(data), len(NAMED))


@pytest.fixture(scope="module")
def tokenizer(images):
    pack, named = images
    return video_model.train_tokenizer(clips.all_words(pack.rows[:named]), TINY.words)


def source_of(images, tokenizer, device="cpu") -> clips.Clips:
    pack, named = images

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    prompts = clips.Prompts(pack.rows, named, encode, TOKENS, tokenizer.eos_token_id, torch.device(device))
    return clips.Clips(pack, named, prompts)


# -- clips -----------------------------------------------------------------------------------------------------------------


def test_named_images_come_first_and_held_out_ones_not_at_all(data, images):
    pack, named = images
    assert {row["label"] for row in pack.rows[:named]} == set(NAMED) and named == 2 * len(NAMED)
    assert {row["label"] for row in pack.rows[named:]} == {OTHER}
    assert {row["label"] for row in clips.held_out(read_pack(data)).rows} == {HELD_OUT}
    with pytest.raises(ValueError, match="4 of the images of 64 concepts"):
        clips.training_images(read_pack(data))


def test_motions_begin_at_rest_return_and_never_jump(images, tokenizer):
    angle = torch.linspace(0, 8 * math.pi, 400)
    for motion in range(len(clips.MOTIONS)):
        kind = torch.full_like(angle, motion, dtype=torch.long)
        found = clips.poses(kind, angle, torch.ones_like(angle))
        assert torch.allclose(found[0], torch.tensor([0, 0, 0, clips.REST])), clips.MOTIONS[motion]
        again = clips.poses(kind, angle + 4 * math.pi, torch.ones_like(angle))
        turns = (found[:, 2] - again[:, 2]) / (2 * math.pi)
        assert torch.allclose(turns, turns.round(), atol=1e-4), clips.MOTIONS[motion]
        assert torch.allclose(found[:, [0, 1, 3]], again[:, [0, 1, 3]], atol=1e-3), clips.MOTIONS[motion]
    torch.manual_seed(0)
    source = source_of(images, tokenizer)
    scenes, begins = source.scenes(200, switched=1.0)
    time = clips.frames_of(clips.CHUNKS * clips.IMAGES, "cpu").expand(200, -1)
    steps = scenes.poses(time).diff(dim=1)
    turn = (steps[..., 2] + math.pi) % (2 * math.pi) - math.pi  # a whole turn is no turn
    assert steps[..., :2].abs().max() < 12 and turn.abs().max() < 1.1 and steps[..., 3].abs().max() < 0.1
    still = steps.abs().amax((1, 2)) == 0
    assert 0 < still.float().mean() < 0.2 and 0.4 < begins.float().mean() < 0.9
    images_at = source.render(clips.Scenes(**{k: v[:4] for k, v in vars(scenes).items()}), time[:4, :2])
    assert images_at.shape == (4, 3, 2, SIZE, SIZE) and -1.001 < images_at.min() and images_at.max() < 1.001


def test_prompts_put_together_on_the_device_are_those_of_their_texts(images, tokenizer):
    torch.manual_seed(0)
    source, (pack, named) = source_of(images, tokenizer), images
    scenes, _ = source.scenes(40)
    ids, expected = source.prompt_ids(scenes), []
    for k in range(40):
        row, motion, speed = int(scenes.image[k, 0]), int(scenes.motion[k, 0]), list(clips.SPEEDS)[scenes.speed[k, 0]]
        ground = list(BACKGROUNDS)[scenes.ground[k, 0]]
        expected.append(clips.prompt_of(pack.rows[row], clips.MOTIONS[motion], speed, ground, row < named))
    same = (ids[:, 0] == video_model.token_ids(tokenizer, expected)).all(1)
    assert same[scenes.image[:, 0] >= named].all(), "any emoji has one name"
    assert 0.6 < same[scenes.image[:, 0] < named].float().mean() < 1, "one that is named has some"
    assert clips.prompt_of(pack.rows[0], "spinning", "quickly", "pink") == (
        f"a {NAMED[0]}, 3d render, on a pink background, spinning quickly"
    )
    with pytest.raises(ValueError, match=r"up to \d+ \+ \d+ \+ \d+ tokens, and 5 are used"):
        clips.Prompts(pack.rows, named, lambda text: tokenizer(text).input_ids, 5, 1, torch.device("cpu"))


# -- the model -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_vae_that_is_trained_is_diffusers_own():
    torch.manual_seed(0)
    vae, chunks = video_model.build_vae(TINY).eval(), torch.rand(2, 3, 9, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(chunks).latent_dist.mean
        images = vae.decode(latents).sample
        assert latents.shape == (2, TINY.latent, 3, 16, 16)
        assert torch.equal(video_model.encoded(vae, chunks)[0], latents)
        assert torch.equal(video_model.decoded(vae, latents).clamp(-1, 1), images)
        video_model.flat_convolutions(vae)
        assert relative_error(video_model.encoded(vae, chunks)[0], latents) < 1e-5
        assert relative_error(video_model.decoded(vae, latents).clamp(-1, 1), images) < 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A network with random weights, and the folder that it is written to."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = video_model.VideoFlow(TINY, len(tokenizer))
        for parameter in flow.transformer.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.05)
        vae = video_model.build_vae(TINY)
        video_model.measure_latents(vae, [torch.rand(1, 3, 9, SIZE, SIZE) * 2 - 1])
        video_model.write(video_model.pipeline(flow, tokenizer, vae), folder)
    return flow.float().eval(), folder


@pytest.fixture(scope="module")
def loaded(made):
    pipe = HeliosPipeline.from_pretrained(made[1])
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPT = f"a {NAMED[0]}, 3d render, spinning"


def test_plain_diffusers_loads_the_folder_in_float32(made, loaded):
    for name in ("transformer", "vae", "text_encoder"):
        assert {p.dtype for p in getattr(loaded, name).parameters()} == {torch.float32}, name
    flow, folder = made
    assert (
        "Microsoft" in (folder / "NOTICE").read_text()
        and "num_latent_frames_per_chunk" in (folder / "README.md").read_text()
    )
    flow.load(loaded)
    ids = video_model.token_ids(loaded.tokenizer, [PROMPT, ""])
    assert torch.equal(flow.words(ids), video_model.embeddings(loaded, [PROMPT, ""]))


def test_the_text_encoder_gives_the_embeddings_that_were_trained(loaded, monkeypatch):
    from types import SimpleNamespace

    from diffusers.pipelines.helios import pipeline_helios

    monkeypatch.setattr(pipeline_helios, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    texts = [PROMPT, ""]
    own, _ = loaded.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    assert torch.equal(own, video_model.embeddings(loaded, texts)) and not own[1, 1:].any(), "padding is zero"


def test_the_network_that_is_trained_is_the_pipelines(made, loaded):
    flow, _ = made
    flow.load(loaded)
    shape = (1, TINY.latent, 3, 16, 16)
    embeds = video_model.embeddings(loaded, [PROMPT])
    drawn = loaded(
        prompt_embeds=embeds, generator=torch.Generator().manual_seed(1), num_frames=18, output_type="latent", **CALL
    ).frames  # fmt: skip
    losses = video_flow.Losses(Worker(0, 1, torch.device("cpu")), flow, None, video_flow.Recipe())
    generator, ids = torch.Generator().manual_seed(1), video_model.token_ids(loaded.tokenizer, [PROMPT])
    history = torch.zeros(1, TINY.latent, 20, 16, 16)
    for chunk in range(2):
        x = losses.drawn(torch.randn(shape, generator=generator), history, ids, torch.tensor([4]))
        assert relative_error(x, drawn[:, :, 3 * chunk : 3 * chunk + 3]) < 1e-5
        history = torch.cat([x[:, :, :1] if chunk == 0 else history[:, :, :1], history[:, :, 4:], x], 2)


def test_streamed_it_is_the_pipelines(loaded):
    embeds = video_model.embeddings(loaded, [PROMPT])
    own = loaded(
        prompt_embeds=embeds, generator=torch.Generator().manual_seed(1), num_frames=18, output_type="pt", **CALL
    ).frames[0]  # fmt: skip
    stream = VideoStream(loaded, output_type="pt")
    stream.prepare(prompt_embeds=embeds, seed=1)  # the folder has CALL
    streamed = torch.cat([chunk.images for chunk in stream.chunks(2)])
    assert streamed.shape == (18, 3, SIZE, SIZE)
    assert torch.equal(streamed[: len(own)], own)  # the pipeline leaves out what is no multiple of four


def test_the_shipped_shape_fits():
    flow = video_model.VideoFlow(video_model.SHIPPED, video_model.SHIPPED.words)
    parameters = [*flow.parameters(), *video_model.build_vae(video_model.SHIPPED).parameters()]
    assert 2 * sum(p.numel() for p in parameters) / 2**20 < video_model.LIMIT_MIB - 0.5


def test_the_error_of_a_colour_is_larger_than_that_of_stripes():
    offset = torch.full((1, 3, 2, 32, 32), 0.1)
    assert video_flow.image_error(offset).item() == pytest.approx(0.4), "of the pixels, and of three sizes of blocks"
    stripes = offset * (torch.arange(32) % 2 * 2 - 1)
    assert video_flow.image_error(stripes).item() == pytest.approx(0.3), "of the pixels, and of their differences"


def test_muon_takes_a_convolution_as_a_matrix():
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv3d(5, 4, 3), torch.nn.Linear(135, 4)
    before = conv.weight.detach().flatten(1).clone()
    linear.weight.data.copy_(before)
    direction = torch.randn(4, 135)
    for module in (conv, linear):
        optimizers = Optimizers(module, lambda name: name == "weight")
        assert isinstance(optimizers.members[1], Muon)
        optimizers.rate.fill_(0.1)
        optimizers.differentiate((module.weight.flatten(1) * direction).sum())
        optimizers.step()
    assert torch.equal(conv.weight.flatten(1), linear.weight)
    singular = torch.linalg.svdvals(before - linear.weight)
    assert singular.min() > 0.5 * singular.max(), "all directions move about as far"


# -- a training step -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_draws_without_the_host(images, tokenizer, monkeypatch):
    """On the meta device every question to the device raises, and `Uploads` raises at every copy to it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on this device
    device = torch.device("meta")
    source = source_of(images, tokenizer, "meta")
    recipe = video_flow.Recipe(batch=4, fresh=1, clips=1)
    vae = video_model.flat_convolutions(video_model.build_vae(TINY)).to(device)
    store = video_flow.Store(source, video_model.Codec.of(vae), 4)
    flow = video_model.VideoFlow(TINY, 512).to(device)
    losses = video_flow.Losses(Worker(0, 1, device), flow, store, recipe)
    with Uploads():
        for module, loss_of in (
            (vae, lambda: video_flow.VaeLoss(vae, recipe)(source.some_chunks(1))),
            (flow, losses.flow),
            (flow, losses.own),
        ):
            found = torch.autograd.grad(loss_of()[0], list(module.parameters()), allow_unused=True)
            assert any(one is not None for one in found) and all(one is None or one.is_meta for one in found)


@pytest.mark.slow
def test_rows_of_the_store_are_the_pipelines_history(images, tokenizer):
    torch.manual_seed(0)
    source = source_of(images, tokenizer)
    vae = video_model.build_vae(TINY).eval().requires_grad_(False)
    store = video_flow.Store(source, video_model.Codec.of(vae), 2)
    store.fill(1)
    everything = store.latents.float().transpose(1, 2)
    rows = store._rows(torch.tensor([0, 1, 0]), torch.tensor([0, 2, 0]), torch.tensor([False, False, True]))
    assert torch.equal(rows.x0[1], everything[1, :, 7:10]) and torch.equal(rows.past[1, :, -6:], everything[1, :, 1:7])
    assert not rows.past[1, :, :-6].any() and torch.equal(rows.first[1], everything[1, :, 1:2])
    assert not rows.past[0].any() and not rows.first[0].any() and not rows.after[0], "the first chunk has no history"
    assert torch.equal(rows.past[2, :, -1], everything[0, :, 0]) and torch.equal(rows.first[2], everything[0, :, 1:2])
    dirty = video_flow.disturbed(rows, video_flow.Recipe(clean=0.0))
    assert not dirty[0].any() and not dirty[1, :, 1:14].any(), "what is not there stays 0"
    assert not torch.equal(dirty[1, :, 14:], rows.past[1, :, -6:])
    clean = video_flow.disturbed(rows, video_flow.Recipe(clean=1.0, noise_first=0.0))
    assert torch.equal(clean, torch.cat([rows.first, rows.past], 2))


# -- the scripts -----------------------------------------------------------------------------------------------------------


def script(name: str):
    """A script as a module; examples/train_edit has scripts of the same names."""
    spec = importlib.util.spec_from_file_location(f"train_video_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_trains_goes_on_and_is_evaluated(data, tmp_path, capsys):
    sizes = ["--clips", "1", "--batch", "4", "--fresh", "1", "--stored", "2", "--tiny", "--no-compile"]
    sizes += ["--data", str(data), "--concepts", "2"]
    first, second = tmp_path / "first", tmp_path / "second"

    def trained(*options: object) -> str:
        with torch.random.fork_rng(devices=[]):
            script("train").main([*sizes, *map(str, options)])
        return capsys.readouterr().out

    where = "--work", tmp_path / "work", "--output", first
    said = trained(*where, "--vae", 1, "--flow", 1, "--own", 1)
    assert all(text in said for text in ("vae: step", "flow: step", "own: step", "weights of own")), said
    (tmp_path / "work" / "own.pt").unlink()
    said = trained(*where, "--vae", 1, "--flow", 1, "--own", 0)
    assert "flow: step" not in said and "weights of flow" in said, said
    where = "--work", tmp_path / "another", "--output", second, "--begin", first
    said = trained(*where, "--vae", 0, "--flow", 0, "--own", 1)
    assert "vae: step" not in said and "own: step" in said, said
    vaes = [(folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() for folder in (first, second)]
    assert vaes[0] == vaes[1], "with --vae 0 it stays"
    few = ["--device", "cpu", "--most", "2", "--chunks", "2", "--few", "1", "--long", "2"]
    few += ["--data", str(data), "--concepts", "2", "--model", str(second)]
    script("evaluate").main([*few, "--json", str(tmp_path / "report.json"), "--sheets", str(tmp_path / "sheets")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"vae", "next", "streams", "images", "long", "seconds"} <= set(report)
    assert all(0 <= share <= 1 for share in report["streams"]["right"]) and report["seconds"] > 0
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {
        "streams.png", "images.png", "long.png", "streams.gif",
    }  # fmt: skip
