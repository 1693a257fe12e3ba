"""Image prompts in the stream: diffusers' own pipelines with the same IP-Adapters, embeddings and scales, each frame with
its own style image."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import PROMPT, drawn, never_waiting, relative_error
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from random_pipelines import random_pipeline, wake
from random_pipelines.control import random_control
from random_pipelines.image_prompts import (
    WIDTH,
    random_adapter,
    save_adapter,
    siglip_encoder,
    siglip_features,
    with_encoder,
)
from test_loras import write_lora
from test_rules import PeRFlowScheduler, with_scheduler

from streamflow import StreamFlow
from streamflow.acceleration.cuda_graph import signature
from streamflow.benchmark.full_size import SCHEDULERS
from streamflow.conditioning.image_prompt import ImageEmbeds
from streamflow.models.image_prompts import attentions
from streamflow.stream.frames import Input

STEPS = 4
SHORT = {"max_sequence_length": 40}
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "blurry, much too blurry"}
TRUE = {"true_cfg_scale": 3.0, "negative_prompt": "blurry, much too blurry"}
UNGUIDED = {"guidance_scale": 1.0}
OTHER = "a blue pear, a drawing"


def style(k: int, width: int = 56, height: int = 40) -> PIL.Image.Image:
    """An image without structure, another one for every k."""
    return PIL.Image.fromarray(np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Case:
    """A family. both: arguments of `prepare` and of the pipeline; call: of the pipeline alone; plus: adapters with a
    resampler; exact: row by row the stream's bits are the pipeline's."""

    family: str
    cfg_type: str = "none"
    both: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    plus: bool = False
    exact: bool = True

    def pipe(self, dtype: torch.dtype = torch.float32) -> Any:
        """A pipeline with an image encoder, equal to every other one of this case."""
        pipe = with_encoder(random_pipeline(self.family).to(dtype=dtype))
        if self.family == "perflow":
            return with_scheduler(pipe, PeRFlowScheduler("diff_eps"))
        return pipe

    def stream(self, pipe: Any, steps: int = STEPS, **options: Any) -> StreamFlow:
        family = {"family": self.family} if hasattr(pipe, "unet") else {}
        stream = StreamFlow(pipe, **{"cfg_type": self.cfg_type, "width": 64, "height": 64, **family, **options})
        stream.prepare(PROMPT, num_inference_steps=steps, **self.both)
        return stream

    def weights(self, pipe: Any, seed: int = 0) -> Any:
        return random_adapter(pipe, seed, self.plus)


DEV = {**SHORT, "guidance_scale": 2.5}
CASES = {
    "flux": Case("flux", both=DEV),
    "flux-guided": Case("flux", "full", {**DEV, **TRUE}),
    "chroma": Case("chroma", both=SHORT, call=UNGUIDED),
    "chroma-guided": Case("chroma", "full", {**SHORT, **GUIDED}),
    "sd3": Case("sd3", both=SHORT, call=UNGUIDED),
    "sd3-guided": Case("sd3", "full", {**SHORT, **GUIDED}),
    "instaflow": Case("instaflow", call=UNGUIDED),
    "instaflow-guided": Case("instaflow", "full", GUIDED),
    "instaflow-plus": Case("instaflow", "full", GUIDED, plus=True),
    "sdxl": Case("sdxl", call=UNGUIDED),
    "sdxl-guided": Case("sdxl", "full", GUIDED),
    "perflow": Case("perflow", call=UNGUIDED, exact=False),
}
FLUX, SD3, UNET = CASES["flux"], CASES["sd3"], CASES["instaflow"]
PLAIN = ("flux", "sd3", "instaflow-guided")  # of the plain tier


def some(names: Sequence[str] = PLAIN) -> Any:
    """The cases, those that are not named in the slow tier."""
    marked = [pytest.param(one, id=name, marks=[] if name in names else pytest.mark.slow) for name, one in CASES.items()]
    return pytest.mark.parametrize("case", marked)


class Own:
    """diffusers' own pipeline of a case, with adapters that its own method has loaded: the reference."""

    def __init__(self, case: Case, adapters: Sequence[Any] = (), dtype: torch.dtype = torch.float32) -> None:
        self.case, self.pipe = case, case.pipe(dtype)
        if case.family in SCHEDULERS:
            self.pipe.scheduler = SCHEDULERS[case.family]()
        if adapters:
            load_by_diffusers(self.pipe, adapters)

    def embeds(self, images: Sequence[Any]) -> Any:
        """`ip_adapter_image_embeds` of one image for each adapter, by the pipeline's own method."""
        guided = self.case.cfg_type == "full"
        if hasattr(self.pipe, "tokenizer_3"):
            return self.pipe.prepare_ip_adapter_image_embeds(images[0], None, "cpu", 1, guided)
        given = (list(images), None, "cpu", 1)
        return self.pipe.prepare_ip_adapter_image_embeds(*given, *((guided,) if hasattr(self.pipe, "unet") else ()))

    def draw(
        self, stream: StreamFlow, frame_id: int, images: Sequence[Any], scale: Any, prompt: str = PROMPT, steps: int = STEPS
    ) -> torch.Tensor:
        """Latents of a frame from the stream's noise, with one image for each adapter."""
        call = {**self.case.both, **self.case.call, "num_inference_steps": steps, "height": 64, "width": 64}
        if images:
            self.pipe.set_ip_adapter_scale(scale)
            call["ip_adapter_image_embeds"] = self.embeds(images)
        return self.pipe(prompt, latents=stream.frame_noise(frame_id), output_type="latent", **call).images


def load_by_diffusers(pipe: Any, adapters: Sequence[Any]) -> None:
    if hasattr(pipe, "tokenizer_3"):
        pipe.load_ip_adapter(adapters[0], image_encoder_folder=None)
    elif hasattr(pipe, "unet"):
        pipe.load_ip_adapter(list(adapters), subfolder="", weight_name=[None] * len(adapters))
    else:
        pipe.load_ip_adapter(list(adapters), weight_name=[None] * len(adapters))


