"""The ring loses nothing, doubles nothing and says which frame is which, on every call pattern."""

import gc
from dataclasses import replace

import pytest
import random_pipelines as random_weights
import torch
from conftest import noises, relative_error, streamed

from streamflow.conditioning.prompt import Cond, Prompt
from streamflow.flow.guidance import MODES, Mode
from streamflow.flow.schedule import Schedule
from streamflow.flow.solvers import EULER, STOCHASTIC, Rule
from streamflow.stream.ring import Carried, Group, Ring, Settings


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_none_until_full_then_one_group_a_push_then_the_rest(stages, frames, stream_of):
    stream = stream_of("sd3", range(stages), frame_buffer_size=frames)
    groups = [stream.predict_x0_batch(x) for x in noises(stream, 6 * frames).split(frames)]
    assert [g is None for g in groups] == [k < stages - 1 for k in range(6)]
    left = stream.flush()
    assert [len(g) for g in left] == [frames] * (stages - 1)
    assert stream.flush() == []
    loop = stream_of("sd3", range(stages), frame_buffer_size=frames, use_denoising_batch=False)
    drawn = torch.cat([g for g in groups if g is not None] + left)
    assert relative_error(drawn, streamed(loop, noises(loop, 6 * frames))) <= 1e-5


def test_a_flushed_ring_starts_clean(stream_of):
    stream = stream_of("sd3")
    latents = noises(stream, 3)
    first = streamed(stream, latents)
    assert torch.equal(streamed(stream, latents), first)


def test_seeds_decide_on_every_call_pattern(stream_of):
    """txt2img() six times, txt2img(6), frames, groups of three and one at a time without the batch: the same images."""

    def stream(**options):
        return stream_of("sd3", prepare={"seed": 11}, **options)

    one_by_one, at_once, iterated = stream(), stream(), stream()
    grouped, loop = stream(frame_buffer_size=3), stream(use_denoising_batch=False)
    expected = torch.cat([one_by_one.txt2img() for _ in range(6)])
    assert torch.equal(at_once.txt2img(6), expected)
    assert torch.equal(torch.stack([frame.image for frame in iterated.frames([None] * 6)]), expected)
    assert relative_error(grouped.txt2img(6), expected) <= 1e-5
    assert relative_error(loop.txt2img(6), expected) <= 1e-5
    other = stream_of("sd3", prepare={"seed": 12})
    assert relative_error(other.txt2img(6), expected) > 1e-2


def test_image_frames_share_one_noise_or_have_their_own(stream_of, picture):
    fixed, fresh = stream_of("sd3", [2, 3]), stream_of("sd3", [2, 3], noise="frame")
    same = [frame.image for frame in fixed.frames([picture()] * 3)]
    assert relative_error(torch.stack(same[1:]), torch.stack(same[:1] * 2)) <= 1e-5
    own = [frame.image for frame in fresh.frames([picture()] * 3)]
    assert relative_error(torch.stack(own[1:]), torch.stack(own[:1] * 2)) > 1e-2


