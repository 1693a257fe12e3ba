"""Frames on several devices in turn (`streamflow.parallel.interleave`). Here every device is the CPU, and each has a copy of
the network and a ring of its own."""

from __future__ import annotations

import logging
import random
from contextlib import suppress
from typing import Any

import pytest
import torch
from conftest import relative_error
from random_pipelines import random_pipeline
from random_pipelines.control import random_control

from streamflow import StreamFlow
from streamflow.parallel import interleave, shard_vae
from streamflow.stream.frames import Input

SIZE = 32
Image = torch.Tensor


def made(model: str = "sd3", steps: int = 3, devices: int = 0, size: int = SIZE, **options: Any) -> StreamFlow:
    options = {"cfg_type": "none", **options}
    family = "instaflow" if model == "instaflow" else None
    options |= {"family": family, "width": size, "height": size}
    stream = StreamFlow(random_pipeline(model), range(1, steps + 1), **options)
    guided = options["cfg_type"] != "none"
    stream.prepare("a", "b" if guided else "", num_inference_steps=steps + 1, guidance_scale=3.0 if guided else 1.0, seed=1)
    if devices:
        interleave(stream, ["cpu"] * devices)
    return stream


def picture(k: int, size: int = SIZE) -> Image:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(k))


def drawn(stream: StreamFlow, inputs: list[Any]) -> list[Image]:
    """The images of frames of these inputs, among which functions act between frames."""

    def given():
        for one in inputs:
            if callable(one):
                one(stream)
            else:
                yield one

    return [frame.wait().image for frame in stream.frames(given())]


def check_equal(inputs: list[Any], devices: int = 3, **options: Any) -> None:
    one, several = (drawn(made(devices=count, **options), inputs) for count in (0, devices))
    assert len(one) == len(several)
    assert all(map(torch.equal, one, several))


PICTURES: list[Any] = [picture(k) for k in range(8)]


@pytest.mark.parametrize(
    ("steps", "devices"),
    [(1, 2), (4, 3), *(pytest.param(s, d, marks=pytest.mark.slow) for s, d in [(1, 1), (2, 1), (2, 5), (4, 2), (4, 5)])],
)
def test_frames_are_those_of_one_ring_to_the_bit(steps, devices):
    check_equal(PICTURES, devices, steps=steps)


@pytest.mark.parametrize(
    "options",
    [
        {"frame_buffer_size": 2},
        {"use_denoising_batch": False},
        {"cfg_type": "full"},
        {"cfg_type": "self"},
        {"cfg_type": "initialize"},
        {"do_add_noise": True},
        {"noise": "constant"},
        {"noise": "interpolated"},
        {"model": "instaflow", "cfg_type": "full"},
        {"model": "flux"},
    ],
    ids=lambda one: "-".join(map(str, one.values())),
)
def test_whatever_the_options(options):
    check_equal([*PICTURES[:4], *[None] * 3], **options)


UPDATES = {
    "prompt": lambda s: s.update_prompt("another", scope="now"),
    "prompt of later frames": lambda s: s.update_prompt("another", scope="frame"),
    "levels": lambda s: s.update(t_index_list=[1, 3, 4], scope="now"),
    "levels of later frames": lambda s: s.update(t_index_list=[0, 1, 4], scope="frame"),
    "steps": lambda s: s.update(num_inference_steps=6, scope="now"),
    "guidance": lambda s: s.update(guidance_scale=5.0),
    "seed": lambda s: s.update(seed=7),
}