def by(*prompts: Any) -> list[Input]:
    return [Input(image_prompt=one) for one in prompts]


@contextmanager
def loaded(case: Case, *seeds: int, pipe: Any = None, scale: float | None = 0.7, dtype=torch.float32, **options: Any):
    """A prepared stream with an adapter for each seed, and the adapters."""
    pipe = pipe or case.pipe(dtype)
    adapters = [case.weights(pipe, seed) for seed in seeds or (0,)]
    with case.stream(pipe, **options) as stream:
        for adapter in adapters:
            stream.image_prompts.load(adapter, scale=scale)
        yield stream, adapters


def one_by_one(stream: StreamFlow) -> None:
    stream.reset()
    stream.velocity = stream.adapter.row_by_row(stream.cfg_type == "full")


def check_equal(case: Case, dtype=torch.float32, n: int = 5, steps: int = STEPS, **options: Any) -> None:
    with loaded(case, dtype=dtype, steps=steps, **options) as (stream, adapters):
        own = Own(case, adapters, dtype)
        expected = [own.draw(stream, k, [style(k)], 0.7, steps=steps) for k in range(n)]
        inputs = by(*(style(k) for k in range(n)))
        at_once = drawn(stream, inputs)
        if dtype == torch.float32:
            error = relative_error(torch.cat(at_once), torch.cat(expected))
            assert error <= 1e-6, error
        if case.exact:
            one_by_one(stream)
            assert all(map(torch.equal, drawn(stream, inputs), expected))
        assert relative_error(expected[0], expected[1]) > 0.05, "frames that are alike would prove nothing"
        plain = Own(case, (), dtype).draw(stream, 0, [], None, steps=steps)
        assert relative_error(expected[0], plain) > 1e-3, "an adapter without effect would prove nothing"


@some()
def test_each_frame_is_the_pipelines_with_its_own_style(case):
    check_equal(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@some(())
def test_in_half_precision_too(case, dtype):
    if case.exact:
        check_equal(case, dtype=dtype, n=2)


@pytest.mark.parametrize("frames,steps", [(3, 2), (2, 1)])
@pytest.mark.parametrize("case", [FLUX, SD3], ids=["flux", "sd3"])
def test_several_frames_at_once_with_any_number_of_stages(case, frames, steps):
    check_equal(case, n=4, steps=steps, frame_buffer_size=frames)


@pytest.mark.slow
@pytest.mark.parametrize("frames,steps", [(1, 1), (1, 2), (3, 4)])
@some(())
def test_every_family_with_any_number_of_stages(case, frames, steps):
    if case.exact:
        check_equal(case, n=4, steps=steps, frame_buffer_size=frames)


@pytest.mark.slow
def test_kontext_sees_references_and_image_prompts():
    case = Case("flux-kontext", both={**DEV, "_auto_resize": False}, call={"max_area": 64 * 64})
    with loaded(case) as (stream, adapters):
        own, images = Own(case, adapters), [style(10 + k, 64, 64) for k in range(3)]
        expected = []
        for k, image in enumerate(images):
            own.pipe.set_ip_adapter_scale(0.7)
            call = {**case.both, **case.call, "num_inference_steps": STEPS, "height": 64, "width": 64, "image": image}
            call |= {"latents": stream.frame_noise(k), "ip_adapter_image_embeds": own.embeds([style(k)])}
            expected.append(own.pipe(prompt=PROMPT, output_type="latent", **call).images)
        inputs = [Input(image, image_prompt=style(k)) for k, image in enumerate(images)]
        assert relative_error(torch.cat(drawn(stream, inputs)), torch.cat(expected)) <= 1e-6
        one_by_one(stream)
        assert all(map(torch.equal, drawn(stream, inputs), expected))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["schnell", "perflow-sdxl"])
def test_the_other_networks_of_these_pipelines_have_it_too(family):
    both = {"schnell": SHORT, "perflow-sdxl": {}}[family]
    case = Case(family, both=both)
    with loaded(case) as (stream, _):
        first, second = drawn(stream, by(style(0), style(1)))
        stream.reset()
        (alone,) = drawn(stream, by(style(0)))
        assert relative_error(alone, first) <= 1e-6 and relative_error(second, first) > 1e-3


# -- scales ----------------------------------------------------------------------------------------------------------------


@some(("flux", "instaflow"))
def test_scale_0_is_none_to_the_bit(case):
    with loaded(case, scale=0.0) as (stream, _), case.stream(case.pipe()) as plain:
        for one in (stream, plain):
            one_by_one(one)
        none = drawn(plain, [None] * 3)
        assert all(map(torch.equal, drawn(stream, by(*(style(k) for k in range(3)))), none))
        stream.image_prompts.set_scale(0.9)
        stream.reset()
        assert all(map(torch.equal, drawn(stream, [None] * 3), none)), "frames without an image prompt"


@some(("flux", "instaflow-guided"))
def test_a_scale_changes_mid_stream_for_all_rows_or_frame_by_frame(case):
    with loaded(case) as (stream, adapters):
        own = Own(case, adapters)
        change = lambda scale, **scope: lambda: stream.image_prompts.set_scale(scale, **scope)  # noqa: E731
        inputs = by(*(style(k) for k in range(6)))
        got = drawn(stream, [*inputs[:2], change(0.2, scope="frame"), *inputs[2:4], change(1.3, scope="frame"), *inputs[4:]])
        scales = [0.7, 0.7, 0.2, 0.2, 1.3, 1.3]
        expected = [own.draw(stream, k, [style(k)], scale) for k, scale in enumerate(scales)]
        assert relative_error(torch.cat(got), torch.cat(expected)) <= 1e-6
        assert stream.image_prompts.adapters == {"adapter_0": 1.3}
        stream.reset()
        now = drawn(stream, [*inputs[:3], change(0.2), *inputs[3:]])
        assert (
            relative_error(torch.cat(now[3:]), torch.cat([own.draw(stream, k, [style(k)], 0.2) for k in (3, 4, 5)])) <= 1e-6
        )
        before = own.draw(stream, 2, [style(2)], 1.3)
        assert min(relative_error(now[2], one) for one in (before, own.draw(stream, 2, [style(2)], 0.2))) > 1e-4, "in flight"
        assert relative_error(now[0], own.draw(stream, 0, [style(0)], 1.3)) > 1e-5


