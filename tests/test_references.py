"""Reference images in the stream: each frame is what the pipeline draws with the frame's references, prompt and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import PROMPT, drawn, edit_prompt, never_waiting, relative_error, slow

from streamflow import StreamFlow
from streamflow.stream.frames import Input

SHORT = {"max_sequence_length": 40}
OTHER = "a blue pear, a drawing"
FRAMES = 6


def scene(k: int, width: int = 64, height: int = 64) -> PIL.Image.Image:
    """An image without structure, another one for every k."""
    pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def tokens(latents: torch.Tensor, stream: StreamFlow) -> torch.Tensor:
    return latents.flatten(2).transpose(1, 2)


def unpacked(latents: torch.Tensor, stream: StreamFlow) -> torch.Tensor:
    return stream.codec.decoder.unpack(latents)


def as_is(latents: torch.Tensor, stream: StreamFlow) -> torch.Tensor:
    return latents


@dataclass(frozen=True)
class Case:
    """An edit pipeline. both: arguments of `prepare` and of the pipeline; call: only of the pipeline; latents: from the
    stream's latents to the pipeline's; several: whether it takes more than one reference; prompt: from a text to the
    pipeline's prompt."""

    family: str
    cfg_type: str = "none"
    both: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    latents: Any = as_is
    several: bool = True
    prompt: Callable[[str], str] = str

    def stream(self, pipes, steps=3, dtype=torch.float32, size=(64, 64), **options) -> StreamFlow:
        """A prepared stream of this case, whose decoder is taken out: `drawn` gives latents."""
        options = {"cfg_type": self.cfg_type, "width": size[0], "height": size[1], **options}
        stream = StreamFlow(pipes(self.family, dtype), **options)
        stream.prepare(self.prompt(PROMPT), num_inference_steps=steps, **self.both)
        return stream

    def draw(self, stream, frame_id, references, steps=3, prompt=PROMPT) -> torch.Tensor:
        """What the pipeline itself draws, from the noise of that frame."""
        size = {"width": stream.width, "height": stream.height}
        call = {**self.both, **self.call, **size, "prompt": self.prompt(prompt), "num_inference_steps": steps}
        if self.family == "flux-kontext":
            call["max_area"] = stream.width * stream.height
        if references:
            call["image"] = list(references) if self.several else references[0]
        noise = stream.frame_noise(frame_id)
        return stream.pipe(**call, latents=noise, output_type="latent").images

    def own(self, stream, drawn: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The stream's latents in the pipeline's form."""
        return [self.latents(one, stream) for one in drawn]


KONTEXT = {**SHORT, "_auto_resize": False}
BLURRY = {"negative_prompt": "blurry, much too blurry"}
TRUE = {"true_cfg_scale": 3.0, **BLURRY}
CASES = {
    "flux2": Case("flux2", both={**SHORT, "guidance_scale": 2.5}, latents=tokens),
    "klein": Case("flux2-klein", both=SHORT, call={"guidance_scale": 1.0}, latents=unpacked),
    "klein-guided": Case("flux2-klein", "full", both={**SHORT, "guidance_scale": 3.0}, latents=unpacked),
    "klein-kv": Case("flux2-klein-kv", both=SHORT, latents=unpacked),
    "kontext": Case("flux-kontext", both={**KONTEXT, "guidance_scale": 2.5}, several=False),
    "kontext-guided": Case("flux-kontext", "full", both={**KONTEXT, "guidance_scale": 2.5, **TRUE}, several=False),
    "fibo-edit": Case("bria-fibo-edit", call={"guidance_scale": 1.0}, prompt=edit_prompt),
    "fibo-edit-guided": Case("bria-fibo-edit", "full", both={**BLURRY, "guidance_scale": 3.0}, prompt=edit_prompt),
}
SEEN_BY_THE_LANGUAGE_MODEL = {
    "qwen-edit": Case("qwenimage-edit", several=False),
    "qwen-edit-guided": Case("qwenimage-edit", "full", both=TRUE, several=False),
    "qwen-edit-plus": Case("qwenimage-edit-plus"),
    "qwen-edit-plus-guided": Case("qwenimage-edit-plus", "full", both=TRUE),
}


def slow_but(names, *plain):
    """All names, of which all but these are slow."""
    return [name if name in plain else pytest.param(name, marks=pytest.mark.slow) for name in names]


KLEIN, CACHED = CASES["klein"], CASES["klein-kv"]


def references_of(case: Case, n: int) -> list[list[PIL.Image.Image]]:
    """References that change with every frame: one or two, some in another size."""
    if not case.several:
        return [[scene(k, *((64, 64), (96, 80))[k % 2])] for k in range(n)]
    return [[scene(k), scene(100 + k, 80, 96)][: 1 + k % 2] for k in range(n)]


def as_inputs(references: Sequence[Sequence[PIL.Image.Image]]) -> list[Input]:
    return [Input(one[0], reference=one[1:]) for one in references]


def check_equal(case: Case, pipes, found, dtype=torch.float32, n=FRAMES, **options) -> None:
    stream, steps = case.stream(pipes, dtype=dtype, **options), options.get("steps", 3)
    references = references_of(case, n)
    expected = [case.draw(stream, k, one, steps) for k, one in enumerate(references)]
    at_once = case.own(stream, drawn(stream, as_inputs(references)))
    if dtype == torch.float32:
        error = relative_error(torch.cat(at_once), torch.cat(expected))
        found.error(case.family, error)
        assert error <= 1e-6
    stream.reset()
    stream.velocity = stream.adapter.row_by_row(case.cfg_type == "full")
    one_by_one = case.own(stream, drawn(stream, as_inputs(references)))
    assert all(map(torch.equal, one_by_one, expected))
    found.equal(case.family, case.cfg_type, dtype)
    assert relative_error(expected[0], expected[1]) > 0.05, "frames that are alike would prove nothing"


@pytest.mark.parametrize("name", slow_but(CASES, "klein", "klein-kv", "kontext", "fibo-edit", "fibo-edit-guided"))
def test_each_frame_is_the_pipelines_with_its_own_references(name, pipes, found):
    check_equal(CASES[name], pipes, found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_in_half_precision_too(case, dtype, pipes, found):
    check_equal(case, pipes, found, dtype)


@pytest.mark.parametrize("steps,frames", [(2, 3), pytest.param(1, 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["klein", "klein-kv"])
def test_several_frames_at_once_with_any_number_of_stages(name, steps, frames, pipes, found):
    check_equal(CASES[name], pipes, found, n=7, steps=steps, frame_buffer_size=frames)


@pytest.mark.slow
@pytest.mark.parametrize("steps,frames", [(4, 1), (4, 3), (1, 1), (2, 2)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_family_with_any_number_of_stages(case, steps, frames, pipes, found):
    check_equal(case, pipes, found, n=5, steps=steps, frame_buffer_size=frames)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.slow if name == "qwen-edit-plus-guided" else pytest.mark.soak)
        for name, case in SEEN_BY_THE_LANGUAGE_MODEL.items()
    ],
)
def test_a_language_model_sees_the_references_of_every_frame(case, pipes, found):
    check_equal(case, pipes, found, n=2, steps=2)


@pytest.mark.slow
def test_a_frame_without_a_reference_is_refused_where_the_pipeline_needs_one(pipes):
    case = SEEN_BY_THE_LANGUAGE_MODEL["qwen-edit"]
    stream = case.stream(pipes, steps=2)
    with pytest.raises(ValueError, match="draws from a reference image, and a frame has none"):
        stream.txt2img()
    with pytest.raises(ValueError, match="2 references for a frame, and QwenImageEditPipeline takes 1"):
        stream(scene(0), reference=scene(1))
    first = drawn(stream, [scene(0)])
    assert relative_error(first[0], case.draw(stream, 0, [scene(0)], 2)) <= 1e-6
    encoded = []
    encode = stream.pipe.encode_prompt
    stream.pipe.encode_prompt = lambda *args, **kwargs: encoded.append(1) or encode(*args, **kwargs)
    try:
        drawn(stream, [scene(0), scene(0), scene(1)])  # the first is as the last one drawn
        assert len(encoded) == 1
    finally:
        del stream.pipe.encode_prompt


# -- what stays, what changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [KLEIN, pytest.param(CACHED, marks=pytest.mark.slow)], ids=["klein", "klein-kv"])
def test_a_reference_of_all_frames_stays_until_it_is_taken_away(case, pipes):
    stream, style, other = case.stream(pipes), scene(50), scene(51, 96, 64)
    stream.set_reference("style", style)
    frames = [scene(k) for k in range(5)]
    got = drawn(
        stream,
        [
            *frames[:2],
            lambda: stream.set_reference("style", other),
            frames[2],
            lambda: stream.set_reference("more", style),
            frames[3],
            lambda: stream.set_reference("style", None),
            frames[4],
        ],
    )
    own = [[style], [style], [other], [other, style], [style]]
    expected = [case.draw(stream, k, [frames[k], *own[k]]) for k in range(5)]
    assert relative_error(torch.cat(case.own(stream, got)), torch.cat(expected)) <= 1e-6
    assert stream.references == ("more",)
    stream.prepare(PROMPT, num_inference_steps=3, **case.both)
    assert stream.references == ("more",), "it stays through prepare"
    stream.prepare(PROMPT, num_inference_steps=3, references=None, **case.both)
    assert stream.references == ()
    (alone,) = case.own(stream, drawn(stream, frames[:1]))
    assert relative_error(alone, case.draw(stream, 0, frames[:1])) <= 1e-6


def test_a_reference_may_be_set_before_prepare(pipes):
    stream = StreamFlow(pipes("flux2-klein"), cfg_type="none", width=64, height=64)
    stream.set_reference("style", scene(5))
    stream.prepare(PROMPT, num_inference_steps=3, **SHORT)
    (got,) = KLEIN.own(stream, drawn(stream, [scene(0)]))
    assert relative_error(got, KLEIN.draw(stream, 0, [scene(0), scene(5)])) <= 1e-6


def test_update_sets_the_references_of_frames_that_enter(pipes):
    case = KLEIN
    stream = case.stream(pipes)
    styles = [scene(60), scene(61, 80, 80)]
    got = drawn(stream, [scene(0), lambda: stream.update(references=styles), scene(1), scene(2)])
    expected = [case.draw(stream, k, [scene(k), *(styles if k else ())]) for k in range(3)]
    assert relative_error(torch.cat(case.own(stream, got)), torch.cat(expected)) <= 1e-6
    assert stream.references == ("reference_0", "reference_1")
    stream.update(references={"a": styles[0]})
    assert stream.references == ("a",)
    with pytest.raises(ValueError, match="keeps its references to its end"):
        stream.update(references=styles, scope="now")


@pytest.mark.parametrize("name", slow_but(["klein", "klein-kv", "kontext"], "klein-kv"))
def test_prompts_change_for_frames_or_for_all_rows_and_references_stay(name, pipes):
    case = CASES[name]
    stream = case.stream(pipes)
    pictures = [scene(k) for k in range(4)]
    changed = lambda: stream.update_prompt(OTHER, scope="frame")  # noqa: E731
    got = case.own(stream, drawn(stream, [*pictures[:2], changed, *pictures[2:]]))
    expected = [case.draw(stream, k, [pictures[k]], prompt=OTHER if k > 1 else PROMPT) for k in range(4)]
    assert relative_error(torch.cat(got), torch.cat(expected)) <= 1e-6
    now = case.stream(pipes)
    got = case.own(now, drawn(now, [*pictures[:2], lambda: now.update_prompt(OTHER), *pictures[2:]]))
    assert relative_error(torch.cat(got[2:]), torch.cat(expected[2:])) <= 1e-6
    loop = case.stream(pipes, use_denoising_batch=False)
    loop.update_prompt(OTHER)
    again = case.own(loop, drawn(loop, pictures))
    assert relative_error(again[3], expected[3]) <= 1e-6
    assert relative_error(got[0], expected[0]) > 1e-4, "frames in flight took the new prompt"


def test_frames_with_and_without_references_share_a_stream(pipes):
    case = KLEIN
    stream = case.stream(pipes, frame_buffer_size=2)
    inputs = [scene(0), None, Input(reference=(scene(1), scene(2))), Input(reference=scene(3)), None]
    own = [[scene(0)], [], [scene(1), scene(2)], [scene(3)], []]
    got = case.own(stream, drawn(stream, inputs))
    expected = [case.draw(stream, k, one) for k, one in enumerate(own)]
    assert relative_error(torch.cat(got), torch.cat(expected)) <= 1e-6


def test_every_way_to_call_draws_the_same(pipes):
    case = KLEIN
    stream, style = case.stream(pipes), scene(9)
    expected = [frame.image for frame in stream.frames([Input(scene(k), reference=style) for k in range(3)])]
    stream.reset()
    calls = [stream(scene(k), reference=[style]) for k in (0, 1, 2, 3, 4)]
    assert torch.equal(calls[0], calls[1]) and torch.equal(calls[1], calls[2]), "copies fill the ring"
    images = [calls[2], calls[3], calls[4]]
    assert max(relative_error(one, want[None]) for one, want in zip(images, expected, strict=True)) <= 1e-5
    stream.reset()
    texts = stream.txt2img(3, reference=[[scene(k) for k in range(3)], style])
    assert max(relative_error(one[None], want[None]) for one, want in zip(texts, expected, strict=True)) <= 1e-5
    several = case.stream(pipes, frame_buffer_size=3)
    group = several([scene(k) for k in range(3)], reference=style)
    assert max(relative_error(one[None], want[None]) for one, want in zip(group, expected, strict=True)) <= 1e-5
    with pytest.raises(ValueError, match="2 images for a frame buffer of 3"):
        several([scene(0), scene(1)])


def test_an_image_is_the_start_where_that_is_wished(pipes):
    stream = KLEIN.stream(pipes, image_as="start")
    stream.prepare(PROMPT, num_inference_steps=4, strength=0.5, **SHORT)
    image = next(iter(stream.frames([scene(0)]))).image
    start = stream.encode_image(stream.preprocess(scene(0)))
    stream.reset()
    assert torch.equal(next(iter(stream.frames([scene(0)]))).image, image)
    stream.reset()
    drawn_from = torch.cat([one for one in [stream.predict_x0_batch(start), *stream.flush()] if one is not None])
    assert relative_error(stream.decode_image(drawn_from), image[None]) <= 1e-5
    stream.reset()
    other = next(iter(stream.frames([Input(scene(0), reference=scene(1))]))).image
    assert relative_error(other[None], image[None]) > 1e-3


# -- cost ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def encodes(monkeypatch):
    """Counts the images that VAEs encode."""
    from diffusers import AutoencoderKLFlux2

    counted = []
    encode = AutoencoderKLFlux2.encode

    def count(self, images, *args, **kwargs):
        counted.append(len(images))
        return encode(self, images, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKLFlux2, "encode", count)
    return counted


def test_a_reference_that_does_not_change_is_encoded_once(pipes, encodes):
    stream, pixels = KLEIN.stream(pipes), np.asarray(scene(0)).copy()
    stream.set_reference("style", scene(1))
    drawn(stream, [pixels] * 4)
    assert sum(encodes) == 2
    pixels[:8] = 255  # the caller's memory: another image
    stream.reset()
    (changed,) = KLEIN.own(stream, drawn(stream, [pixels]))
    assert sum(encodes) == 3
    expected = KLEIN.draw(stream, 0, [PIL.Image.fromarray(pixels), scene(1)])
    assert relative_error(changed, expected) <= 1e-6


def test_keys_and_values_are_computed_once_a_frame_and_rows_share_a_call(pipes, monkeypatch):
    stream = CACHED.stream(pipes, steps=4)
    network, calls = stream.pipe.transformer, []
    forward = network.forward

    def record(*args, **kwargs):
        calls.append((kwargs.get("kv_cache_mode"), len(kwargs["hidden_states"])))
        return forward(*args, **kwargs)

    monkeypatch.setattr(network, "forward", record)
    drawn(stream, [scene(k) for k in range(3)])
    assert calls.count(("extract", 1)) == 3
    assert {rows for mode, rows in calls if mode == "cached"} == {4}, "one call for all stages"


def moved(k: int, tokens: int) -> PIL.Image.Image:
    """A still image of 128x128 whose first `tokens` rows of tokens change with k."""
    pixels = np.asarray(scene(0, 128, 128)).copy()
    pixels[: 16 * tokens] = np.asarray(scene(k, 128, 128))[: 16 * tokens]
    return PIL.Image.fromarray(pixels)


def with_reuse(pipes, tolerance, images, row_by_row=False):
    stream = CACHED.stream(pipes, steps=2, size=(128, 128))
    if row_by_row:
        stream.velocity = stream.adapter.row_by_row(False)
    stream.update(reference_reuse=tolerance)
    return drawn(stream, images)


@pytest.mark.parametrize("row_by_row", [False, True])
def test_references_that_change_everywhere_are_computed_as_without_reuse(row_by_row, pipes):
    images = [scene(k, 128, 128) for k in range(4)]
    off, on = (with_reuse(pipes, tolerance, images, row_by_row) for tolerance in (None, 0.0))
    assert all(map(torch.equal, on, off))


def test_tokens_that_do_not_change_keep_their_keys_and_values(pipes, monkeypatch):
    from streamflow.models.families import flux2_kv

    computed = []
    whole, part = flux2_kv.keys_and_values, flux2_kv.with_new_tokens
    monkeypatch.setattr(flux2_kv, "keys_and_values", lambda *a: computed.append(a[1].shape[1]) or whole(*a))
    monkeypatch.setattr(flux2_kv, "with_new_tokens", lambda *a: computed.append(len(a[4])) or part(*a))
    still = [moved(0, 0)] * 3
    assert all(map(torch.equal, with_reuse(pipes, 0.0, still), with_reuse(pipes, None, still)))
    assert computed == [64, 64, 64, 64], "once with reuse, three times without"
    computed.clear()
    images = [moved(k, 2) for k in range(1, 4)]
    near, exact, other = with_reuse(pipes, 0.0, images), with_reuse(pipes, None, images), with_reuse(pipes, 2.0, images)
    assert computed[:3] == [64, 24, 24], "two rows of eight tokens, and the row beside them"
    error = relative_error(torch.cat(near), torch.cat(exact))
    assert 0 < error < 0.5 * relative_error(torch.cat(other), torch.cat(exact))
    assert torch.equal(near[0], exact[0]), "the first frame is computed whole"


@pytest.mark.slow
def test_compiled_blocks_are_not_compiled_anew_for_every_reuse(pipes):
    images = [moved(k, 2) for k in range(12)]
    plain = with_reuse(pipes, 0.0, images)
    stream = CACHED.stream(pipes, steps=2, size=(128, 128))
    stream.update(reference_reuse=0.0)
    stream.accelerate("compile", backend="eager", cuda_graph=False)
    assert relative_error(torch.cat(drawn(stream, images)), torch.cat(plain)) <= 1e-4


def test_kept_keys_are_forgotten_where_the_network_changes(pipes, monkeypatch):
    from streamflow.models.families import flux2_kv

    computed, whole = [], flux2_kv.keys_and_values
    monkeypatch.setattr(flux2_kv, "keys_and_values", lambda *a: computed.append(1) or whole(*a))
    stream = CACHED.stream(pipes, steps=1)
    stream.update(reference_reuse=0.0)
    drawn(stream, [scene(0), scene(0)])
    assert len(computed) == 1
    stream.unet = stream.unet
    stream.reset()
    drawn(stream, [scene(0)])
    assert len(computed) == 2


def test_the_similarity_filter_sees_references(pipes):
    stream = KLEIN.stream(pipes, steps=1)
    stream.enable_similar_image_filter(0.98, max_skip_frame=float("inf"))
    skipped = [frame.skipped for frame in stream.frames([scene(0), scene(0), scene(0), scene(1)])]
    assert skipped == [False, True, True, False]
    stream.reset()
    stream(scene(0))
    stream(scene(0))
    stream.set_reference("style", scene(5))
    before = stream._denoiser.next_id
    stream(scene(0))
    assert stream._denoiser.next_id == before + 1, "a new reference is drawn"


# -- with the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["klein", "klein-kv", "kontext", "fibo-edit", "fibo-edit-guided"])
def test_compiled_as_one_graph_it_draws_the_same(name, pipes):
    case = CASES[name]
    stream = case.stream(pipes)
    plain = drawn(stream, as_inputs(references_of(case, 3)))
    compiled = case.stream(pipes)
    compiled.accelerate("compile", backend="eager", regional=False)
    again = drawn(compiled, as_inputs(references_of(case, 3)))
    compiled.accelerate("none")
    assert relative_error(torch.cat(again), torch.cat(plain)) <= 1e-6


@pytest.mark.parametrize("name", ["klein", "klein-kv", slow("fibo-edit-guided")])
def test_rows_on_several_devices_draw_the_same(name, pipes):
    from streamflow.parallel import shard_denoiser

    case = CASES[name]
    references = as_inputs(references_of(case, 3))
    plain = drawn(case.stream(pipes), references)
    stream = case.stream(pipes)
    shard_denoiser(stream, ["cpu", "cpu"])
    assert relative_error(torch.cat(drawn(stream, references)), torch.cat(plain)) <= 1e-6


def test_a_lora_on_top_is_the_pipelines_own(tmp_path):
    pytest.importorskip("peft")
    from random_pipelines import random_pipeline

    pipe = random_pipeline("flux2-klein")
    case, network = KLEIN, pipe.transformer
    layer = network.single_transformer_blocks[0].attn.to_out
    generator = torch.Generator().manual_seed(3)
    name = "transformer.single_transformer_blocks.0.attn.to_out"
    weights = {
        f"{name}.lora_A.weight": torch.randn(4, layer.in_features, generator=generator) * 0.3,
        f"{name}.lora_B.weight": torch.randn(layer.out_features, 4, generator=generator) * 0.3,
    }
    stream = case.stream(lambda family, dtype: pipe)
    without = case.draw(stream, 0, [scene(0)])
    stream.load_lora(weights, adapter_name="style")
    (got,) = case.own(stream, drawn(stream, [scene(0)]))
    expected = case.draw(stream, 0, [scene(0)])
    assert relative_error(got, expected) <= 1e-6
    assert relative_error(got, without) > 1e-3


# -- what cannot be ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "call", "error", "says"),
    [
        (
            "sd3",
            lambda s: s(scene(0), reference=scene(1)),
            NotImplementedError,
            "StableDiffusion3Pipeline takes no reference",
        ),
        ("sd3", lambda s: s.set_reference("a", scene(0)), NotImplementedError, "takes no reference images"),
        ("sd3", lambda s: s.update(references=[scene(0)]), NotImplementedError, "takes no reference images"),
        ("flux2-klein", lambda s: s.update(strength=0.5), ValueError, "frames start from noise.*image_as='start'"),
        ("flux2-klein", lambda s: s.update(reference_reuse=0.1), NotImplementedError, "use Flux2KleinKVPipeline"),
        ("flux2-klein-kv", lambda s: s.update(reference_reuse=3), ValueError, "0 to 2, not 3"),
        ("flux2-klein", lambda s: s.update(feedback=0.3), ValueError, "noise='interpolated'"),
        ("flux2-klein", lambda s: s(scene(0, 32, 64)), ValueError, "32x64 pixels: Flux2KleinPipeline takes sides of 64"),
        ("flux2-klein", lambda s: s(scene(0, 1024, 64)), ValueError, "at most 8 times the shorter"),
        ("flux2-klein", lambda s: s(torch.full((3, 64, 64), torch.nan)), ValueError, "the image of frame 0 holds NaN"),
        (
            "flux2-klein",
            lambda s: s(scene(0), reference=[[scene(1), scene(2)]]),
            ValueError,
            "2 images for reference 1 of 1",
        ),
        ("flux2-klein", lambda s: s(scene(0), reference="a.png"), TypeError, "not str"),
        ("flux2-klein", lambda s: s.set_reference("", scene(0)), TypeError, "named by a text"),
        ("flux2-klein", lambda s: s.set_reference("a", None), ValueError, "no reference is named 'a'; there are none"),
        ("flux2-klein", lambda s: s.set_reference("a", [scene(0), scene(1)]), ValueError, "2 images for reference 'a'"),
        ("flux2-klein", lambda s: s.set_reference("a", torch.ones(3, 64, 64) * 3), ValueError, r"reference 'a' run from 3"),
        ("flux2-klein", lambda s: s(scene(0), mask=scene(1)), ValueError, "the image of a call is a reference here"),
        ("flux2-klein", lambda s: s.prepare("a", image=scene(0)), TypeError, "the stream sets it itself"),
        ("flux-kontext", lambda s: s(scene(0), reference=scene(1)), ValueError, "2 references for a frame.*takes 1"),
        ("flux-kontext", lambda s: s.update(max_area=64), TypeError, "the width times the height"),
        ("bria-fibo-edit", lambda s: s.update(mask=scene(1)), NotImplementedError, "mask is not supported.*paint each"),
        ("bria-fibo-edit", lambda s: s.update(do_patching=True), NotImplementedError, "no position ids of patches"),
        ("bria-fibo-edit", lambda s: s.update(prompt=OTHER), ValueError, "has to be a valid edit JSON string"),
        (
            "bria-fibo-edit",
            lambda s: s.update(joint_attention_kwargs={"scale": 0.5}),
            NotImplementedError,
            "passes 'joint_attention_kwargs' to its network",
        ),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(family, call, error, says, pipes):
    options = {"cfg_type": "none", "width": 64, "height": 64}
    stream = StreamFlow(pipes(family), **options)
    short = KONTEXT if family == "flux-kontext" else SHORT
    prompt = edit_prompt(PROMPT) if family == "bria-fibo-edit" else PROMPT
    stream.prepare(prompt, num_inference_steps=2, **short)
    with pytest.raises(error, match=says):
        call(stream)
    assert stream.references == () and stream.request.prompt == prompt
    (frame,) = stream.frames([None if family == "sd3" else scene(0)])
    fresh = StreamFlow(pipes(family), **options)
    fresh.prepare(prompt, num_inference_steps=2, **short)
    (want,) = fresh.frames([None if family == "sd3" else scene(0)])
    assert torch.equal(frame.image, want.image)


def test_an_image_cannot_be_a_reference_of_a_family_that_has_none(pipes):
    with pytest.raises(NotImplementedError, match="takes no reference images"):
        StreamFlow(pipes("sd3"), image_as="reference")
    with pytest.raises(ValueError, match="unknown image_as 'first': choose one of 'start', 'reference'"):
        StreamFlow(pipes("sd3"), image_as="first")


@pytest.mark.slow
def test_kontext_resizes_as_its_pipeline_does(pipes):
    case = Case("flux-kontext", both={**SHORT, "guidance_scale": 2.5}, several=False)
    stream = case.stream(pipes, steps=1)
    (got,) = drawn(stream, [scene(0, 90, 64)])
    assert relative_error(got, case.draw(stream, 0, [scene(0, 90, 64)], 1)) <= 1e-6
    seen = []
    forward = stream.pipe.transformer.forward
    stream.pipe.transformer.forward = lambda *a, **k: seen.append(k["hidden_states"].shape[1]) or forward(*a, **k)
    try:
        stream.reset()
        drawn(stream, [scene(0, 90, 64)])
    finally:
        del stream.pipe.transformer.forward
    assert seen[0] == 4 * 4 + 69 * 59  # 1104x944 is closest to 80x64, the whole tokens of 90x64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["klein", "fibo-edit"])
def test_large_references_are_scaled_as_in_the_pipeline(name, pipes):
    case = CASES[name]
    stream = case.stream(pipes, steps=1)
    large = scene(0, 1300, 900)
    (got,) = case.own(stream, drawn(stream, [large]))
    assert relative_error(got, case.draw(stream, 0, [large], 1)) <= 1e-6


@pytest.mark.parametrize("name", ["fibo-edit", "fibo-edit-guided"])
def test_fibo_rounds_sizes_and_decodes_as_its_pipeline_does(name, pipes):
    case = CASES[name]
    stream = case.stream(pipes, steps=2, size=(96, 64))
    references = [scene(0, 90, 71), scene(1, 5, 41), scene(2, 24, 40)]
    call = {**case.both, **case.call, "width": 96, "height": 64, "num_inference_steps": 2, "output_type": "pt"}
    prompt = case.prompt(PROMPT)
    expected = [
        stream.pipe(prompt, image=one, latents=stream.frame_noise(k), **call).images[0] for k, one in enumerate(references)
    ]
    stream.velocity = stream.adapter.row_by_row(case.cfg_type == "full")
    got = [frame.image / 2 + 0.5 for frame in stream.frames(references)]
    assert all(map(torch.equal, got, expected))


def test_the_mask_of_fibo_is_paint_on_its_reference(pipes):
    from diffusers.pipelines.bria_fibo.pipeline_bria_fibo_edit import paste_mask_on_image

    case, mask = CASES["fibo-edit"], PIL.Image.new("L", (64, 64))
    mask.paste(255, (8, 16, 40, 48))
    stream = case.stream(pipes)
    (got,) = drawn(stream, [paste_mask_on_image(mask, scene(0))])
    masked = replace(case, call={**case.call, "mask": mask})
    assert relative_error(got, masked.draw(stream, 0, [scene(0)])) <= 1e-6
    assert relative_error(got, case.draw(stream, 0, [scene(0)])) > 1e-4


@pytest.mark.parametrize("form", ["array", "uint8 tensor", "float tensor", "normalized"])
def test_every_form_of_an_image_is_the_same_reference(form, pipes):
    image = scene(0)
    stream = KLEIN.stream(pipes)
    pixels = np.asarray(image)
    given = {
        "array": pixels,
        "uint8 tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        "float tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255,
        "normalized": stream.preprocess(image),
    }[form]
    (got,) = drawn(stream, [given])
    stream.reset()
    (want,) = drawn(stream, [image])
    assert relative_error(got, want) <= 1e-5


# -- programs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny random edit pipeline, and images beside it."""
    from random_pipelines import random_pipeline

    place = tmp_path_factory.mktemp("edit")
    random_pipeline("flux2-klein", is_distilled=True).save_pretrained(place / "model")
    for k in range(3):
        scene(k).save(place / f"{k}.png")
    return place


SIZE = ("--width", "64", "--height", "64", "--steps", "2", "--cfg-type", "none")


@pytest.mark.slow
def test_the_command_line_takes_an_edit_model_and_references(folder, tmp_path, capsys):
    from streamflow.app.cli import main

    model = ("--model", str(folder / "model"), *SIZE, "--output", str(tmp_path))
    images = [str(folder / f"{k}.png") for k in range(2)]
    assert main(["img2img", *images, *model, "--reference", str(folder / "2.png")]) == 0
    written = [PIL.Image.open(tmp_path / f"{k}.png") for k in range(2)]
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    stream = StreamFlow(pipe, cfg_type="none", width=64, height=64, noise="constant")
    stream.prepare("a red apple, 3d render", num_inference_steps=2)
    noise = stream.frame_noise(0)
    for k, got in enumerate(written):
        size = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
        references = [PIL.Image.open(path) for path in (images[k], folder / "2.png")]
        (want,) = pipe(image=references, prompt="a red apple, 3d render", latents=noise, **size).images
        assert np.abs(np.asarray(got).astype(int) - np.asarray(want).astype(int)).max() <= 1
    assert main(["img2img", images[0], *model, "--strength", "0.5"]) == 2
    assert "the image of Flux2KleinPipeline is a reference" in capsys.readouterr().err


@pytest.mark.slow
def test_a_show_restyles_by_references(folder, tmp_path, capsys):
    from streamflow.app.cli import main

    source, shown = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for k in range(4):
        scene(k).save(source / f"{k}.png")
    model = ("--model", str(folder / "model"), *SIZE[:6], "--reference", str(folder / "2.png"))
    assert main(["live", "--in", f"folder:{source}", "--out", f"folder:{shown}", *model, "--json"]) == 0
    assert len(list(shown.glob("*.png"))) >= 4


def test_the_wrapper_takes_references_and_one_noise_for_all_frames(folder):
    from streamflow import StreamFlowWrapper

    given = {"width": 64, "height": 64, "cfg_type": "none", "acceleration": "none", "use_tiny_vae": False}
    prepare = {"prompt": PROMPT, "num_inference_steps": 2}
    style = {"style": str(folder / "2.png")}
    with StreamFlowWrapper(str(folder / "model"), **given, prepare=prepare, references=style, default_strength=0.5) as one:
        assert one.stream.references == ("style",)
        first, second = one(scene(0)), one(scene(0))
        assert np.array_equal(np.asarray(first), np.asarray(second))
        assert torch.equal(one.stream.frame_noise(0), one.stream.frame_noise(7))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        StreamFlowWrapper(str(folder / "model"), references=["nothing.png"])


@pytest.mark.slow
def test_the_page_draws_from_references(folder):
    from diffusers import Flux2KleinPipeline

    from streamflow.app.config import parse
    from streamflow.app.server.messages import DrawRequest
    from streamflow.app.server.slot import Slot, warm

    pipe = Flux2KleinPipeline.from_pretrained(folder / "model")
    given = {"model": str(folder / "model"), "width": 64, "height": 64, "references": [str(folder / "2.png")]}
    slot = Slot(pipe, parse(given), {})
    request = DrawRequest(mode="image", prompt=PROMPT, steps=2, motion="still", seed=3)
    warm(slot, request)

    def turns(request, count):
        slot.apply(request)
        return [slot.draw(np.asarray(scene(0))).pixels for _ in range(count)]

    first, *_, last = turns(request, 4)
    assert np.array_equal(first, last)
    size = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
    with StreamFlow(pipe, cfg_type="none", width=64, height=64, noise="constant") as stream:
        stream.prepare(PROMPT, num_inference_steps=2, seed=3)
        noise = stream.frame_noise(0)
    references = [scene(0), PIL.Image.open(folder / "2.png")]
    (want,) = pipe(image=references, prompt=PROMPT, latents=noise, **size).images
    assert np.abs(first.astype(int) - np.asarray(want).astype(int)).max() <= 1
    moving = turns(request.model_copy(update={"motion": "fresh"}), 6)
    assert not np.array_equal(moving[-1], moving[-2])
    slot.apply(request.model_copy(update={"strength": 0.3}))  # which such a model has not
    text = slot.apply(DrawRequest(mode="text", prompt=PROMPT, steps=2)) or [slot.draw() for _ in range(3)]
    assert text[-1] is not None and not np.array_equal(text[-1].pixels, last)


# -- on a GPU ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda_pipes():
    from random_pipelines import random_pipeline

    made = {}

    def get(family, dtype=torch.float32):
        if (family, dtype) not in made:
            made[family, dtype] = random_pipeline(family).to("cuda", dtype)
        return made[family, dtype]

    return get


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["flux2", "klein", "klein-kv", "kontext", "fibo-edit", "fibo-edit-guided"])
def test_on_a_gpu_each_frame_is_the_pipelines(name, dtype, cuda_pipes, full_float32):
    case = CASES[name]
    stream, references = case.stream(cuda_pipes, dtype=dtype), references_of(case, 4)
    expected = torch.cat([case.draw(stream, k, one) for k, one in enumerate(references)])
    got = torch.cat(case.own(stream, drawn(stream, as_inputs(references))))
    assert relative_error(got, expected) <= (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.parametrize("name", ["klein", "klein-kv", "kontext", "fibo-edit"])
def test_a_cuda_graph_draws_the_same_and_nothing_waits(name, cuda_pipes, full_float32):
    case = CASES[name]
    stream = case.stream(cuda_pipes)
    stream.set_reference("style", scene(9)) if case.several else None
    images = [scene(k) for k in range(5)]
    plain = [stream(one).clone() for one in images]
    stream.reset()
    stream.accelerate("cuda-graph")
    for one in images:
        stream(one)
    stream.reset()
    graphed = [stream(one).clone() for one in images]
    stream.accelerate("none")
    assert all(map(torch.equal, graphed, plain))
    on_device = [stream.preprocess(one).cuda() for one in images]
    stream.reset()
    stream(on_device[0])
    with never_waiting():
        waited = [stream(one) for one in on_device[1:]]
    assert relative_error(waited[-1], plain[-1]) <= 1e-4