@pytest.mark.parametrize(
    ("batched", "cfg_type"),
    [
        (True, "full"),
        *(pytest.param(True, one, marks=pytest.mark.slow) for one in ("none", "self", "initialize")),
        *(pytest.param(False, one, marks=pytest.mark.slow) for one in ("none", "full")),
    ],
)
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_acts_on_the_steps_that_it_acts_on_in_one_ring(name, cfg_type, batched):
    change, again = UPDATES[name], UPDATES["prompt"]
    inputs = [*PICTURES[:3], change, PICTURES[3], again, *PICTURES[4:]]

    def stream(devices: int) -> StreamFlow:
        options = {"cfg_type": cfg_type, "use_denoising_batch": batched}
        one = StreamFlow(random_pipeline("sd3"), [0, 2, 4], width=SIZE, height=SIZE, **options)
        guided = {"negative_prompt": "b", "guidance_scale": 3.0} if cfg_type != "none" else {"guidance_scale": 1.0}
        one.prepare("a", num_inference_steps=5, seed=1, **guided)
        if devices:
            interleave(one, ["cpu"] * devices)
        return one

    alone, plain = (drawn(stream(count), inputs) for count in (0, 3)), drawn(stream(0), PICTURES)
    one, several = alone
    assert all(map(torch.equal, one, several))
    assert not all(map(torch.equal, one, plain))


def test_calls_return_the_image_of_all_rings_before():
    one, several = made(steps=3), made(steps=3, devices=2)
    first = [one(picture(k)).clone() for k in range(12)]
    later = [several(picture(k)).clone() for k in range(12)]
    assert several.calls_behind == 5
    assert torch.equal(later[0], first[0])
    ids = [one.frame_noise(k) for k in range(2)]
    assert not torch.equal(*ids)
    left = several.flush()
    assert len(left) == 5
    assert several.calls_behind == 0
    texts = made(steps=3).txt2img(4), made(steps=3, devices=2).txt2img(4)
    assert torch.equal(*texts)


def test_with_decoders_on_several_devices():
    stream = made(devices=2)
    stream.vae = shard_vae(stream.vae, ["cpu", "cpu"])
    assert all(map(torch.equal, drawn(stream, PICTURES[:5]), drawn(made(), PICTURES[:5])))


@pytest.mark.slow
def test_each_copy_is_compiled():
    stream, one = made(devices=2), made()
    for each in (stream, one):
        each.accelerate("compile", backend="eager", cuda_graph=False)
    assert stream.velocity.devices == (torch.device("cpu"),) * 2
    got, expected = drawn(stream, PICTURES[:5]), drawn(one, PICTURES[:5])
    assert relative_error(torch.stack(got), torch.stack(expected)) <= 1e-6


def masks(k: int) -> Image:
    mask = torch.zeros(SIZE, SIZE)
    mask[:, : 8 * (k % 4)] = 1
    return mask


def test_frames_with_conditions_of_their_own():
    check_equal([Input(picture(k), mask=masks(k)) if k % 3 else picture(k) for k in range(7)])
    cameras, styles = ([picture(first + k, 64) for k in range(7)] for first in (0, 9))
    check_equal([Input(cameras[k], reference=[styles[k]]) for k in range(7)], model="flux2-klein", size=64)


def test_rows_in_calls_of_different_sizes_differ_by_rounding():
    """Frames with and without a reference do not share a call of the network."""
    cameras, style = [picture(k, 64) for k in range(7)], picture(9, 64)
    inputs = [Input(cameras[k], reference=[style]) if k % 2 else cameras[k] for k in range(7)]
    one, several = (drawn(made("flux2-klein", devices=count, size=64), inputs) for count in (0, 3))
    assert relative_error(torch.stack(several), torch.stack(one)) <= 1e-5


class Broken(torch.nn.Module):
    """A replica that fails from its n-th call on."""

    def __init__(self, module: torch.nn.Module, after: int) -> None:
        super().__init__()
        self.module, self.left = module, after

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("device lost")
        return self.module(*args, **kwargs)


def test_a_device_that_fails_loses_no_frame(caplog):
    stream = made(devices=3)
    velocity = stream.velocity
    velocity.replicas[1] = Broken(velocity.replicas[1], 2)
    with caplog.at_level(logging.WARNING):
        got = drawn(stream, PICTURES)
    assert all(map(torch.equal, got, drawn(made(), PICTURES)))
    assert sum("failed, and cpu goes on with its frames: device lost" in one.message for one in caplog.records) == 1
    stream.reset()
    caplog.clear()
    assert all(map(torch.equal, drawn(stream, PICTURES), got))
    assert not caplog.records, "a device that has failed is not tried again"