def test_a_scale_of_now_is_that_of_every_row_of_the_next_step(monkeypatch):
    with loaded(UNET) as (stream, _):
        rows = []
        velocity = stream.adapter.velocity
        forward = type(velocity).forward

        def record(self, x, t, **cond):
            rows.append(cond["image_prompt_scales"].flatten().tolist())
            return forward(self, x, t, **cond)

        monkeypatch.setattr(type(velocity), "forward", record)
        drawn(stream, [*by(style(0), style(1)), lambda: stream.image_prompts.set_scale(0.25), None, *by(style(3))])
        assert rows[1][:2] == pytest.approx([0.7, 0.7])
        assert rows[2][:3] == [0.0, 0.25, 0.25] and rows[3] == [0.25, 0.0, 0.25, 0.25]


def test_the_network_is_called_with_the_same_shapes_whatever_the_styles_and_scales(monkeypatch):
    """So graphs and compiled code are used again: frames with and without an image prompt, and other scales."""
    with loaded(UNET, frame_buffer_size=2) as (stream, _):
        seen, velocity = set(), stream.adapter.velocity
        forward = type(velocity).forward

        def record(self, x, t, **cond):
            seen.add(signature({"x": x, "t": t, **cond}))
            return forward(self, x, t, **cond)

        monkeypatch.setattr(type(velocity), "forward", record)
        drawn(stream, [*by(style(0), None, style(1)), lambda: stream.image_prompts.set_scale(0.1), *by(style(2), style(3))])
        assert len(seen) == 1
        names = {name: (shape, dtype) for name, (shape, dtype, _) in next(iter(seen))}
        assert names["image_prompt_scales"] == ((2 * STEPS, 1), torch.float32)


# -- who has which ----------------------------------------------------------------------------------------------------------


@some(("flux-guided", "sd3"))
def test_frames_with_and_without_an_image_prompt_share_a_stream(case):
    with loaded(case, frame_buffer_size=2) as (stream, adapters):
        own, plain = Own(case, adapters), Own(case)
        got = drawn(stream, [Input(image_prompt=style(0)), None, None, Input(image_prompt=style(3)), None])
        expected = [own.draw(stream, k, [style(k)], 0.7) if k in (0, 3) else plain.draw(stream, k, [], 0) for k in range(5)]
        assert relative_error(torch.cat(got), torch.cat(expected)) <= 1e-6


@pytest.mark.parametrize("case", [FLUX, CASES["instaflow-guided"]], ids=["flux", "instaflow-guided"])
def test_several_adapters_at_once(case):
    with loaded(case, 0, 1) as (stream, adapters):
        own, only = Own(case, adapters), Own(case, adapters[1:])
        stream.image_prompts.set_scale({"adapter_1": 0.4})
        assert stream.image_prompts.adapters == {"adapter_0": 0.7, "adapter_1": 0.4}
        pairs = [(style(k), style(10 + k)) for k in range(3)]
        inputs = by(*({"adapter_1": b, "adapter_0": a} for a, b in pairs))
        expected = [own.draw(stream, k, pair, [0.7, 0.4]) for k, pair in enumerate(pairs)]
        assert relative_error(torch.cat(drawn(stream, inputs)), torch.cat(expected)) <= 1e-6
        one_by_one(stream)
        assert all(map(torch.equal, drawn(stream, inputs), expected))
        stream.unet = stream.unet
        stream.reset()
        (one,) = drawn(stream, by({"adapter_1": style(10)}))
        assert relative_error(one, only.draw(stream, 0, [style(10)], 0.4)) <= 1e-6
        stream.image_prompts.unload("adapter_0")
        assert list(stream.image_prompts.adapters) == ["adapter_1"]
        stream.reset()
        (one,) = drawn(stream, by(style(10)))
        assert relative_error(one, only.draw(stream, 0, [style(10)], 0.4)) <= 1e-6
        names = stream.image_prompts.load(adapters, ["a", "b"], scale=0.7)
        assert names == ("a", "b") and list(stream.image_prompts.adapters) == ["adapter_1", "a", "b"]


def test_a_blend_is_the_weighted_mean_of_the_embeddings():
    case = FLUX
    with loaded(case) as (stream, adapters):
        own = Own(case, adapters)
        a, b = (own.embeds([style(k)])[0] for k in (0, 1))
        own.embeds = lambda images: list(images)
        expected = own.draw(stream, 0, [0.3 * a + 0.7 * b], 0.7)
        encoded = stream.image_prompts.encode(style(0))
        for pairs in ([(style(0), 0.3), (style(1), 0.7)], [(encoded, 3), (style(1), 7)]):
            stream.reset()
            (got,) = drawn(stream, by(pairs))
            assert relative_error(got, expected) <= 1e-6
        stream.reset()
        whole, part = drawn(stream, by([(style(0), 1.0), (style(1), 0.0)], [[(style(0), 0.5), (style(1), 0.5)]]))
        assert (
            torch.equal(whole, own.draw(stream, 0, [a], 0.7)) or relative_error(whole, own.draw(stream, 0, [a], 0.7)) <= 1e-6
        )
        assert relative_error(part, own.draw(stream, 1, [0.5 * a + 0.5 * b], 0.7)) <= 1e-6


