"""The denoising batch over several devices is that of one, whatever changes meanwhile. Repeated devices stand for many."""

import copy

import pytest
import torch
from conftest import noises, relative_error, slow, streamed
from random_pipelines import random_pipeline
from torch import nn

from streamflow import StreamFlow
from streamflow.parallel import shard_denoiser, shard_vae
from streamflow.parallel.rows import CACHED_INPUTS, InputCache, ShardedVelocity

GUIDED = {"guidance_scale": 3.0, "negative_prompt": "blurry"}


def own_stream(family="sd3", cfg_type="none", frames=1, prepare=None):
    """A stream over a pipeline of its own, whose weights a test may change."""
    stream = StreamFlow(random_pipeline(family), range(4), cfg_type=cfg_type, frame_buffer_size=frames)
    stream.prepare("a red apple", num_inference_steps=4, **(prepare or {}))
    return stream


def both(stream, devices, n=6):
    """The same frames by one device and by these."""
    plain = streamed(stream, noises(stream, n))
    sharded = shard_denoiser(stream, devices)
    return plain, streamed(stream, noises(stream, n)), sharded


@pytest.mark.parametrize(
    "family,cfg_type,frames",
    [("sd3", "none", 1), ("sd3", "full", 2), ("flux", "none", 2), ("instaflow", "initialize", 2), ("sd3", "self", 1)],
)
@pytest.mark.parametrize("count", [slow(2), 3])
def test_the_result_is_that_of_one_device(stream_of, family, cfg_type, frames, count):
    guided = {"cfg_type": cfg_type, "prepare": {} if cfg_type == "none" else GUIDED}
    stream = stream_of(family, frame_buffer_size=frames, **guided)
    plain, over_all, sharded = both(stream, ["cpu"] * count)
    assert relative_error(over_all, plain) < 1e-5
    assert stream.velocity is sharded and len({id(one) for one in sharded.replicas}) == count
    stream.velocity = sharded.source
    assert torch.equal(streamed(stream, noises(stream, 6)), plain)


@pytest.mark.parametrize("cfg_type", ["none", "full"])
def test_row_by_row_it_is_equal_to_the_bit(stream_of, cfg_type):
    """A row and its negative twin stay together: the reference forward calls the network with both."""
    stream = stream_of("sd3", cfg_type=cfg_type, prepare=GUIDED if cfg_type == "full" else {})
    stream.velocity = stream.adapter.row_by_row(guided=cfg_type == "full")
    plain, over_all, _ = both(stream, ["cpu"] * 3)
    assert torch.equal(over_all, plain)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("pairs", [False, True])
def test_any_number_of_rows_over_any_number_of_devices(n, pairs):
    class Twice(nn.Module):
        def forward(self, x, t, prompt, scale):
            seen.append(len(x))
            return 2 * x + t[:, None] + prompt * scale

    seen = []
    plain = Twice()
    sharded = ShardedVelocity(plain, [plain, *(Twice() for _ in range(3))], [torch.device("cpu")] * 4, {"scale"}, pairs)
    x, t, prompt, scale = torch.randn(n, 3), torch.arange(n).float(), torch.randn(n, 3), torch.tensor([0.5])
    assert torch.equal(sharded(x, t, prompt=prompt, scale=scale), 2 * x + t[:, None] + prompt * scale)
    assert sum(seen) == n and max(seen) - min(seen) <= (2 if pairs and n % 2 == 0 else 1)
    for i in range(4):  # a device that gets no row can be started all the same
        given = sharded.inputs_of(i, {"x": x, "t": t, "prompt": prompt, "scale": scale})
        assert len(given["x"]) == len(given["t"]) == len(given["prompt"]) > 0 and len(given["scale"]) == 1


def test_prompts_guidance_and_steps_change_as_on_one_device(stream_of):
    def drawn(stream):
        found = [streamed(stream, noises(stream, 5))]
        stream.update(prompt="a green pear", guidance_scale=5.0)
        found.append(streamed(stream, noises(stream, 5)))
        stream.update(t_index_list=[0, 2])
        return torch.cat([*found, streamed(stream, noises(stream, 5))])

    one, many = (stream_of("sd3", cfg_type="full", prepare=GUIDED) for _ in range(2))
    shard_denoiser(many, ["cpu"] * 3)
    assert relative_error(drawn(many), drawn(one)) < 1e-5