def test_an_error_of_all_devices_is_raised_and_changes_nothing():
    stream, other = made(devices=2), made()
    got = []
    velocity, frames = stream.velocity, stream.frames(PICTURES)
    got.append(next(frames).wait().image)
    plain = list(velocity.replicas)
    for i in range(2):
        velocity.replicas[i] = Broken(plain[i], 0)
    with pytest.raises(RuntimeError, match="device lost"):
        next(frames)
    for i in range(2):
        velocity.replicas[i] = plain[i]
    left = torch.cat(stream.flush())
    expected = drawn(other, PICTURES)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(stream.decode_image(one[None])[0], image) for one, image in zip(left, expected[1:], strict=False))
    assert len(left) >= 4


def test_steps_are_seen_and_an_error_there_loses_nothing():
    seen: list[tuple[int, ...]] = []
    stream = made(devices=2)
    stream.on_step(lambda step: seen.append(step.ids))
    expected = drawn(stream, PICTURES[:4])
    assert len(expected) == 4
    assert {i for ids in seen for i in ids if i is not None} >= {0, 1, 2, 3}


@pytest.mark.parametrize("batched", [True, False])
def test_an_error_of_on_steps_function_is_no_failure_of_a_device(batched, caplog):
    stream, calls = made(devices=2, use_denoising_batch=batched), []

    def fail(step: Any) -> None:
        calls.append(step)
        raise KeyError("mine")

    stream.on_step(fail)
    with pytest.raises(KeyError, match="mine"):
        stream(picture(0))
    assert len(calls) == 1 and not any("failed" in one.message for one in caplog.records)


def test_weights_that_are_written_reach_all_copies():
    stream, one = made(devices=2), made()
    for each in (stream, one):
        with torch.no_grad():
            next(each.unet.parameters()).mul_(0.5)
    assert all(map(torch.equal, drawn(stream, PICTURES[:4]), drawn(one, PICTURES[:4])))


def test_it_ends_and_other_devices_may_follow():
    stream = made(devices=3)
    expected = drawn(stream, PICTURES[:4])
    stream.reset()
    interleave(stream, ["cpu", "cpu"])
    assert all(map(torch.equal, drawn(stream, PICTURES[:4]), expected))
    stream.reset()
    stream.velocity = stream.velocity.source
    assert all(map(torch.equal, drawn(stream, PICTURES[:4]), expected))
    stream.prepare("c", num_inference_steps=4)
    assert stream.calls_behind == 0


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda s: s.update(feedback=0.3), ValueError, "do not wait for each other: use feedback=0"),
        (lambda s: interleave(s, []), ValueError, "devices is empty"),
        (lambda s: (s(picture(0)), interleave(s, ["cpu"])), RuntimeError, "are in flight: flush"),
        (
            lambda s: (s(picture(0)), s(picture(1)), setattr(s, "velocity", s.velocity.source)),
            RuntimeError,
            "1 frames are in",
        ),
    ],
)
def test_what_cannot_be_is_refused(act, error, message):
    stream = made(devices=2)
    with pytest.raises(error, match=message):
        act(stream)
    stream.reset()
    assert all(map(torch.equal, drawn(stream, PICTURES[:3]), drawn(made(), PICTURES[:3])))


def test_a_stream_with_feedback_is_refused():
    stream = made(feedback=0.3)
    with pytest.raises(ValueError, match="update\\(feedback=0\\) first"):
        interleave(stream, ["cpu", "cpu"])
    stream.update(feedback=0.0)
    interleave(stream, ["cpu", "cpu"])


def test_control_nets_are_copied_with_the_network():
    drawings = []
    for devices in (0, 2):
        stream = made()
        stream.add_control("edges", random_control(stream.pipe.transformer))
        if devices:
            interleave(stream, ["cpu"] * devices)
        drawings.append(drawn(stream, [Input(picture(k), control={"edges": picture(9 + k)}) for k in range(5)]))
    one, several = drawings
    assert all(map(torch.equal, one, several))
    assert not torch.equal(one[4], drawn(made(), PICTURES[:5])[4])