@some(("flux-guided", "instaflow-plus"))
def test_embeddings_in_diffusers_shapes_are_taken(case):
    with loaded(case) as (stream, adapters):
        own = Own(case, adapters)
        images = [style(k) for k in range(2)]
        expected = [own.draw(stream, k, [one], 0.7) for k, one in enumerate(images)]
        given = [ImageEmbeds(own.embeds([one])) for one in images]
        assert relative_error(torch.cat(drawn(stream, by(*given))), torch.cat(expected)) <= 1e-6
        stream.reset()
        again = [stream.image_prompts.encode(one) for one in images]
        assert relative_error(torch.cat(drawn(stream, by(*again))), torch.cat(expected)) <= 1e-6
        if case.family == "flux":
            black = own.pipe.encode_image(np.zeros((64, 64, 3), np.uint8), "cpu", 1)[None]
            stream.reset()
            stream.pipe.register_modules(image_encoder=None)
            apart = [ImageEmbeds(own.embeds([one]), negative=[black]) for one in images]
            assert relative_error(torch.cat(drawn(stream, by(*apart))), torch.cat(expected)) <= 1e-6


def test_several_images_of_one_adapter_are_taken_as_embeddings():
    with loaded(FLUX) as (stream, adapters):
        own = Own(FLUX, adapters)
        both = torch.cat([own.embeds([style(k)])[0] for k in (0, 1)], 1)
        own.embeds = lambda images: list(images)
        got = drawn(stream, [*by(ImageEmbeds(both), style(1)), None])
        assert relative_error(got[0], own.draw(stream, 0, [both], 0.7)) <= 1e-6
        assert relative_error(got[1], own.draw(stream, 1, [both[:, 1:]], 0.7)) <= 1e-6
        assert relative_error(got[2], Own(FLUX).draw(stream, 2, [], 0)) <= 1e-6


def test_one_for_all_frames_stays_until_it_is_taken_away():
    with loaded(SD3) as (stream, adapters):
        own, prompts = Own(SD3, adapters), stream.image_prompts
        got = drawn(
            stream,
            [None, lambda: prompts.set(style(5)), None, *by(style(2)), lambda: prompts.set(style(6)), None]
            + [lambda: prompts.set(None), None],
        )
        images = [None, style(5), style(2), style(6), None]
        plain = Own(SD3)
        expected = [own.draw(stream, k, [one], 0.7) if one else plain.draw(stream, k, [], 0) for k, one in enumerate(images)]
        assert relative_error(torch.cat(got), torch.cat(expected)) <= 1e-6
        prompts.set(style(5))
        stream.prepare(PROMPT, num_inference_steps=STEPS, **SD3.both)
        (again,) = drawn(stream, [None])
        assert relative_error(again, own.draw(stream, 0, [style(5)], 0.7)) <= 1e-6


def test_every_way_to_call_draws_the_same():
    with loaded(FLUX, steps=2) as (stream, adapters):
        expected = [frame.image for frame in stream.frames(by(*(style(k) for k in range(3))))]
        stream.reset()
        texts = stream.txt2img(3, image_prompt=[style(k) for k in range(3)])
        assert max(relative_error(a[None], b[None]) for a, b in zip(texts, expected, strict=True)) <= 1e-5
        stream.prepare(PROMPT, num_inference_steps=4, strength=0.5, **FLUX.both)
        start = style(9, 64, 64)
        images = [frame.image for frame in stream.frames([Input(start, image_prompt=style(k)) for k in range(3)])]
        stream.reset()
        shown = [stream(start, image_prompt=style(k)) for k in (0, 1, 2, 2)]
        stream.flush()
        assert max(relative_error(a, b[None]) for a, b in zip(shown[1:], images, strict=True)) <= 1e-5
    with loaded(FLUX, steps=2, frame_buffer_size=3) as (several, _):
        group = several.txt2img(image_prompt=torch.stack([several.preprocess(style(k))[0] for k in range(3)]))
        assert group.shape == (3, 3, 64, 64)
        several.reset()
        group = several.txt2img(image_prompt=[style(k) for k in range(3)])
        assert max(relative_error(a[None], b[None]) for a, b in zip(group, expected, strict=True)) <= 1e-5
        several.flush()
        several.reset()
        several.image_prompts.set(style(1))
        group = several.txt2img(image_prompt=[style(0), None, [(style(2), 1), (style(9), 0)]])
        assert max(relative_error(a[None], b[None]) for a, b in zip(group, expected, strict=True)) <= 1e-5
        several.flush()
        assert len(list(several.frames(by(*(style(k) for k in range(4)))))) == 4


@pytest.mark.parametrize("case", [FLUX, CASES["sd3-guided"]], ids=["flux", "sd3-guided"])
def test_prompts_change_for_frames_or_for_all_rows_and_styles_stay(case):
    with loaded(case) as (stream, adapters):
        own = Own(case, adapters)
        inputs = by(*(style(k) for k in range(4)))
        got = drawn(stream, [*inputs[:2], lambda: stream.update_prompt(OTHER, scope="frame"), *inputs[2:]])
        expected = [own.draw(stream, k, [style(k)], 0.7, OTHER if k > 1 else PROMPT) for k in range(4)]
        assert relative_error(torch.cat(got), torch.cat(expected)) <= 1e-6
        stream.prepare(PROMPT, num_inference_steps=STEPS, **case.both)
        now = drawn(stream, [*inputs[:2], lambda: stream.update_prompt(OTHER), *inputs[2:]])
        assert relative_error(torch.cat(now[2:]), torch.cat(expected[2:])) <= 1e-6
        assert relative_error(now[0], expected[0]) > 1e-4, "frames in flight took the new prompt"


def test_guidance_that_begins_later_has_its_negative_embeddings():
    case = CASES["instaflow-guided"]
    with loaded(UNET) as (stream, adapters):
        drawn(stream, by(style(0)))
        stream.update(cfg_type="full", guidance_scale=3.0, negative_prompt=GUIDED["negative_prompt"])
        stream.reset()
        (got,) = drawn(stream, by(style(0)))
        assert relative_error(got, Own(case, adapters).draw(stream, 0, [style(0)], 0.7)) <= 1e-6


