"""Weighted prompts and seeds: what they come to, that changing weights encodes nothing, and noise and feedback for video."""

import math
import threading

import pytest
import torch
from conftest import never_waiting, noises, relative_error, streamed

from streamflow.conditioning.blending import Cache, blend, spherical
from streamflow.conditioning.prompt import Cond
from streamflow.flow.noise import NoiseSource

CAT, DOG, FOX = "a cat", "a small dog", "a fox"
EMBEDS = {"encoder_hidden_states", "pooled_projections"}


def slerp(a, b, t):
    angle = torch.acos((a / a.norm() * b / b.norm()).sum())
    mixed = (torch.sin((1 - t) * angle) * a / a.norm() + torch.sin(t * angle) * b / b.norm()) / torch.sin(angle)
    return ((1 - t) * a.norm() + t * b.norm()) * mixed


def weighted(values, weights):
    return torch.stack(values), torch.tensor(weights).reshape(-1, 1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_a_spherical_blend_of_two_is_their_slerp(t):
    a, b = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(spherical(*weighted([a, b], [1 - t, t])), slerp(a, b, t), atol=1e-5)


def test_a_spherical_blend_of_many_does_not_depend_on_their_order_and_keeps_lengths():
    values = list(torch.randn(4, 16, generator=torch.Generator().manual_seed(2)) + 1)
    weights = [0.1, 0.2, 0.3, 0.4]
    mixed = spherical(*weighted(values, weights))
    assert torch.allclose(spherical(*weighted(values[::-1], weights[::-1])), mixed, atol=1e-5)
    assert mixed.norm() == pytest.approx(sum(w * v.norm().item() for w, v in zip(weights, values, strict=True)), rel=1e-4)
    assert torch.allclose(spherical(*weighted([values[0]] * 3, [0.2, 0.3, 0.5])), values[0], atol=1e-5)
    opposite = spherical(*weighted([values[0], -values[0]], [0.5, 0.5]))
    assert opposite.isfinite().all()


def test_a_linear_blend_is_the_sum(stream_of):
    stream = stream_of("sd3")
    conds = {}
    for text in (CAT, DOG):
        stream.prepare(text, num_inference_steps=4)
        conds[text] = stream._denoiser.state.prompt.cond
    for weights, normalize in (((0.5, 1.5), True), ((0.25, 0.75), False)):
        prompt = list(zip((CAT, DOG), weights, strict=True))
        stream.prepare(prompt, num_inference_steps=4, normalize=normalize)
        for name in EMBEDS:
            expected = 0.25 * conds[CAT].rows[name] + 0.75 * conds[DOG].rows[name]
            assert torch.allclose(stream._denoiser.state.prompt.cond.rows[name], expected, atol=1e-6)
    stream.prepare([(CAT, 1.0), (DOG, 0.0)], num_inference_steps=4)
    assert torch.equal(stream._denoiser.state.prompt.cond.rows["pooled_projections"], conds[CAT].rows["pooled_projections"])


def test_tokens_that_only_some_texts_have_are_blended_among_those():
    short = Cond({"e": torch.ones(1, 2, 3), "mask": torch.tensor([[1, 1]])})
    long = Cond({"e": 3 * torch.ones(1, 4, 3), "mask": torch.tensor([[1, 1, 1, 0]])}, {"ids": torch.arange(4)})
    mixed = blend([short, long], [0.5, 0.5], "linear", {"e"})
    assert mixed.rows["e"][0, :, 0].tolist() == [2.0, 2.0, 3.0, 0.0]
    assert mixed.rows["mask"].tolist() == [[1, 1, 1, 0]] and len(mixed.shared["ids"]) == 4
    assert blend([short, long], [1.0, 0.0], "slerp", {"e"}) is short
    pictured = [Cond({"e": k * torch.ones(1, 2, 3), "mask": torch.tensor([[1, k - 1, 1, 1]])}) for k in (1, 2)]
    mixed = blend(pictured, [0.5, 0.5], "linear", {"e"})
    assert mixed.rows["e"][0, :, 0].tolist() == [1.5, 2.0] and mixed.rows["mask"].tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("family", ["sd3", "zimage", "qwenimage", "lumina2", "flux", "bria-fibo"])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_blend_draws_something_between_in_every_family(family, method, pipes):
    from streamflow import StreamFlow

    stream = StreamFlow(pipes(family), [0, 1], cfg_type="none", width=64, height=64)
    drawn = []
    for prompt in (CAT, [(CAT, 0.5), (DOG, 0.5)], DOG):
        # The templates of Qwen-Image and Lumina2 are longer than 40 of these tokens.
        length = {} if family in ("qwenimage", "lumina2") else {"max_sequence_length": 40}
        stream.prepare(prompt, num_inference_steps=2, blend=method, **length)
        drawn.append(streamed(stream, noises(stream, 1)))
    apart = relative_error(drawn[0], drawn[2])
    assert apart > 0 and all(0 < relative_error(drawn[1], end) for end in (drawn[0], drawn[2]))
    assert min(relative_error(drawn[1], end) for end in (drawn[0], drawn[2])) < apart


def test_changing_weights_encodes_nothing_and_draws_what_a_new_blend_draws(stream_of, monkeypatch):
    stream = stream_of("sd3", cfg_type="full", prepare={"guidance_scale": 3.0})
    negative = [("blurry", 0.5), ("dark", 0.5)]
    stream.update(prompt=[(CAT, 0.5), (DOG, 0.3), (FOX, 0.2)], negative_prompt=negative)
    calls = []
    encode = stream._updates.planner.adapter.read
    monkeypatch.setattr(type(stream.adapter), "read", lambda self, *a, **k: calls.append(a) or encode(*a, **k))
    stream.update(prompt_weights=[0.1, 0.1, 0.8], guidance_scale=4.0, seed=[(1, 0.5), (7, 0.5)])
    stream.update(prompt=[(FOX, 0.4), (CAT, 0.6)], blend="slerp", normalize=False)
    stream.update(prompt=DOG)
    assert not calls
    stream.update(prompt="a text that is new")
    assert len(calls) == 1
    stream.update(prompt=[(CAT, 0.1), (DOG, 0.1), (FOX, 0.8)], blend="linear", normalize=True)
    drawn = stream.txt2img()
    fresh = stream_of("sd3", cfg_type="full", prepare={"guidance_scale": 4.0, "seed": [(1, 0.5), (7, 0.5)]})
    fresh.update(prompt=[(CAT, 0.1), (DOG, 0.1), (FOX, 0.8)], negative_prompt=negative)
    assert torch.equal(drawn, fresh.txt2img())


@pytest.mark.parametrize(
    "change,error,says",
    [
        ({"prompt": []}, ValueError, "prompt is an empty list"),
        ({"prompt": [CAT, DOG]}, TypeError, "holds pairs"),
        ({"prompt": [(CAT, "half")]}, TypeError, "must be a number, not 'half'"),
        ({"prompt": [(CAT, -0.5), (DOG, 1.0)]}, ValueError, "not negative, not -0.5"),
        ({"prompt": [(CAT, math.nan)]}, ValueError, "must be finite"),
        ({"prompt": [(CAT, 0), (DOG, 0)]}, ValueError, "sum to 0"),
        ({"negative_prompt": [(3, 1.0)]}, TypeError, "negative_prompt as a list holds pairs"),
        ({"prompt_weights": [0.5, 0.5]}, ValueError, "prompt is one text"),
        ({"prompt": [(CAT, 1), (DOG, 1)], "prompt_weights": [1]}, ValueError, "has 2 texts"),
        ({"blend": "cubic"}, ValueError, "unknown blend 'cubic'"),
        ({"seed": [(1.5, 1.0)]}, TypeError, "seed as a list holds pairs"),
        ({"seed": [(1, 0.0)]}, ValueError, "sum to 0"),
        ({"prompt": [(CAT, 0.5), (DOG, 1.5)], "normalize": False}, ValueError, "weights of prompt sum to 2, not to 1"),
        ({"negative_prompt": [("dark", 0.5)], "normalize": False}, ValueError, "weights of negative_prompt sum to 0.5"),
        ({"noise": "slow"}, ValueError, "unknown noise 'slow': choose one of 'fixed'"),
        ({"noise": "interpolated", "noise_period": 0}, ValueError, "noise_period must be"),
        ({"feedback": 1.0, "prompt": DOG}, ValueError, "feedback must be 0 or more and below 1"),
        ({"feedback": math.nan}, ValueError, "feedback must be finite"),
    ],
)
def test_what_cannot_be_blended_is_refused_and_the_stream_goes_on(change, error, says, stream_of):
    stream = stream_of("sd3")
    before = stream._denoiser.state
    with pytest.raises(error, match=says):
        stream.update(**change)
    stream.txt2img()
    assert stream._denoiser.state is before and stream._updates.count == 0


def test_the_cache_is_bounded_and_keeps_what_was_used_last():
    cache, made = Cache(2), []
    for key in "abacb":
        cache.get(key, lambda key=key: made.append(key) or key)
    assert made == ["a", "b", "c", "b"] and len(cache) == 2
    assert cache.get(["no hash"], lambda: 1) == 1 and len(cache) == 2
    cache.clear()
    assert len(cache) == 0


def test_updates_wait_for_a_prepare_in_another_thread(stream_of):
    stream = stream_of("sd3")
    plan, go, order = stream._updates.planner.plan, threading.Event(), []

    def slow(*args):
        go.set()
        state = plan(*args)
        order.append("prepared")
        return state

    object.__setattr__(stream._updates.planner, "plan", slow)  # frozen
    thread = threading.Thread(target=lambda: stream.prepare(CAT, num_inference_steps=4))
    thread.start()
    go.wait()
    stream.update(prompt=DOG)
    order.append("updated")
    thread.join()
    stream.txt2img()
    assert order == ["prepared", "updated"] and stream._denoiser.state.request.prompt == DOG


# -- noise and feedback ---------------------------------------------------------------------------------------------------


def test_several_seeds_give_gaussian_noise_between_them():
    shape = (4, 64, 64)
    one, seven = (NoiseSource(shape, seed).draw(0) for seed in (1, 7))
    mixed = NoiseSource(shape, ((1, 0.5), (7, 0.5))).draw(0)
    assert torch.allclose(mixed, (one + seven) / math.sqrt(2)) and mixed.std() == pytest.approx(1, abs=0.02)
    alone = NoiseSource(shape, ((1, 3.0), (7, 0.0)))
    assert torch.allclose(alone.draw(0), one) and torch.allclose(alone.fixed(), NoiseSource(shape, 1).fixed())


def test_interpolated_noise_moves_steadily_and_keeps_its_variance():
    source = NoiseSource((4, 64, 64), 3, period=10)
    frames = [source.draw(k) for k in range(31)]
    steps = [(b - a).norm().item() for a, b in zip(frames, frames[1:], strict=False)]
    assert max(steps) < 1.1 * min(steps) and all(abs(f.std() - 1) < 0.03 for f in frames)
    assert torch.equal(frames[20], NoiseSource((4, 64, 64), 3).draw(2))
    with pytest.raises(ValueError, match="pass a seed"):
        NoiseSource((4,), generator=torch.Generator(), period=10)


def test_constant_noise_is_that_of_the_first_frame(stream_of, picture):
    stream = stream_of("sd3", noise="constant", prepare={"seed": 3})
    assert torch.equal(stream.frame_noise(5), NoiseSource(stream._model.shape, 3).draw(0))
    texts = stream.txt2img(2)
    assert torch.equal(texts[0], texts[1])
    stream.update(noise="frame")
    again = stream.txt2img(5)
    assert not torch.equal(again[-1], texts[0])


def test_a_stream_takes_interpolated_noise_for_text_and_images(stream_of, picture):
    stream = stream_of("sd3", [1, 2], noise="interpolated", noise_period=4, prepare={"seed": 3})
    plain = NoiseSource(stream._model.shape, 3)
    assert torch.equal(stream.frame_noise(4), plain.draw(1)) and not torch.equal(stream.frame_noise(1), plain.draw(0))
    drawn = [frame.image[None] for frame in stream.frames([picture(1)] * 5)]
    assert 0 < relative_error(drawn[1], drawn[0]) < relative_error(drawn[4], drawn[0])
    with pytest.raises(ValueError, match="noise_period must be"):
        stream_of("sd3", noise="interpolated", noise_period=0)


@pytest.mark.parametrize("batched", [True, False])
def test_feedback_mixes_the_frame_that_left_last_into_the_next_start(batched, stream_of, picture):
    """Without a batch that is the frame before; in a ring of two stages the one before that."""
    stream = stream_of("sd3", [2, 3], use_denoising_batch=batched, feedback=0.4)
    starts, lefts = [], []
    clean, path = stream._model.encode, stream.adapter.path
    monkey = {"path": lambda x0, noise, sigma: starts.append(x0) or path(x0, noise, sigma)}
    vars(stream.adapter).update(monkey)
    pictures = [picture(k) for k in range(4)]
    decode = stream._outputs.decode_later
    stream._outputs.decode_later = lambda done: lefts.append(done.x0) or decode(done)
    list(stream.frames(pictures))
    own = [clean(stream.preprocess(one)) for one in pictures]
    for k in range(4):
        last = k - (1 if not batched else 2)
        expected = own[k] if last < 0 else torch.lerp(own[k], lefts[last], 0.4)
        assert torch.allclose(starts[k], expected, atol=1e-6), k
    assert torch.equal(stream._denoiser.last_x0, lefts[-1])  # what drained has left too
    stream.reset()
    assert stream._denoiser.last_x0 is None


def test_one_update_changes_noise_feedback_prompt_and_levels_at_once(stream_of, picture):
    options = {"cfg_type": "self", "use_denoising_batch": False}
    stream = stream_of("sd3", [1, 2], **options, prepare={"seed": 3})
    stream(picture(0))
    last = stream._denoiser.last_x0
    stream.update(
        **{"noise": "interpolated", "noise_period": 4, "feedback": 0.3, "strength": 0.5, "num_inference_steps": 8},
        **{"prompt": [(CAT, 0.6), (DOG, 0.4)], "negative_prompt": "dark", "guidance_scale": 1.4, "delta": 0.5, "seed": 5},
    )
    drawn = stream(picture(1))
    other = stream_of("sd3", range(4), **options, noise="interpolated", noise_period=4, feedback=0.3)
    other.prepare([(CAT, 0.6), (DOG, 0.4)], "dark", 8, 1.4, 0.5, seed=5, strength=0.5)
    other._denoiser.last_x0, other._denoiser.next_id = last, 1
    assert torch.equal(drawn, other(picture(1))) and stream.denoising_steps_num == 4
    stream.prepare(CAT, num_inference_steps=4)
    assert (stream._denoiser.state.request.noise, stream._denoiser.state.request.feedback, stream._denoiser.last_x0) == (
        "fixed",
        0.0,
        None,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_new_weights_do_not_wait_for_the_gpu(cuda_stream):
    stream = cuda_stream(prepare={"blend": "slerp"})
    stream.update(prompt=[(CAT, 0.5), (DOG, 0.5)])
    stream.txt2img()
    with never_waiting():
        for share in (0.2, 0.8):
            stream.update(prompt_weights=[1 - share, share])
            drawn = stream.txt2img()
    assert drawn.isfinite().all()