def random_update(dice: random.Random) -> Any:
    """A function that changes what a stream draws."""
    scope, steps = dice.choice(["now", "frame"]), dice.choice([[1, 3, 4], [0, 2, 4], [2, 3, 4]])
    changes: list[dict[str, Any]] = [
        {"prompt": dice.choice(["a", "b", "a fox"]), "scope": scope},
        {"prompt": [("a", 0.3), ("b", 0.7)], "scope": scope},
        {"guidance_scale": dice.choice([1.0, 2.0, 5.0]), "scope": scope},
        {"t_index_list": steps, "scope": scope},
        {"num_inference_steps": dice.choice([5, 6, 7]), "scope": scope},
        {"strength": dice.choice([0.4, 0.6, 0.8]), "scope": scope},
        {"noise": dice.choice(["constant", "frame", "interpolated"])},
        {"cfg_type": dice.choice(["none", "full", "self", "initialize"])},
        {"seed": dice.randrange(9)},
        {"delta": dice.choice([0.5, 1.0])},
        {"do_add_noise": dice.random() < 0.5},
    ]
    chosen = dice.choice(changes)
    return lambda stream: stream.update(**chosen)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_updates_give_what_one_ring_gives(seed):
    def images(devices: int) -> list[Image]:
        dice = random.Random(seed)
        cfg_type, frames = dice.choice(["none", "full", "self", "initialize"]), dice.choice([1, 1, 2])
        options = {"cfg_type": cfg_type, "frame_buffer_size": frames}
        stream = StreamFlow(random_pipeline("sd3"), [1, 3, 4], width=SIZE, height=SIZE, **options)
        guided = {} if cfg_type == "none" else {"negative_prompt": "n", "guidance_scale": 3.0}
        stream.prepare("a", num_inference_steps=5, seed=1, **guided)
        if devices:
            interleave(stream, ["cpu"] * devices)
        inputs: list[Any] = []
        for k in range(dice.randrange(6, 14)):
            inputs += [refusable(random_update(dice)) for _ in range(dice.choice([0, 0, 1, 2]))]
            inputs.append(dice.choice([None, Input(picture(k), mask=masks(k)), picture(k), picture(k)]))
        return drawn(stream, inputs)

    assert all(map(torch.equal, images(0), images(2 + seed % 3)))


def refusable(update: Any) -> Any:
    """An update that may be refused, as with another number of steps at once."""

    def act(stream: StreamFlow) -> None:
        with suppress(ValueError):
            update(stream)

    return act


def test_what_belongs_to_one_ring_is_refused():
    stream = made(devices=2, cfg_type="self")
    stream(picture(0)[None])
    for read in (
        lambda: stream.x_t_latent_buffer,
        lambda: stream.stock_noise,
        lambda: stream.unet_step(stream.frame_noise(0).expand(3, -1, -1, -1), stream.sub_timesteps_tensor),
    ):
        with pytest.raises(RuntimeError, match="belongs to one ring, and this stream draws on 2 devices in turn"):
            read()
    stream.reset()
    stream.velocity = stream.velocity.source
    assert stream.x_t_latent_buffer is not None


def test_a_device_that_works_again_counts_as_working():
    stream = made(devices=2, steps=2)
    failing = []

    def fail(number: int):
        def hook(module, inputs):
            if failing == [number]:
                failing.clear()
                raise RuntimeError("no memory")

        return hook

    for i, one in enumerate(stream.velocity.replicas):
        one.register_forward_pre_hook(fail(i))
    plain = drawn(made(steps=2), PICTURES)
    images = []
    for k, frame in enumerate(stream.frames(one for one in PICTURES)):
        images.append(frame.wait().image)
        if k in (0, 3):
            failing.append(1 if k == 0 else 0)
    assert all(map(torch.equal, images, plain))
    assert not stream._denoiser.engine._failed
    stream.reset()
    assert all(map(torch.equal, drawn(stream, PICTURES[:3]), drawn(made(steps=2), PICTURES[:3])))