@pytest.mark.parametrize("case", [SD3, UNET], ids=["sd3", "instaflow"])
def test_the_negative_row_of_residual_guidance_has_the_negative_embeddings(case):
    both = []
    for batched in (True, False):
        with loaded(case, cfg_type="initialize", use_denoising_batch=batched) as (stream, _):
            stream.prepare(PROMPT, num_inference_steps=4, strength=0.75, **{**case.both, **GUIDED})
            both.append(drawn(stream, [Input(style(9, 64, 64), image_prompt=style(k)) for k in range(3)]))
    assert relative_error(torch.cat(both[0]), torch.cat(both[1])) <= 1e-5


# -- with the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [FLUX, UNET], ids=["flux", "instaflow"])
def test_a_lora_beside_it_is_the_pipelines_own(case, tmp_path):
    pytest.importorskip("peft")
    write_lora(case.pipe(), {"unet" if case is UNET else "transformer": ["to_q"]}, str(tmp_path), seed=1)
    with loaded(case) as (stream, adapters):
        own = Own(case, adapters)
        without = own.draw(stream, 0, [style(0)], 0.7)
        before = processors(stream.pipe)
        stream.load_lora(str(tmp_path), adapter_name="style")
        own.pipe.load_lora_weights(str(tmp_path), adapter_name="style")
        expected = own.draw(stream, 0, [style(0)], 0.7)
        (got,) = drawn(stream, by(style(0)))
        assert relative_error(got, expected) <= 1e-6 and relative_error(got, without) > 1e-3
        assert processors(stream.pipe) == before
        stream.image_prompts.unload()
        stream.reset()
        (got,) = drawn(stream, [None])
        assert relative_error(got, expected) > 1e-3
        stream.unload_lora()


def test_control_nets_beside_it(picture):
    with loaded(UNET) as (stream, adapters):
        net = random_control(stream.unet)
        controls = {"edges": picture()}
        inputs = [Input(control=controls, image_prompt=style(k)) for k in range(2)]
        stream.add_control("edges", net, 0.8)
        first = drawn(stream, inputs)
    with loaded(UNET) as (other, _):
        other.image_prompts.unload()
        other.add_control("edges", net, 0.8)
        other.image_prompts.load(adapters[0], scale=0.7)
        assert relative_error(torch.cat(drawn(other, inputs)), torch.cat(first)) <= 1e-6
        other.remove_control("edges")
        other.reset()
        plain = drawn(other, by(style(0)))
        assert relative_error(plain[0], Own(UNET, adapters).draw(other, 0, [style(0)], 0.7)) <= 1e-6
        assert relative_error(plain[0], first[0]) > 1e-3


@pytest.mark.slow
@some(())
def test_compiled_as_one_graph_it_draws_the_same_at_any_scale_without_compiling_again(case):
    from torch._dynamo.utils import counters

    def draw(stream):
        first = drawn(stream, [*by(style(0), style(1)), None])
        stream.image_prompts.set_scale(0.2)
        count = counters["stats"]["unique_graphs"]
        stream.reset()
        return [*first, *drawn(stream, by(style(2), style(3)))], counters["stats"]["unique_graphs"] - count

    with loaded(case) as (plain, _), loaded(case) as (compiled, _):
        compiled.accelerate("compile", backend="eager", regional=False)
        (expected, _), (got, again) = draw(plain), draw(compiled)
        assert relative_error(torch.cat(got), torch.cat(expected)) <= 1e-6
        assert again == 0
        compiled.accelerate("none")


@pytest.mark.slow
def test_an_adapter_is_loaded_and_taken_out_under_an_acceleration():
    pipe = UNET.pipe()
    with UNET.stream(pipe, steps=2) as stream:
        stream.accelerate("compile", backend="eager")
        none = drawn(stream, [None])
        stream.image_prompts.load(UNET.weights(pipe))
        assert stream.acceleration == "compile" and "image_prompt_0" in stream.parts().velocity.inputs
        stream.reset()
        assert relative_error(drawn(stream, by(style(0)))[0], none[0]) > 1e-3
        stream.image_prompts.unload()
        stream.reset()
        assert relative_error(drawn(stream, [None])[0], none[0]) <= 1e-6
        with pytest.raises(ValueError, match="fuse_qkv puts attention processors of its own"):
            stream.image_prompts.load(UNET.weights(pipe))
            stream.accelerate("compile", backend="eager", fuse_qkv=True)


@pytest.mark.parametrize("case", [FLUX, UNET], ids=["flux", "instaflow"])
def test_rows_on_several_devices_draw_the_same(case):
    from streamflow.parallel import shard_denoiser

    inputs = by(style(0), style(1), style(2))
    with loaded(case) as (stream, _):
        plain = drawn(stream, inputs)
        shard_denoiser(stream, ["cpu", "cpu"])
        stream.reset()
        assert relative_error(torch.cat(drawn(stream, inputs)), torch.cat(plain)) <= 1e-6
        with pytest.raises(RuntimeError, match="ShardedVelocity, and image prompts belong under it"):
            stream.image_prompts.unload()


def test_the_similarity_filter_sees_image_prompts():
    with loaded(SD3, steps=2) as (stream, _):
        stream.prepare(PROMPT, num_inference_steps=2, strength=0.5, **SD3.both)
        stream.enable_similar_image_filter(0.98, max_skip_frame=float("inf"))
        image = style(8, 64, 64)
        skipped = lambda inputs: [frame.skipped for frame in stream.frames(inputs)]  # noqa: E731
        same = [Input(image, image_prompt=style(0))] * 3
        skipped(same)  # what was loaded before had let some be drawn
        assert skipped([*same, Input(image, image_prompt=style(1))]) == [False, True, True, False]
        stream.image_prompts.set_scale(0.1)
        blend = [(style(0), 0.5), (style(1), 0.5)]
        stream.reset()
        assert skipped([Input(image, image_prompt=blend)] * 2 + [image]) == [False, True, False]


