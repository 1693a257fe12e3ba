"""Changes while streaming, without a new `prepare`: frames in flight finish, none is lost or doubled, and every frame
is what a sequential run (`use_denoising_batch=False`) of its own settings draws."""

from __future__ import annotations

import threading
from itertools import groupby

import numpy as np
import pytest
import torch
from conftest import PROMPT, noises, relative_error, slow, streamed
from torch import nn

from streamflow import StreamFlow

OTHER = "a blue whale, flat vector"
TOLERANCE = 1e-4


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and relative_error(a, b) <= TOLERANCE


def sequential(stream_of, family="sd3", t_index_list=(0, 1, 2, 3), **options) -> StreamFlow:
    return stream_of(family, t_index_list, use_denoising_batch=False, **options)


# -- every way to draw ---------------------------------------------------------------------------------------------------
# Each gives all frames in order, as images; `before(k)` is called before frame k comes in.


def by_predict_x0_batch(stream, n, before):
    x, groups = noises(stream, n), []
    for k in range(0, n, stream.frame_bff_size):
        before(k)
        groups.append(stream.predict_x0_batch(x[k : k + stream.frame_bff_size]))
    return stream.decode_image(torch.cat([group for group in groups if group is not None] + stream.flush()))


def by_txt2img(stream, n, before):
    """The first call takes S groups in; `before(k)` for those after the first comes too late, and must do nothing."""
    pictures, told = [], 0
    while told < n:
        while told <= stream._denoiser.next_id and told < n:
            before(told)
            told += 1
        pictures.append(stream.txt2img())
    return torch.cat([*pictures, *(stream.decode_image(x) for x in stream.flush())])[:n]


def by_frames(stream, n, before):
    def inputs():
        for k in range(n):
            before(k)
            yield None

    frames = list(stream.frames(inputs()))
    assert [frame.id for frame in frames] == list(range(n))
    assert not any(frame.skipped for frame in frames) and stream.flush() == []
    return torch.stack([frame.image for frame in frames])


DRAW = {"predict_x0_batch": by_predict_x0_batch, "txt2img": by_txt2img, "frames": by_frames}


def every_way(cases, plain):
    """All cases with all ways: in the plain tier all cases with `predict_x0_batch`, and all ways with the case `plain`."""
    both = [(case, way) for case in cases for way in DRAW]
    return [pair if plain == pair[0] or pair[1] == "predict_x0_batch" else slow(*pair) for pair in both]