def test_two_streams_share_no_random_state_and_the_global_one_is_untouched(stream_of):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = stream_of("sd3"), stream_of("sd3")
    first = a.txt2img()
    a.txt2img(3)
    assert torch.equal(b.txt2img(), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_is_used_as_it_is(stream_of):
    generator = torch.Generator().manual_seed(123)
    stream = stream_of("sd3", [0], prepare={"generator": generator})
    stream.txt2img()
    again = torch.Generator().manual_seed(123)
    torch.randn((1, 16, 8, 8), generator=again)
    assert torch.equal(generator.get_state(), again.get_state())


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_images_prime_the_ring_with_themselves(stages, stream_of, picture):
    """Calls 1 to S return the first frame, call k > S frame k - S + 1; flush leaves the copies out."""
    first = 4 - stages
    stream, loop = stream_of("sd3", range(first, 4)), stream_of("sd3", range(first, 4), use_denoising_batch=False)
    pictures = [picture(k) for k in range(6)]
    drawn = torch.cat([stream(p) for p in pictures])
    alone = torch.cat([loop(p) for p in pictures])
    expected = torch.cat([alone[max(0, k - stages + 1)][None] for k in range(6)])
    assert relative_error(drawn, expected) <= 1e-5
    left = stream.flush()
    assert len(left) == stages - 1
    if left:
        assert relative_error(stream.decode_image(torch.cat(left)), alone[-len(left) :]) <= 1e-5


def test_flushing_after_one_image_returns_no_copies(stream_of, picture):
    stream = stream_of("sd3")
    stream(picture())
    assert stream.flush() == []


def test_text_primes_with_fresh_frames_and_flush_returns_them(stream_of):
    stream, loop = stream_of("sd3"), stream_of("sd3", use_denoising_batch=False)
    drawn = [stream.txt2img()]
    drawn += [stream.decode_image(group) for group in stream.flush()]
    assert relative_error(torch.cat(drawn), loop.txt2img(4)) <= 1e-5


def test_txt2img_returns_exactly_what_it_was_asked_for(stream_of):
    stream = stream_of("sd3", frame_buffer_size=2)
    assert [len(stream.txt2img(n)) for n in (None, 2, 6)] == [2, 2, 6]
    for n in (1, 3, 0, -2):
        with pytest.raises(ValueError, match="multiple of frame_buffer_size 2"):
            stream.txt2img(n)


def test_own_latents_are_drawn_as_the_pipeline_would(stream_of):
    stream, loop = stream_of("sd3"), stream_of("sd3", use_denoising_batch=False)
    latents = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    assert relative_error(stream.txt2img(latents=latents), loop.txt2img(latents=latents)) <= 1e-5


def test_prepare_empties_the_ring_and_logs_what_it_dropped(stream_of, caplog):
    stream = stream_of("sd3")
    first = stream.txt2img()
    stream.prepare("a red apple, 3d render", num_inference_steps=4)
    assert "3 frames in flight were dropped" in caplog.text
    assert torch.equal(stream.txt2img(), first)
    stream.reset()
    assert torch.equal(stream.txt2img(), first)


def test_the_unfilled_ring_takes_no_part(stream_of):
    """Rows that hold no frame yet cannot reach an image, whatever is in them."""
    stream = stream_of("sd3")
    expected = streamed(stream, noises(stream, 2))
    stream._denoiser.engine._flight.advanced.fill_(float("nan"))
    assert torch.equal(streamed(stream, noises(stream, 2)), expected)


def test_unet_step_and_scheduler_step_are_the_tick(stream_of):
    stream = stream_of("sd3", cfg_type="full", prepare={"guidance_scale": 3.0})
    x = noises(stream, 4)
    advanced, v = stream.unet_step(x, stream.sub_timesteps_tensor)
    assert torch.equal(stream.scheduler_step_batch(v, x), advanced)
    for i in range(4):
        alone, _ = stream.unet_step(x[i : i + 1], stream.sub_timesteps_tensor[i : i + 1], idx=i)
        assert relative_error(alone, advanced[i : i + 1]) <= 1e-5
        assert torch.equal(stream.scheduler_step_batch(v[i : i + 1], x[i : i + 1], i), advanced[i : i + 1])


def test_assigning_a_network_and_a_tiny_vae(stream_of, pipes):
    stream = stream_of("sd3")
    before = stream.txt2img()
    stream.unet = pipes("sd3", num_layers=1).transformer
    stream.reset()
    assert relative_error(stream.txt2img(), before) > 1e-3
    stream.unet = stream.pipe.transformer
    stream.reset()
    assert torch.equal(stream.txt2img(), before)
    stream.vae = random_weights.random_tiny_vae(16)
    stream.reset()
    drawn = stream.txt2img()
    assert drawn.shape == before.shape
    assert relative_error(drawn, before) > 1e-3
    assert stream.encode_image(drawn).shape == (1, 16, 8, 8)


@pytest.mark.parametrize("frames", [1, 3])
def test_frames_one_output_an_input_in_order(frames, stream_of, picture):
    stream, loop = stream_of("sd3", [2, 3], frame_buffer_size=frames), stream_of("sd3", [2, 3], use_denoising_batch=False)
    inputs = [picture(0), picture(1), None, picture(2), None, None, picture(3)]
    drawn, alone = list(stream.frames(inputs)), list(loop.frames(inputs))
    assert [f.id for f in drawn] == list(range(7))
    assert all(f.image.shape == (3, 64, 64) and f.latency_s > 0 and not f.skipped and f.ready() for f in drawn)
    images = torch.stack([f.wait().image for f in drawn])
    assert relative_error(images, torch.stack([f.image for f in alone])) <= 1e-5
    assert stream.flush() == []


def test_frames_gives_a_skipped_input_the_image_it_resembles(stream_of, picture):
    stream = stream_of("sd3", [2, 3])
    stream.enable_similar_image_filter(0.9, max_skip_frame=10)
    inputs = [picture(0), picture(0), picture(0), picture(5), picture(5)]
    drawn = list(stream.frames(inputs))
    assert [f.id for f in drawn] == [0, 1, 2, 3, 4]
    assert [f.skipped for f in drawn] == [False, True, True, False, True]
    assert torch.equal(drawn[2].image, drawn[0].image)
    assert torch.equal(drawn[4].image, drawn[3].image)
    assert not torch.equal(drawn[3].image, drawn[0].image)


@pytest.mark.slow
def test_hundreds_of_ticks_hold_no_more_tensors_than_twenty(stream_of):
    """Tensors alive after many ticks are those alive after few."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    stream = stream_of("sd3", range(2), changes={"num_layers": 1})
    x = noises(stream, 1)
    for _ in range(20):
        stream.predict_x0_batch(x)
    few = tensors()
    for _ in range(300):
        stream.predict_x0_batch(x)
    assert tensors() <= few + 2


@pytest.mark.parametrize("cfg_type", ["none", "initialize"])
def test_a_network_that_fails_loses_only_the_frame_that_was_to_enter(cfg_type, stream_of):
    stream = stream_of("sd3", cfg_type=cfg_type, prepare={"guidance_scale": 2.0, "num_inference_steps": 4, "seed": 3})
    latents = noises(stream, 6)
    undisturbed = streamed(stream, latents[[0, 1, 3, 4, 5]])
    network, drawn = stream.velocity, []

    class Failing(torch.nn.Module):
        def forward(self, *args, **kwargs):
            raise RuntimeError("out of memory")

    for k, x in enumerate(latents.split(1)):
        stream.velocity = Failing() if k == 2 else network
        if k == 2:
            with pytest.raises(RuntimeError, match="out of memory"):
                stream.predict_x0_batch(x)
        else:
            drawn.append(stream.predict_x0_batch(x))
    assert torch.equal(torch.cat([x for x in drawn if x is not None] + stream.flush()), undisturbed)


# -- the ring by itself ---------------------------------------------------------------------------------------------------

PROMPT = Prompt(Cond({"text": torch.ones(1, 2)}), Cond({"text": torch.zeros(1, 2)}))


def ring_of(stages: int = 3, guidance: Mode = MODES["none"], rule: Rule = EULER) -> Ring:
    """A ring of rows of two numbers, one frame a group."""
    schedule = Schedule(torch.arange(stages, 0, -1.0), torch.linspace(1, 0, stages + 1))
    settings = Settings(
        stages=schedule.pick(range(stages)),
        frames=1,
        mode=guidance,
        rule=rule,
        shape=(2,),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return Ring(settings)


def group_of(k: int, **carried: float) -> Group:
    """Group k, which carries one number by each name; -1 stands in the rows without it."""
    values = {name: Carried(torch.full((1, 1), value), fill=-1.0) for name, value in carried.items()}
    return Group(torch.full((1, 2), float(k)), (PROMPT,), (k,), values)


def drift(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return x + text.mean()


def test_a_network_that_raises_leaves_the_ring_as_it_was():
    own_noise = STOCHASTIC.with_own_noise()
    ring, calm = ring_of(3, MODES["initialize"], own_noise), ring_of(3, MODES["initialize"], own_noise)
    groups = [
        replace(group_of(k, tag=k), carried={**group_of(k, tag=k).carried, "noise": Carried(torch.ones(1, 2))})
        for k in range(5)
    ]
    for group in groups[:3]:
        ring.push(group, drift)
        calm.push(group, drift)

    def fails(x, t, text):
        raise RuntimeError("out of memory")

    before = ring._flight
    kept = {name: one.value.clone() for name, one in before.carried.items()}
    x, waiting = before.x.clone(), ring.waiting.clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        ring.push(groups[3], fails)
    assert ring._flight is before and not ring.holds(groups[3]) and ring.groups_in_flight == 2
    assert set(kept) == {"tag", "noise", "anchor"}
    assert all(torch.equal(before.carried[name].value, value) for name, value in kept.items())
    assert torch.equal(before.x, x) and torch.equal(ring.waiting, waiting)
    for group in groups[3:]:
        assert torch.equal(ring.push(group, drift).x0, calm.push(group, drift).x0)


def test_what_is_carried_travels_with_its_rows_and_is_dropped_with_the_last_group_that_brought_it():
    ring, tags = ring_of(3), []
    for k, carried in enumerate([{}, {"tag": 7.0}, {}, {"tag": 9.0}, {}, {}, {}]):
        ring.push(group_of(k, **carried), drift)
        held = ring._flight.carried.get("tag")
        tags.append(None if held is None else held.value.flatten().tolist())
    assert tags == [None, [7.0, -1.0, -1.0], [-1.0, 7.0, -1.0], [9.0, -1.0, 7.0], [-1.0, 9.0, -1.0], [-1.0, -1.0, 9.0], None]


def test_what_the_rule_needs_of_every_row_is_carried_where_no_group_brings_it():
    ring = ring_of(2, rule=STOCHASTIC.with_own_noise())
    ring.push(group_of(0), drift)
    assert ring._flight.carried["noise"].value.tolist() == [[0.0, 0.0]] * 2
    ring.reset()
    assert ring.empty and set(ring._flight.carried) == {"noise"}