@pytest.mark.parametrize("case", [UNET, CASES["flux-guided"]], ids=["instaflow", "flux-guided"])
def test_an_image_that_does_not_change_is_encoded_once(case, monkeypatch):
    with loaded(case) as (stream, _):
        counted, encode = [], stream.pipe.encode_image
        monkeypatch.setattr(stream.pipe, "encode_image", lambda *a, **k: counted.append(1) or encode(*a, **k))
        pixels = np.asarray(style(0)).copy()
        drawn(stream, by(*[pixels] * 4))
        black = case.cfg_type == "full"
        assert len(counted) == 1 + black
        pixels[:8] = 255  # the caller's memory: another image
        stream.reset()
        drawn(stream, by(pixels, pixels, style(0)))
        assert len(counted) == 2 + black


# -- the pipe ---------------------------------------------------------------------------------------------------------------


def processors(pipe: Any) -> dict[str, Any]:
    return {name: module.processor for name, module in attentions(getattr(pipe, "unet", None) or pipe.transformer).items()}


def state(pipe: Any) -> tuple:
    """What the pipe has: each processor, the projections, the config, and the parts."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    held = [
        {k: v for k, v in one.items() if k in ("encoder_hid_proj", "image_proj")}
        for one in (vars(network), network._modules)
    ]
    return processors(pipe), held, dict(vars(network.config)), dict(network.config), dict(pipe.components), dict(pipe.config)


@some()
def test_the_pipe_gets_back_exactly_what_it_had(case):
    pipe = case.pipe()
    pipe.register_modules(image_encoder=None, feature_extractor=None)
    encoder = case.pipe().image_encoder
    before, plain = state(pipe), case.pipe
    stream = case.stream(pipe)
    stream.image_prompts.load(case.weights(pipe), image_encoder=encoder)
    assert state(pipe) != before and pipe.image_encoder is encoder
    drawn(stream, by(style(0)))
    stream.image_prompts.unload()
    assert state(pipe) == before and type(stream.velocity) is stream.adapter.Velocity
    stream.reset()
    none = drawn(stream, [None])
    stream.image_prompts.load(case.weights(pipe), image_encoder=encoder)
    stream.close()
    assert state(pipe) == before
    with case.stream(plain()) as fresh:
        assert torch.equal(drawn(fresh, [None])[0], none[0])


@some(("flux", "instaflow-guided"))
def test_the_pipes_own_call_draws_with_the_adapters_too(case):
    """As it would with diffusers' own processors, and a pipe that has loaded adapters itself is streamed with them."""
    pipe = case.pipe()
    with loaded(case, pipe=pipe) as (stream, adapters):
        own, same = Own(case, adapters), Own(case)
        expected = own.draw(stream, 0, [style(0)], 0.4)
        same.pipe = pipe
        if case.family in SCHEDULERS:
            pipe.scheduler = SCHEDULERS[case.family]()
        assert torch.equal(same.draw(stream, 0, [style(0)], 0.4), expected)
    load_by_diffusers(pipe, adapters)
    pipe.set_ip_adapter_scale(0.4)
    before = state(pipe)
    with case.stream(pipe) as stream:
        assert stream.image_prompts.adapters == {"adapter_0": 0.4}
        assert state(pipe) != before
        (got,) = drawn(stream, by(style(0)))
        assert relative_error(got, expected) <= 1e-6
    assert state(pipe) == before


def test_streams_of_one_pipe_share_its_adapters():
    pipe = FLUX.pipe()
    encoder = pipe.image_encoder
    pipe.register_modules(image_encoder=None, feature_extractor=None)
    before = state(pipe)
    first, earlier = FLUX.stream(pipe), FLUX.stream(pipe)
    first.image_prompts.load(FLUX.weights(pipe), "style", scale=0.7, image_encoder=encoder)
    for call in (lambda: earlier.image_prompts.load(FLUX.weights(pipe)), lambda: earlier.prepare(PROMPT, **FLUX.both)):
        with pytest.raises(ValueError, match="was loaded into this FluxTransformer2DModel after the stream was made"):
            call()
    second = FLUX.stream(pipe)
    assert list(second.image_prompts.adapters) == ["style"]
    second.image_prompts.set_scale(0.7)
    assert torch.equal(drawn(first, by(style(0)))[0], drawn(second, by(style(0)))[0])
    with pytest.raises(RuntimeError, match="another stream of this pipe draws with its adapters"):
        first.image_prompts.unload()
    first.close()
    assert state(pipe) != before
    assert len(drawn(second, by(style(0)))) == 1
    second.close()
    assert state(pipe) == before


def test_what_the_pipe_does_behind_the_stream_is_said():
    pipe = UNET.pipe()
    with loaded(UNET, pipe=pipe) as (stream, adapters):
        pipe.unload_ip_adapter()
        with pytest.raises(ValueError, match="has adapters of image prompts, and would be replaced, or has lost them"):
            stream.prepare(PROMPT, num_inference_steps=2)
        stream.image_prompts.unload()
        stream.prepare(PROMPT, num_inference_steps=2)
        load_by_diffusers(pipe, adapters)
        with pytest.raises(ValueError, match="was loaded into this UNet2DConditionModel after the stream was made"):
            stream.prepare(PROMPT, num_inference_steps=2)
        with pytest.raises(ValueError, match="was loaded into this UNet2DConditionModel"):
            stream.unet = pipe.unet
    load_by_diffusers(pipe, adapters)
    pipe.set_ip_adapter_scale({"up": {"block_0": [0.0, 1.0]}})
    with pytest.raises(ValueError, match="the blocks of adapter 0 several scales"):
        UNET.stream(pipe)


