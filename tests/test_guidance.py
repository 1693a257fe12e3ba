"""Guidance in velocity form: how many rows each mode adds, what it is exact for, and that the batch changes nothing."""

import pytest
import torch
from conftest import noises, relative_error, slow, streamed

from streamflow.flow.guidance import MODES

STEPS = range(1, 5)  # image-to-image, so that an anchor means something
GUIDED = {"num_inference_steps": 5, "negative_prompt": "blurry", "guidance_scale": 2.5}


class CountRows(torch.nn.Module):
    """Passes a velocity on, and notes the rows of every call."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.rows = velocity, []

    def forward(self, x, t, **cond):
        self.rows.append(len(x))
        return self.velocity(x, t, **cond)


def both(stream_of, family, cfg_type, frames, prepare=GUIDED, **options):
    """The same stream twice: the denoising batch and the sequential loop."""
    make = lambda batched: stream_of(  # noqa: E731
        family, STEPS, cfg_type=cfg_type, frame_buffer_size=frames, use_denoising_batch=batched, prepare=prepare, **options
    )
    return make(True), make(False)


@pytest.mark.parametrize("frames", [slow(1), 3])
@pytest.mark.parametrize(
    ("family", "cfg_type"),
    [("sd3", mode) for mode in MODES]
    + [(family, mode) if mode == "full" else slow(family, mode) for family in ("flux", "instaflow") for mode in MODES],
)
def test_streamed_equals_sequential(family, frames, cfg_type, stream_of, picture):
    prepare = {**GUIDED, "true_cfg_scale": 2.5} if family == "flux" else GUIDED
    batch, loop = both(stream_of, family, cfg_type, frames, prepare)
    pictures = [picture(k) for k in range(6)]
    streamed_pictures = torch.stack([frame.image for frame in batch.frames(pictures)])
    one_by_one = torch.stack([frame.image for frame in loop.frames(pictures)])
    assert relative_error(streamed_pictures, one_by_one) <= 2e-4
    assert relative_error(one_by_one[:1], one_by_one[1:2]) > 2e-3


@pytest.mark.parametrize("cfg_type,extra", [("none", 0), ("full", 12), ("self", 0), ("initialize", 3)])
def test_extra_rows_a_call(cfg_type, extra, stream_of, picture):
    """0, S F, 0 and F, with S = 4 and F = 3."""
    stream = stream_of("sd3", STEPS, cfg_type=cfg_type, frame_buffer_size=3, prepare=GUIDED)
    stream.velocity = counter = CountRows(stream.velocity)
    list(stream.frames([picture(k) for k in range(6)]))
    assert set(counter.rows) == {12 + extra}
    assert stream.trt_unet_batch_size == 12 + extra


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("cfg_type", MODES)
def test_guidance_of_one_or_less_is_no_guidance_and_as_many_rows(cfg_type, guidance_scale, stream_of, picture):
    plain = stream_of("sd3", STEPS, prepare={**GUIDED, "guidance_scale": None})
    stream = stream_of("sd3", STEPS, cfg_type=cfg_type, prepare={**GUIDED, "guidance_scale": guidance_scale})
    rows = stream.trt_unet_batch_size
    expected, drawn = plain(picture()), stream(picture())
    assert relative_error(drawn, expected) <= 1e-5
    assert rows == stream_of("sd3", STEPS, cfg_type=cfg_type, prepare=GUIDED).trt_unet_batch_size


def test_self_is_exact_at_the_first_stage(stream_of, picture):
    """At stage 0 the residual velocity is noise - x0: one step with weight w is v_neg + w (v - v_neg) of that."""
    stream = stream_of("sd3", [2], cfg_type="self", prepare=GUIDED)
    pixels = stream.preprocess(picture())
    x0 = stream.codec.encode(pixels)
    noise = stream.init_noise[:1]
    x = stream.encode_image(pixels)
    _, v = stream_of("sd3", [2], prepare=GUIDED).unet_step(x, stream.sub_timesteps_tensor)
    expected = (noise - x0) + 2.5 * (v - (noise - x0))
    sigma = stream.beta_prod_t_sqrt
    assert relative_error(stream.predict_x0_batch(x, anchor=x0), x - sigma * expected) <= 1e-5


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("cfg_type", ["self", "initialize"])
def test_an_anchor_that_was_passed_in_stays_as_it_was(cfg_type, stages, stream_of, picture):
    stream = stream_of("sd3", range(2, 2 + stages), cfg_type=cfg_type, prepare=GUIDED)
    anchor = stream.codec.encode(stream.preprocess(picture()))
    before = anchor.clone()
    stream.predict_x0_batch(stream.encode_image(stream.preprocess(picture())), anchor=anchor)
    stream.flush()
    assert torch.equal(anchor, before)


def test_initialize_measures_the_negative_at_the_first_stage(stream_of, picture):
    """With one stage, initialize is full guidance."""
    full = stream_of("sd3", [2], cfg_type="full", prepare=GUIDED)
    once = stream_of("sd3", [2], cfg_type="initialize", prepare=GUIDED)
    assert relative_error(once(picture()), full(picture())) <= 1e-4


@pytest.mark.parametrize("cfg_type", ["self", "initialize"])
def test_delta_moderates_the_weight(cfg_type, stream_of, picture):
    """The weight in force is 1 + (w - 1) delta: delta 0 is none, and (w, delta) = (3, 0.5) is (2, 1)."""
    draw = lambda **kwargs: stream_of("sd3", STEPS, cfg_type=cfg_type, prepare={**GUIDED, **kwargs})(picture())  # noqa: E731
    none = stream_of("sd3", STEPS, prepare=GUIDED)(picture())
    assert relative_error(draw(delta=0.0), none) <= 1e-5
    assert torch.equal(draw(guidance_scale=3.0, delta=0.5), draw(guidance_scale=2.0, delta=1.0))
    assert relative_error(draw(guidance_scale=3.0), none) > 1e-3


def test_text_under_self_has_no_anchor_and_equals_none(stream_of, caplog):
    expected = stream_of("sd3")
    stream = stream_of("sd3", cfg_type="self", prepare={"guidance_scale": 3.0})
    for _ in range(3):
        assert torch.equal(stream.txt2img(), expected.txt2img())
    assert sum("no anchor" in message for message in caplog.messages) == 1


def test_the_default_weights(stream_of):
    """The pipeline's own under full, 1.2 under self and initialize; embedded guidance is never the weight."""
    assert stream_of("sd3", cfg_type="full").guidance_scale == 7.0
    assert stream_of("sd3", cfg_type="self").guidance_scale == 1.2
    assert stream_of("sd3", cfg_type="initialize").guidance_scale == 1.2
    flux = stream_of("flux", cfg_type="full", prepare={"guidance_scale": 2.5, "true_cfg_scale": 3.0})
    assert flux._denoiser.state.weight == 3.0
    assert stream_of("flux", cfg_type="full")._denoiser.state.weight == 1.0
    assert flux._denoiser.state.prompt.cond.rows["guidance"].tolist() == [2.5]


def test_renoising_streamed_equals_sequential_and_differs_from_euler(stream_of):
    """do_add_noise=True puts the frame's own noise back at every stage."""
    batch = stream_of("sd3", do_add_noise=True)
    loop = stream_of("sd3", do_add_noise=True, use_denoising_batch=False)
    euler = stream_of("sd3")
    drawn = streamed(batch, noises(batch, 5))
    assert relative_error(drawn, streamed(loop, noises(loop, 5))) <= 1e-5
    assert relative_error(drawn, streamed(euler, noises(euler, 5))) > 1e-3