def test_what_was_sent_is_not_sent_again():
    cache, rows = InputCache(torch.device("cpu")), (range(0, 2),)
    prompt = torch.zeros(4, 3)
    first = cache.get(prompt, rows)
    assert cache.get(prompt, rows) is first
    prompt.add_(1)
    changed = cache.get(prompt, rows)
    assert changed is not first and torch.equal(changed, torch.ones(2, 3))
    for _ in range(3 * CACHED_INPUTS):
        cache.get(torch.zeros(1), None)
    assert len(cache._kept) == CACHED_INPUTS


def test_weights_written_in_place_reach_every_copy():
    stream = own_stream()
    sharded = shard_denoiser(stream, ["cpu"] * 3)
    before = streamed(stream, noises(stream, 6))
    with torch.no_grad():
        stream.unet.proj_out.weight.mul_(2)
    after = streamed(stream, noises(stream, 6))
    stream.velocity = sharded.source
    assert not torch.equal(after, before)
    assert relative_error(after, streamed(stream, noises(stream, 6))) < 1e-5


def test_an_adapter_asks_to_shard_anew():
    from peft import LoraConfig

    stream = own_stream()
    shard_denoiser(stream, ["cpu"] * 2)
    stream.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    with pytest.raises(RuntimeError, match="have changed since.*shard_denoiser"):
        streamed(stream, noises(stream, 1))
    sharded = shard_denoiser(stream, ["cpu"] * 2)
    stream.flush()  # the frame that came in with the refused tick
    styled = streamed(stream, noises(stream, 4))
    stream.velocity = sharded.source
    assert relative_error(styled, streamed(stream, noises(stream, 4))) < 1e-5


@pytest.mark.slow
def test_copies_are_accelerated_each_by_itself_and_the_vae_with_them(stream_of, picture):
    """torch.compile without a code generator: what is compiled, where, and that all of it is undone."""
    stream = stream_of("sd3", [1, 2, 3])
    plain = [stream(picture(k)) for k in range(4)]
    stream.prepare("a red apple, 3d render", num_inference_steps=4)
    vae, weights = stream.vae, copy.deepcopy(stream.unet.state_dict())
    shard_denoiser(stream, ["cpu"] * 2)
    with shard_vae(vae, ["cpu"] * 3) as sharded_vae:
        stream.vae = sharded_vae
        stream.accelerate("compile", backend="eager")
        assert len(stream.velocity.replicas) == 2 and len(stream.codec.decoder.replicas) == 3
        assert all(type(one).__name__ == "Compiled" for one in (*stream.velocity.replicas, *stream.codec.decoder.replicas))
        drawn = [stream(picture(k)) for k in range(4)]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(drawn, plain, strict=True))
        stream.accelerate("none")
        stream.vae = vae
    assert isinstance(stream.velocity, ShardedVelocity)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), stream.unet.state_dict().values(), strict=True))


def test_frames_keep_their_order_and_number_with_a_sharded_vae(stream_of, picture):
    stream = stream_of("sd3")
    plain = list(stream.frames(picture(k) for k in range(9)))
    stream.prepare("a red apple, 3d render", num_inference_steps=4)
    vae = stream.vae
    with shard_vae(vae, ["cpu"] * 3) as stream.vae:
        shard_denoiser(stream, ["cpu"] * 2)
        frames = list(stream.frames(picture(k) for k in range(9)))
        assert [f.id for f in frames] == list(range(9)) == [f.id for f in plain]
        assert all(torch.allclose(a.image, b.image, atol=1e-4) for a, b in zip(frames, plain, strict=True))
        assert all(f.ready() and f.latency_s > 0 for f in frames)
    stream.vae = vae


def test_devices_that_cannot_be_leave_the_stream_as_it_was(stream_of):
    stream = stream_of("sd3")
    before = stream.velocity
    for devices, message in (([], "devices is empty"), (["tpu:0"], "unknown device"), (["cuda:99"], "torch sees")):
        with pytest.raises(ValueError, match=message):
            shard_denoiser(stream, devices)
    assert stream.velocity is before