# -- files ---------------------------------------------------------------------------------------------------------------


def test_adapters_and_encoders_are_loaded_from_files(tmp_path):
    pipe = UNET.pipe()
    (tmp_path / "models" / "image_encoder").mkdir(parents=True)
    weights = save_adapter(pipe, tmp_path / "models" / "style.safetensors")
    pipe.image_encoder.save_pretrained(tmp_path / "models" / "image_encoder")
    expected = Own(UNET, [weights])
    pipe.register_modules(image_encoder=None, feature_extractor=None)
    with UNET.stream(pipe) as stream:
        file = tmp_path / "models" / "style.safetensors"
        ways = (
            lambda: stream.image_prompts.load(file, image_encoder=tmp_path / "models" / "image_encoder"),
            lambda: stream.image_prompts.load(tmp_path, subfolder="models", weight_name="style.safetensors"),
        )
        for load in ways:
            load()
            assert pipe.image_encoder is not None and stream.image_prompts.adapters == {"adapter_0": 1.0}
            stream.reset()
            (got,) = drawn(stream, by(style(0)))
            assert relative_error(got, expected.draw(stream, 0, [style(0)], 1.0)) <= 1e-6
            stream.image_prompts.unload()
            assert pipe.image_encoder is None
        stream.image_prompts.load(file)
        with pytest.raises(ValueError, match="has no image encoder for adapter 'adapter_0'"):
            stream.txt2img(image_prompt=style(0))


# -- Redux -----------------------------------------------------------------------------------------------------------------


def test_a_prompt_of_redux_is_one_line():
    pipe = FLUX.pipe()
    encoders = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    embedder = wake(ReduxImageEncoder(WIDTH, pipe.transformer.config.joint_attention_dim))
    parts = {"image_encoder": siglip_encoder(), "feature_extractor": siglip_features(), "image_embedder": embedder}
    prior = diffusers.FluxPriorReduxPipeline(**parts, **encoders)
    redux = [prior(style(k), prompt="") for k in range(2)]
    with FLUX.stream(pipe) as stream:
        stream.prepare(**redux[0], num_inference_steps=STEPS, guidance_scale=2.5)
        got = drawn(stream, [None, lambda: stream.update(**redux[1], scope="frame"), None])
        size = {"height": 64, "width": 64, "num_inference_steps": STEPS, "guidance_scale": 2.5, "output_type": "latent"}
        expected = [pipe(**one, latents=stream.frame_noise(k), **size).images for k, one in enumerate(redux)]
        assert relative_error(torch.cat(got), torch.cat(expected)) <= 1e-6


# -- on a GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.parametrize("family", ["flux", "sd3", "instaflow"])
def test_styles_and_scales_change_without_a_new_graph_and_without_waiting(family, cuda_stream):
    stream, loop = cuda_stream(family), cuda_stream(family, use_denoising_batch=False)
    for one in (stream, loop):
        with_encoder(one.pipe)
        one.pipe.image_encoder.to("cuda")
        one.image_prompts.load(random_adapter(one.pipe), scale=0.7)
    encoded = [stream.image_prompts.encode(style(k)) for k in range(4)]
    stream.accelerate("cuda-graph")
    drawn(stream, by(*encoded))
    captured = stream.velocity.captured
    stream.reset()
    inputs = [*by(*encoded[:2]), lambda: stream.image_prompts.set_scale(0.2, scope="frame"), None, *by(*encoded[2:])]
    with never_waiting():
        frames = drawn(stream, inputs)
    inputs[2] = lambda: loop.image_prompts.set_scale(0.2, scope="frame")
    assert stream.velocity.captured == captured == 1
    assert relative_error(torch.cat(frames), torch.cat(drawn(loop, inputs))) <= 1e-3


# -- what cannot be --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_is_said_and_changes_nothing(tmp_path):
    pipe = SD3.pipe()
    with SD3.stream(pipe, steps=2) as stream:
        before, velocity, prompts = state(pipe), stream.velocity, stream.image_prompts
        stream.txt2img()
        flux = random_pipeline("flux")
        whole = SD3.weights(pipe)
        short = {**whole, "ip_adapter": {k: v for k, v in whole["ip_adapter"].items() if k != "1.norm_q.weight"}}
        other = {**whole, "image_proj": random_adapter(random_pipeline("sd3", attention_head_dim=32))["image_proj"]}
        refused = {
            "does not fit SD3Transformer2DModel .KeyError": lambda: prompts.load(random_adapter(flux)),
            "does not fit SD3Transformer2DModel .ValueError: Required keys": lambda: prompts.load({"a": torch.ones(1)}),
            "does not fit SD3Transformer2DModel .it lacks 1 weights, transformer_blocks.1": lambda: prompts.load(short),
            "does not fit SD3Transformer2DModel .*shape": lambda: prompts.load(other),
            "2 adapters were loaded|1 adapters were loaded, and their names are": lambda: prompts.load(whole, ["a", "b"]),
            "scale of an image prompt must be finite": lambda: prompts.load(whole, scale=float("inf")),
            "there is no file or folder /nowhere/a.safetensors": lambda: prompts.load("/nowhere/a.safetensors"),
            "there is no adapter to scale": lambda: prompts.set_scale(0.5),
            "no adapter is named 'a'; there are none": lambda: prompts.unload("a"),
            "an image prompt needs an adapter: image_prompts.load": lambda: stream.txt2img(image_prompt=style(0)),
            "an image prompt needs an adapter": lambda: prompts.set(style(0)),
            "image_prompts.load.* loads an adapter, which": lambda: stream.update(ip_adapter_image=style(0)),
        }
        for message, call in refused.items():
            with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
                call()
        assert state(pipe) == before and stream.velocity is velocity and prompts.adapters == {}
        prompts.load(whole, "style")
        with pytest.raises(ValueError, match="there is an adapter named 'style'"):
            prompts.load(whole, "style")
        with pytest.raises(ValueError, match="StableDiffusion3Pipeline takes 1 adapter at a time"):
            prompts.load(whole)
        with pytest.raises(AttributeError, match="call its load"):
            stream.image_prompts = None
        with pytest.raises(RuntimeError, match="stream.unet is not the pipe's own network"):
            pipe.transformer, kept = torch.nn.Identity(), pipe.transformer
            try:
                prompts.unload()
            finally:
                pipe.transformer = kept
    with pytest.raises(RuntimeError, match="this stream was closed"):
        prompts.set_scale(1.0)
    with StreamFlow(random_pipeline("zimage"), [0], cfg_type="none") as zimage:
        for call in (lambda: zimage.image_prompts.load(whole), lambda: zimage.image_prompts.set(style(0))):
            with pytest.raises(NotImplementedError, match="diffusers has no IP-Adapter for ZImagePipeline"):
                call()