@pytest.mark.parametrize("frames", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(("family", "way"), every_way(["sd3", "flux", "instaflow"], plain="sd3"))
def test_scope_frame_every_frame_equals_a_sequential_run_of_its_own_prompt(stream_of, family, way, frames):
    n, change_at, cfg_type = 9, 6, {"sd3": "full", "flux": "none", "instaflow": "initialize"}[family]
    prepare = {"negative_prompt": "blurry", "guidance_scale": 3.0}
    stream = stream_of(family, [0, 2], frame_buffer_size=frames, cfg_type=cfg_type, prepare=prepare)
    drawn = DRAW[way](stream, n, lambda k: k == change_at and stream.update_prompt(OTHER, scope="frame"))

    reference = sequential(stream_of, family, [0, 2], cfg_type=cfg_type, prepare=prepare)
    x = noises(reference, n)
    expected = streamed(reference, x[:change_at])
    reference.prepare(OTHER, num_inference_steps=4, **prepare)
    expected = reference.decode_image(torch.cat([expected, streamed(reference, x[change_at:])]))
    assert close(drawn, expected)


def image_calls(stream, pictures, before):
    """All that `__call__` returned, then what was left in flight, one image an entry."""
    F = stream.frame_bff_size
    drawn = []
    for k in range(0, len(pictures), F):
        before(k)
        drawn.append(stream(pictures[k] if F == 1 else pictures[k : k + F]))
    return torch.cat([*drawn, *(stream.decode_image(x) for x in stream.flush())])


def which(drawn, expected):
    """Groups' numbers in `expected` [groups, F, ...] in the order in which they were drawn, repeats in a row left out."""
    groups = drawn.split(expected.shape[1])
    errors = torch.tensor([[relative_error(g[None].flatten(1), e[None].flatten(1)) for e in expected] for g in groups])
    assert (errors.min(dim=1).values <= TOLERANCE).all(), "a picture that is no frame's"
    return [k for k, _ in groupby(errors.argmin(dim=1).tolist())]


@pytest.mark.parametrize("frames", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "change", [{"prompt": OTHER, "scope": "frame"}, {"t_index_list": [2]}, {"t_index_list": [1, 2, 3]}], ids=str
)
def test_images_keep_their_order_and_their_own_settings(stream_of, picture, change, frames):
    n, at = 5 * frames, 2 * frames
    pictures = [picture(k) for k in range(n)]
    stream = stream_of("sd3", [1, 3], frame_buffer_size=frames, cfg_type="self", prepare={"guidance_scale": 2.0})
    drawn = image_calls(stream, pictures, lambda k: k == at and stream.update(**change))

    reference = sequential(stream_of, "sd3", [1, 3], cfg_type="self", prepare={"guidance_scale": 2.0})
    expected = image_calls(reference, pictures, lambda k: k == at and reference.update(**change))
    assert which(drawn, expected.reshape(5, frames, *expected.shape[1:])) == list(range(5))


# -- noise levels ---------------------------------------------------------------------------------------------------------

LEVELS = {
    "fewer": {"t_index_list": [1]},
    "more": {"num_inference_steps": 8, "t_index_list": [0, 1, 3, 4, 7]},
    "as many": {"t_index_list": [0, 3]},
    "steps": {"num_inference_steps": 6},
    "strength": {"strength": 0.5},
    "sigmas": {"sigmas": [1.0, 0.8, 0.7, 0.1]},
}


@pytest.mark.parametrize("frames", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(("name", "way"), every_way(LEVELS, plain="more"))
def test_new_noise_levels_let_frames_in_flight_finish_with_the_old(stream_of, name, way, frames):
    n, change_at = 9, 6
    stream = stream_of("sd3", [0, 2], frame_buffer_size=frames)
    drawn = DRAW[way](stream, n, lambda k: k == change_at and stream.update(**LEVELS[name]))

    reference = sequential(stream_of, t_index_list=[0, 2])
    x = noises(reference, n)
    before = streamed(reference, x[:change_at])
    settings = {"num_inference_steps": 4, **LEVELS[name]}
    after = sequential(stream_of, t_index_list=settings.pop("t_index_list", [0, 2]), prepare=settings)
    assert close(drawn, reference.decode_image(torch.cat([before, streamed(after, x[change_at:])])))
    assert (stream.t_list, stream.denoising_steps_num) == (after.t_list, after.denoising_steps_num)
    assert torch.equal(stream.sub_timesteps_tensor, after.sub_timesteps_tensor.repeat_interleave(frames))


def test_several_changes_of_length_in_flight(stream_of):
    lists = [[0, 1, 2, 3], [2, 3], [0, 1, 3], [1], [0, 3]]
    stream = stream_of("sd3", lists[0])
    x = noises(stream, 2 * len(lists))

    def before(k):
        if k and k % 2 == 0:
            stream.update(t_index_list=lists[k // 2])

    drawn = by_predict_x0_batch(stream, len(x), before)
    parts = [streamed(sequential(stream_of, t_index_list=t), x[2 * i : 2 * i + 2]) for i, t in enumerate(lists)]
    assert close(drawn, stream.decode_image(torch.cat(parts)))


# -- rows in flight ------------------------------------------------------------------------------------------------------

NOW = {
    "prompt": ("sd3", "none", {}, {"prompt": OTHER}),
    "prompt, guided": ("sd3", "full", {"negative_prompt": "blurry", "guidance_scale": 4.0}, {"prompt": OTHER}),
    "negative prompt": ("sd3", "full", {"negative_prompt": "blurry"}, {"negative_prompt": "dark"}),
    "guidance": ("sd3", "full", {"guidance_scale": 3.0}, {"guidance_scale": 9.0}),
    "guidance to none": ("sd3", "full", {"guidance_scale": 3.0}, {"guidance_scale": 1.0}),
    "embedded guidance": ("flux", "none", {}, {"guidance_scale": 9.0}),
    "true guidance": ("flux", "full", {"true_cfg_scale": 3.0}, {"true_cfg_scale": 9.0}),
    "levels": ("sd3", "none", {}, {"num_inference_steps": 8, "t_index_list": [0, 1, 6, 7], "scope": "now"}),
    "sigmas": ("flux", "none", {}, {"sigmas": [1.0, 0.9, 0.5, 0.2], "scope": "now"}),
    "length of the text": ("sd3", "none", {"max_sequence_length": 0}, {"prompt": OTHER, "max_sequence_length": 8}),
}


@pytest.mark.parametrize("frames", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", [slow(one) if one in ("prompt", "true guidance", "sigmas") else one for one in NOW])
def test_scope_now_all_rows_change_at_the_next_tick(stream_of, name, frames):
    """A frame's stages before the change are steps of the one stream, those after it of the other."""
    family, cfg_type, prepare, change = NOW[name]
    groups, change_at = 5, 3
    stream = stream_of(family, frame_buffer_size=frames, cfg_type=cfg_type, prepare=prepare)
    x = noises(stream, groups * frames)
    drawn = by_predict_x0_batch(stream, len(x), lambda k: k == change_at * frames and stream.update(**change))

    settings = {"num_inference_steps": 4, **prepare, **change}
    settings.pop("scope", None)
    stages = settings.pop("t_index_list", [0, 1, 2, 3])
    prompt = settings.pop("prompt", PROMPT)
    sizes = {"cfg_type": cfg_type, "frame_buffer_size": frames}
    one = sequential(stream_of, family, **sizes, prepare=prepare)
    other = sequential(stream_of, family, stages, **sizes, prepare=settings)
    other.prepare(prompt, **settings)
    expected = []
    for k, row in enumerate(x.split(frames)):
        for stage in range(4):
            by = one if k + stage < change_at else other
            row = by.unet_step(row, by.sub_timesteps_tensor[stage].repeat(frames), stage)[0]
        expected.append(row)
    assert close(drawn, stream.decode_image(torch.cat(expected)))


@pytest.mark.parametrize("cfg_type", ["self", "initialize"])
def test_delta_and_guidance_scale_are_one_weight(stream_of, cfg_type):
    results = []
    for change in ({"delta": 0.5}, {"guidance_scale": 2.0}, {}):
        stream = stream_of("sd3", cfg_type=cfg_type, prepare={"guidance_scale": 3.0})
        x = noises(stream, 6)
        anchors = torch.randn(6, *x.shape[1:], generator=torch.Generator().manual_seed(1))
        out = []
        for k in range(6):
            if k == 3 and change:
                stream.update(**change)
            out.append(stream.predict_x0_batch(x[k : k + 1], anchor=anchors[k : k + 1] if cfg_type == "self" else None))
        out = torch.cat([one for one in out if one is not None] + stream.flush())
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert not close(results[0], results[2]) and results[2].isfinite().all()


@pytest.mark.parametrize("scope", ["now", "frame"])
def test_the_guidance_weight_acts_on_all_rows_whatever_the_scope(stream_of, scope):
    """A frame that entered before has its first stage under the old weight and its second under the new."""
    stream = stream_of("sd3", [0, 2], cfg_type="full", prepare={"guidance_scale": 3.0})
    drawn = by_predict_x0_batch(stream, 6, lambda k: k == 3 and stream.update(guidance_scale=9.0, scope=scope))
    weak, strong = (
        sequential(stream_of, t_index_list=[0, 2], cfg_type="full", prepare={"guidance_scale": w}) for w in (3.0, 9.0)
    )
    row = noises(stream, 3)[2:]
    for stage, by in enumerate((weak, strong)):
        row = by.unet_step(row, by.sub_timesteps_tensor[stage : stage + 1], stage)[0]
    assert close(drawn[2:3], stream.decode_image(row))


def test_assigning_guidance_scale_and_delta_is_an_update(stream_of):
    stream = stream_of("sd3", cfg_type="initialize", prepare={"guidance_scale": 3.0})
    stream.guidance_scale, stream.delta = 5.0, 0.25
    assert (stream.guidance_scale, stream.delta) == (5.0, 0.25), "what was assigned is read"
    assert stream._denoiser.state.request.guidance_scale == 3.0, "in force from the next call on"
    stream.txt2img()
    assert (stream.guidance_scale, stream.delta) == (5.0, 0.25)
    same = stream_of("sd3", cfg_type="initialize", prepare={"guidance_scale": 5.0, "delta": 0.25})
    assert torch.equal(stream.txt2img(), (same.txt2img(), same.txt2img())[1])


# -- prompts --------------------------------------------------------------------------------------------------------------


def test_the_negative_prompt_survives_a_new_prompt(stream_of):
    kept = stream_of("sd3", cfg_type="full", prepare={"negative_prompt": "blurry", "guidance_scale": 5.0})
    kept.update_prompt(OTHER)
    replaced = stream_of("sd3", cfg_type="full", prepare={"guidance_scale": 5.0})
    replaced.update_prompt(OTHER, "blurry")
    without = stream_of("sd3", cfg_type="full", prepare={"guidance_scale": 5.0})
    without.update_prompt(OTHER)
    fresh = stream_of("sd3", cfg_type="full")
    fresh.prepare(OTHER, negative_prompt="blurry", num_inference_steps=4, guidance_scale=5.0)
    expected = fresh.txt2img(4)
    assert torch.equal(kept.txt2img(4), expected) and torch.equal(replaced.txt2img(4), expected)
    assert not close(without.txt2img(4), expected)


class Counting(nn.Module):
    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.rows = velocity, []

    def forward(self, x, t, **cond):
        self.rows.append(len(x))
        return self.velocity(x, t, **cond)


def test_prompts_of_different_lengths_share_a_batch_by_one_call_a_length(stream_of):
    stream = stream_of("sd3", prepare={"max_sequence_length": 0})
    stream.velocity = counting = Counting(stream.velocity)
    change = {"prompt": OTHER, "scope": "frame", "max_sequence_length": 8}
    drawn = by_predict_x0_batch(stream, 8, lambda k: k == 4 and stream.update(**change))
    assert counting.rows[:4] == [4] * 4, "one prompt: one call"
    assert counting.rows[4:10] == [1, 3, 2, 2, 3, 1], "two lengths: two calls"
    assert counting.rows[10:] == [4] * (len(counting.rows) - 10)

    reference = sequential(stream_of, prepare={"max_sequence_length": 0})
    x = noises(reference, 8)
    expected = streamed(reference, x[:4])
    reference.prepare(OTHER, num_inference_steps=4, max_sequence_length=8)
    assert close(drawn, stream.decode_image(torch.cat([expected, streamed(reference, x[4:])])))


def test_embeddings_replace_a_text_and_a_text_replaces_embeddings(stream_of, pipes):
    embeds, _, pooled, _ = pipes("sd3").encode_prompt(OTHER, None, None, do_classifier_free_guidance=False)
    expected = stream_of("sd3")
    expected.prepare(OTHER, num_inference_steps=4)
    given, back = stream_of("sd3"), stream_of("sd3")
    given.update(prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    back.prepare(prompt_embeds=embeds * 0, pooled_prompt_embeds=pooled, num_inference_steps=4)
    back.update_prompt(OTHER)
    picture = expected.txt2img(2)
    assert torch.equal(given.txt2img(2), picture) and torch.equal(back.txt2img(2), picture)


# -- seeds ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("way", ["txt2img", "frames"])
def test_a_new_seed_is_that_of_frames_that_enter_from_then_on(stream_of, way, frames):
    n, change_at = 9, 6
    stream = stream_of("sd3", [0, 2], frame_buffer_size=frames)
    drawn = DRAW[way](stream, n, lambda k: k == change_at and stream.update(seed=11))
    one, other = (sequential(stream_of, t_index_list=[0, 2], prepare=p) for p in ({}, {"seed": 11}))
    expected = streamed(one, torch.cat([noises(one, change_at), noises(other, n)[change_at:]]))
    assert close(drawn, stream.decode_image(expected))


@pytest.mark.parametrize("change", [{"seed": 11}, {"prompt": OTHER}, {"t_index_list": [1, 3]}], ids=str)
def test_frames_does_not_depend_on_the_frame_buffer(stream_of, change):
    """Frames that wait for their group to be full have come in already."""
    n, change_at = 6, 4
    drawn = []
    for frames in (1, 3):
        stream = stream_of("sd3", [3], frame_buffer_size=frames)
        drawn.append(by_frames(stream, n, lambda k, s=stream: k == change_at and s.update(**change)))
    assert close(drawn[1], drawn[0])


# -- the slot -------------------------------------------------------------------------------------------------------------


def test_updates_before_a_tick_merge_field_by_field_and_are_numbered(stream_of):
    stream = stream_of("sd3", cfg_type="full")
    assert stream.update(guidance_scale=3.0) == 1
    assert stream.update_prompt("dropped", "blurry") == 2
    assert stream.update(seed=5) == 3
    with pytest.raises(ValueError):
        stream.update(t_index_list=[])
    assert stream.update_prompt(OTHER) == 4
    assert stream.update(t_index_list=[0, 2]) == 5
    assert stream.update(num_inference_steps=8) == 6
    fresh = stream_of("sd3", [0, 2], cfg_type="full")
    fresh.prepare(OTHER, "blurry", num_inference_steps=8, guidance_scale=3.0, seed=5)
    assert torch.equal(stream.txt2img(3), fresh.txt2img(3))


@pytest.mark.parametrize("first", ["levels", "prompt"])
def test_a_new_length_and_a_new_prompt_merge_in_either_order(stream_of, first):
    stream = stream_of("sd3")
    x = noises(stream, 8)
    steps = [lambda: stream.update(t_index_list=[0, 2]), lambda: stream.update_prompt(OTHER)]

    def before(k):
        for step in steps if first == "levels" else reversed(steps):
            if k == 4:
                step()

    drawn = by_predict_x0_batch(stream, 8, before)
    new = sequential(stream_of, t_index_list=[0, 2])
    new.prepare(OTHER, num_inference_steps=4)
    assert close(drawn[4:], stream.decode_image(streamed(new, x[4:])))
    assert len(drawn) == 8 and drawn.isfinite().all()


def test_prepare_leaves_no_update_behind(stream_of):
    stream = stream_of("sd3")
    stream.update_prompt("not taken yet")
    stream.prepare(OTHER, num_inference_steps=4)
    fresh = stream_of("sd3")
    fresh.prepare(OTHER, num_inference_steps=4)
    assert torch.equal(stream.txt2img(3), fresh.txt2img(3))


def test_sigmas_may_be_an_array(stream_of):
    sigmas = [np.linspace(1.0, end, 4) for end in (0.25, 0.1)]
    stream = stream_of("sd3", prepare={"sigmas": sigmas[0]})
    stream.update(sigmas=sigmas[1])
    assert torch.equal(stream.txt2img(), stream_of("sd3", prepare={"sigmas": sigmas[1].tolist()}).txt2img())


def test_updates_from_another_thread_while_ticking(stream_of):
    """Every image is that of the one prompt or of the other, in order, and the last update wins."""
    prompts, n = (PROMPT, OTHER), 12
    stream = stream_of("sd3", [0, 2])
    going, errors = threading.Event(), []

    def change():
        k = 0
        try:
            while not going.is_set():
                k += 1
                assert stream.update_prompt(prompts[k % 2], scope="frame") == k
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    drawn = [stream.txt2img() for _ in range(n)]
    going.set()
    thread.join()
    stream.update_prompt(OTHER, scope="frame")
    drawn += [stream.txt2img() for _ in range(2)]
    assert not errors

    expected = []
    for prompt in prompts:
        reference = sequential(stream_of, t_index_list=[0, 2])
        reference.prepare(prompt, num_inference_steps=4)
        expected.append(reference.decode_image(streamed(reference, noises(reference, n + 2))))
    by = [[close(one, texts[k : k + 1]) for texts in expected] for k, one in enumerate(drawn)]
    assert all(sum(one) == 1 for one in by)
    assert by[-1] == [False, True]


class HookedLock:
    """A lock that calls `hook` once, right after it was released by the thread that made it."""

    def __init__(self):
        self.lock, self.owner, self.hook = threading.Lock(), threading.get_ident(), None

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()
        if self.hook and threading.get_ident() == self.owner:
            hook, self.hook = self.hook, None
            hook()


def test_an_update_made_while_another_is_being_taken_keeps_both(stream_of):
    stream = stream_of("sd3")
    stream._updates.slot = lock = HookedLock()
    stream.update_prompt(OTHER)

    def from_another_thread():
        thread = threading.Thread(target=stream.update, kwargs={"seed": 5})
        thread.start()
        thread.join()

    lock.hook = from_another_thread
    stream.predict_x0_batch(stream.frame_noise(0))
    stream.flush()
    fresh = stream_of("sd3", prepare={"seed": 5})
    fresh.prepare(OTHER, num_inference_steps=4, seed=5)
    stream.txt2img()
    stream.flush()
    assert torch.equal(stream.prompt_embeds, fresh.prompt_embeds)
    assert torch.equal(stream.frame_noise(3), fresh.frame_noise(3))


def test_a_change_of_one_thing_leaves_the_prompts_under_way_alone(stream_of):
    """Flux hands its guidance to the network beside the prompt; a new guidance is no new prompt."""
    change = {1: lambda s: s.update_prompt(OTHER, scope="frame"), 2: lambda s: s.update(guidance_scale=9.0)}
    stream = stream_of("flux", [0, 1, 2])
    x = noises(stream, 1)
    out = [None]
    for k in range(3):
        change.get(k, lambda s: None)(stream)
        out.append(stream.predict_x0_batch(x))
    weak, strong = sequential(stream_of, "flux", [0, 1, 2]), sequential(stream_of, "flux", [0, 1, 2])
    strong.prepare(PROMPT, num_inference_steps=4, guidance_scale=9.0)
    row = x
    for stage, by in enumerate((weak, weak, strong)):
        row = by.unet_step(row, by.sub_timesteps_tensor[stage : stage + 1], stage)[0]
    assert close(out[-1], row)