FAMILIES = ("flux", "sd3", "instaflow", "sdxl")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_another_family_or_of_other_sizes_is_refused(family):
    pipes = {name: CASES[name].pipe() for name in FAMILIES}
    pipe = pipes[family]
    others = {name: random_adapter(one) for name, one in pipes.items() if name != family}
    if family == "flux":
        others["deeper"] = random_adapter(random_pipeline("flux", num_layers=3))
    with CASES[family].stream(pipe, steps=1) as stream:
        before = state(pipe)
        for weights in others.values():
            with pytest.raises(
                ValueError, match=f"this IP-Adapter does not fit {type(stream.unet).__name__} .*trained for it"
            ):
                stream.image_prompts.load(weights)
            assert state(pipe) == before


def test_a_face_adapter_with_a_lora_is_refused_and_leaves_nothing_behind():
    pytest.importorskip("peft")
    pipe = UNET.pipe()
    weights = UNET.weights(pipe)
    for i, name in enumerate(pipe.unet.attn_processors):
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        layers = {"to_q": attention.to_q, "to_k": attention.to_k, "to_v": attention.to_v, "to_out": attention.to_out[0]}
        for key, layer in layers.items():
            weights["ip_adapter"][f"{i}.{key}_lora.down.weight"] = torch.ones(2, layer.in_features)
            weights["ip_adapter"][f"{i}.{key}_lora.up.weight"] = torch.ones(layer.out_features, 2)
    with UNET.stream(pipe) as stream:
        before, modules = state(pipe), [*pipe.unet.named_modules()]
        with pytest.raises(NotImplementedError, match="a FaceID adapter that brings a LoRA"):
            stream.image_prompts.load(weights)
        assert state(pipe) == before and [*pipe.unet.named_modules()] == modules and stream.loras == ()


@pytest.mark.slow
def test_an_acceleration_that_cannot_take_them_leaves_all_as_it_was():
    pytest.importorskip("onnxruntime")
    pipe = UNET.pipe()
    with UNET.stream(pipe, steps=2) as stream:
        stream.accelerate("onnxruntime")
        before = state(pipe)
        with pytest.raises(RuntimeError, match="ImagePromptVelocity takes Python lists or has no ONNX form"):
            stream.image_prompts.load(UNET.weights(pipe))
        assert state(pipe) == before and stream.image_prompts.adapters == {}
        assert len(drawn(stream, [None])) == 1


@pytest.mark.parametrize(
    ("says", "given"),
    [
        ("image prompt of frame 2 holds NaN", lambda: torch.full((3, 40, 40), torch.nan)),
        ("run from 3 to 3", lambda: torch.ones(3, 40, 40) * 3),
        ("2 image prompts for 1 frames", lambda: [style(0), style(1)]),
        ("no adapter is named 'b'; there are 'adapter_0'", lambda: {"b": style(0)}),
        ("an image is a PIL image.*not str", lambda: "style.png"),
        ("a weight of image_prompt must be finite and not negative", lambda: [(style(0), -1.0), (style(1), 2.0)]),
        ("the weights of image_prompt sum to 0", lambda: [(style(0), 0.0)]),
        ("an empty list of image prompts", lambda: []),
        (
            rf"image embeddings of \[1, 1, 9\], and adapter 'adapter_0' takes \[1, n, {WIDTH}\]",
            lambda: ImageEmbeds(torch.ones(1, 1, 9)),
        ),
        (
            "ImageEmbeds for 2 adapters, and here they are for 'adapter_0'",
            lambda: ImageEmbeds([torch.ones(1, 1, WIDTH)] * 2),
        ),
        ("hold NaN or infinite", lambda: ImageEmbeds(torch.full((1, 1, WIDTH), torch.inf))),
        (r"not \[3, 1, 24\]", lambda: ImageEmbeds(torch.ones(3, 1, WIDTH))),
        ("a floating tensor for each adapter, not str", lambda: ImageEmbeds("a")),
        ("1 embeds and 2 negative ones", lambda: ImageEmbeds(torch.ones(1, 1, WIDTH), [torch.ones(1, 1, WIDTH)] * 2)),
        (
            "cannot be blended",
            lambda: [(ImageEmbeds(torch.ones(1, 1, WIDTH)), 1), (ImageEmbeds(torch.ones(1, 2, WIDTH)), 1)],
        ),
    ],
)
def test_image_prompts_that_cannot_be_are_said_and_change_nothing(says, given, stream_for_errors):
    stream, expected = stream_for_errors
    for call in (lambda: stream.txt2img(image_prompt=given()), lambda: stream.image_prompts.set(given())):
        with pytest.raises((TypeError, ValueError), match=says):
            call()
    assert stream._denoiser.next_id == 2
    with pytest.raises((TypeError, ValueError)):
        next(stream.frames(by(given())))


@pytest.fixture(scope="module")
def stream_for_errors():
    with loaded(FLUX, steps=1) as (stream, _):
        yield stream, stream.txt2img(2, image_prompt=style(0))
