"""A VAE on several devices gives what one gives, in order, and stays whole when devices fail. They are the CPU, repeated."""

import copy
import gc
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import noises
from random_pipelines import random_tiny_vae
from torch import nn

from streamflow import parallel
from streamflow.acceleration import Part, Parts, check_options
from streamflow.acceleration.compile import Compiled
from streamflow.models.codec import Codec
from streamflow.parallel import ShardedVAE, decode, shard_vae
from streamflow.parallel.accelerated import accelerate
from streamflow.parallel.plan import shares
from streamflow.parallel.pool import DecodeError, Pool
from streamflow.parallel.replicas import check_memory, resolve_devices

THREE = ["cpu"] * 3


@pytest.fixture(scope="module")
def tiny():
    return random_tiny_vae(4).requires_grad_(False)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def in_shares(call, rows, k):
    """What one device gives for the shares of k, one after another."""
    return torch.cat([call(rows[share.start : share.stop]) for share in shares(len(rows), k) if len(share)])


class Odd(nn.Module):
    """A VAE whose copies can be told to be slow or to fail: `act` is called before each decode with the copy's number."""

    def __init__(self, vae, act):
        super().__init__()
        self.vae, self.act, self.number = vae, act, 0

    def __deepcopy__(self, memo):
        return Odd(copy.deepcopy(self.vae, memo), self.act)

    @property
    def dtype(self):
        return self.vae.dtype

    def decode(self, z, return_dict=True):
        self.act(self.number)
        return self.vae.decode(z, return_dict=return_dict)


def odd(vae, act, count=3, **settings):
    sharded = shard_vae(Odd(vae, act), ["cpu"] * count, **settings)
    for number, one in enumerate(sharded.replicas):
        one.number = number
    return sharded


# -- equal to one device -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,k", [(1, 3), (2, 3), (3, 3), (7, 3), (7, 2), (5, 1), (4, 7)])
def test_rows_are_those_of_one_device_to_the_bit(tiny, latents, n, k):
    expected = in_shares(lambda z: tiny.decode(z).sample, latents[:n], k)
    assert torch.equal(decode(tiny, latents[:n], ["cpu"] * k), expected)


def test_a_batch_is_cut_to_what_a_device_takes_at_once(tiny, latents):
    with shard_vae(tiny, ["cpu"] * 2, batch=1) as sharded:
        assert torch.equal(sharded.decode(latents).sample, torch.cat([tiny.decode(z).sample for z in latents.split(1)]))


def test_frames_come_back_in_order_whatever_takes_long(tiny, latents):
    generator = torch.Generator().manual_seed(1)
    pauses = torch.rand(200, generator=generator).mul(0.004).tolist()
    with odd(tiny, lambda number: time.sleep(pauses.pop())) as sharded:
        for _ in range(3):
            pending = [sharded.submit(z) for z in latents.split(1)]
            for z, one in zip(latents.split(1), pending, strict=True):
                assert torch.equal(one.result(), tiny.decode(z).sample)
                assert one.done() and one.latency_s > 0
            assert torch.equal(sharded.decode(latents).sample, in_shares(lambda z: tiny.decode(z).sample, latents, 3))


def _qwen():
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False])
    return vae, torch.rand(3, 3, 1, 16, 16) * 2 - 1


def _dc():
    from diffusers import AutoencoderDC

    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    return vae, torch.rand(3, 3, 16, 16) * 2 - 1


def _kl():
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **blocks)
    return vae, torch.rand(3, 3, 16, 16) * 2 - 1


def _tiny():
    return random_tiny_vae(4), torch.rand(3, 3, 32, 32)


@pytest.mark.parametrize("make", [_kl, _tiny, _dc, _qwen])
@torch.no_grad()
def test_every_kind_of_vae_keeps_its_own_outputs(make):
    torch.manual_seed(0)
    vae, pictures = make()
    vae.eval()
    sharded = shard_vae(vae, ["cpu"] * 2)
    encoded, plain = sharded.encode(pictures), vae.encode(pictures)
    assert type(encoded) is type(plain) and list(encoded) == list(plain)
    latents, expected = (
        out.latent_dist.mode() if "latent_dist" in out else out[0] for out in (encoded, vae.encode(pictures))
    )
    assert torch.allclose(latents, expected, atol=1e-5)
    decoded, plain = sharded.decode(latents), vae.decode(latents)
    assert type(decoded) is type(plain)
    assert torch.equal(decoded.sample, in_shares(lambda z: vae.decode(z).sample, latents, 2))
    assert torch.equal(sharded.decode(latents, return_dict=False)[0], decoded.sample)
    if "latent_dist" in encoded:
        assert type(encoded.latent_dist) is type(vae.encode(pictures).latent_dist)
        assert encoded.latent_dist.sample(torch.Generator().manual_seed(0)).shape == expected.shape


# -- in the place of the VAE -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_stream_takes_it_for_its_vae(stream_of, family, picture):
    stream = stream_of(family, frame_buffer_size=2)
    x = noises(stream, 2)
    expected = stream.decode_image(x), stream.codec.encode(stream.preprocess([picture(0), picture(1)]))
    stream.vae = shard_vae(stream.vae, THREE)
    assert (stream.decode_image(x) - expected[0]).abs().max() < 1e-4
    assert (stream.codec.encode(stream.preprocess([picture(0), picture(1)])) - expected[1]).abs().max() < 1e-4
    assert stream.txt2img().shape == (2, 3, 64, 64)


def test_a_codec_on_every_device_decodes_frames_whole(stream_of):
    stream = stream_of("flux")
    sharded = shard_vae(stream.vae, THREE)
    codec = sharded.codec_of(lambda vae: stream.adapter.codec(vae, 64, 64))
    x = noises(stream, 4)
    pending = [codec.decoder.submit(one) for one in x.split(1)]
    assert all(torch.equal(p.result(), stream.decode_image(one)) for p, one in zip(pending, x.split(1), strict=True))
    assert torch.equal(codec.decode(x), in_shares(stream.codec.decode, x, 3))


def test_switches_attributes_and_dtype_reach_every_copy_and_not_the_source(tiny, latents):
    sharded = shard_vae(tiny, THREE)
    assert (sharded.config, sharded.device, sharded.dtype) == (tiny.config, tiny.device, tiny.dtype)
    sharded.enable_tiling()
    assert [one.use_tiling for one in sharded.replicas] == [True] * 3 and not tiny.use_tiling
    sharded.tile_latent_min_size = 48
    assert [one.tile_latent_min_size for one in sharded.replicas] == [48] * 3 and tiny.tile_latent_min_size != 48
    sharded.disable_tiling()
    sharded.to(torch.float64)
    assert sharded.decode(latents.double()).sample.dtype == sharded.dtype == torch.float64 and tiny.dtype == torch.float32
    with pytest.raises(ValueError, match="stays on cpu, cpu, cpu"):
        sharded.to("meta")
    with pytest.raises(TypeError, match="sharded already"):
        shard_vae(sharded, THREE)
    assert {k: v.shape for k, v in sharded.state_dict().items()} == {k: v.shape for k, v in tiny.state_dict().items()}


def test_copies_share_nothing(tiny):
    sharded = shard_vae(tiny, THREE)
    tensors = [p for one in (tiny, *sharded.replicas) for p in one.state_dict().values()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    parts = [m for one in (tiny, *sharded.replicas) for m in one.modules()]
    assert len({id(m) for m in parts}) == len(parts)


# -- what cannot be is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "devices,message",
    [
        ([], "devices is empty"),
        (["gpu:7"], "unknown device 'gpu:7'"),
        (["meta"], "'meta' is not supported"),
        ([f"cuda:{torch.cuda.device_count()}"], f"torch sees {torch.cuda.device_count()} CUDA device"),
    ],
)
def test_devices_that_cannot_be(tiny, devices, message):
    with pytest.raises(ValueError, match=message):
        shard_vae(tiny, devices)


def test_one_device_and_all_of_them():
    cpu = torch.device("cpu")
    assert resolve_devices("cpu", cpu) == (cpu,)
    assert len(resolve_devices("all", cpu)) == max(1, torch.cuda.device_count())


@pytest.mark.parametrize("settings", [{"balance": "fair"}, {"batch": 0}, {"depth": 0}, {"output_device": "nowhere"}])
def test_settings_that_cannot_be(tiny, settings):
    with pytest.raises(ValueError, match="balance|batch|depth|nowhere"):
        shard_vae(tiny, THREE, **settings)


def test_empty_input_is_refused(tiny, latents):
    with shard_vae(tiny, THREE) as sharded:
        for act in (sharded.decode, sharded.encode, sharded.submit, lambda z: decode(tiny, z, THREE)):
            with pytest.raises(ValueError, match=r"empty, \[0, 4, 8, 8\]|no latents to decode"):
                act(latents[:0])


def test_memory_is_checked_before_and_offload_refused(tiny):
    large = nn.Linear(10**7, 10**7, device="meta", bias=False)
    with pytest.raises(MemoryError, match=r"2 x Linear on cpu needs 800,000,000,000,000 bytes.* are free"):
        check_memory(large, [torch.device("cpu")] * 2)
    vae = copy.deepcopy(tiny)
    vae.decoder._hf_hook = object()
    with pytest.raises(ValueError, match="offloaded by hooks"):
        shard_vae(vae, THREE)


# -- devices that fail -----------------------------------------------------------------------------------------------------


def failing(*numbers):
    def act(number):
        if number in numbers:
            raise torch.OutOfMemoryError(f"out of memory {number}")

    return act


@pytest.mark.parametrize("broken", [(0,), (1,), (0, 2)])
def test_the_others_do_what_a_failed_device_leaves(tiny, latents, caplog, broken):
    with odd(tiny, failing(*broken)) as sharded:
        assert torch.equal(sharded.decode(latents).sample, in_shares(lambda z: tiny.decode(z).sample, latents, 3))
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "is dropped" in r.getMessage()]
        assert len(warned) == len(broken)
        assert all(f"cpu (replica {i})" in "".join(warned) and f"out of memory {i}" in "".join(warned) for i in broken)
        assert len(sharded.devices) == 3 - len(broken) == sharded.lanes
        frames = [sharded.submit(z) for z in latents.split(1)]
        assert all(torch.equal(f.result(), tiny.decode(z).sample) for f, z in zip(frames, latents.split(1), strict=True))


def test_a_device_that_fails_amid_frames_loses_and_doubles_none(tiny, latents):
    calls = []

    def act(number):
        calls.append(number)
        time.sleep(0.001)
        if number == 1 and calls.count(1) == 3:
            raise RuntimeError("lost")

    with odd(tiny, act) as sharded:
        frames = [sharded.submit(z) for z in latents.repeat(4, 1, 1, 1).split(1)]
        results = torch.cat([f.result() for f in frames])
        assert torch.equal(results, torch.cat([tiny.decode(z).sample for z in latents.split(1)]).repeat(4, 1, 1, 1))
        assert len(calls) == 28 + 1
        assert list(sharded.dropped) == ["cpu (replica 1)"]


def test_when_all_fail_the_error_names_each_cause(tiny, latents):
    broken = {1}

    def act(number):
        if number in broken:
            raise ValueError(f"bad {number}")

    with odd(tiny, act) as sharded:
        sharded.decode(latents)
        broken.update({0, 2})
        with pytest.raises(DecodeError) as caught:
            sharded.decode(latents)
        for i in range(3):
            assert f"cpu (replica {i}): ValueError: bad {i}" in str(caught.value)
        broken.clear()
        assert sharded.decode(latents).sample.shape == (7, 3, 64, 64)


def test_a_bad_input_costs_no_device(tiny, latents):
    with shard_vae(tiny, THREE) as sharded:
        with pytest.raises(DecodeError, match="to have 4 channels, but got 3"):
            sharded.decode(latents[:, :3])
        assert sharded.lanes == 3 and not sharded.dropped


# -- queues and threads ----------------------------------------------------------------------------------------------------


def test_a_slow_decoder_holds_its_callers_and_grows_no_queue(tiny, latents):
    gate = threading.Semaphore(0)
    sharded = odd(tiny, lambda number: gate.acquire(), count=2, depth=2)
    pending = []
    submitted = threading.Thread(target=lambda: [pending.append(sharded.submit(latents[:1])) for _ in range(20)])
    submitted.start()
    deadline = time.perf_counter() + 20
    while len(pending) < 6 and time.perf_counter() < deadline:  # two in flight, two times two in queues
        time.sleep(0.001)
    submitted.join(0.05)
    assert len(pending) == 6 and sharded.pool.queued == 4 and submitted.is_alive()
    for done in range(1, 15):
        gate.release()
        while len(pending) < 6 + done and time.perf_counter() < deadline:
            time.sleep(0.001)
        assert sharded.pool.queued <= 4
    for _ in range(6):
        gate.release()
    submitted.join(20)
    assert len(pending) == 20 and all(p.result().shape == (1, 3, 64, 64) for p in pending)
    sharded.close()


def test_closing_finishes_what_is_queued_and_joins(tiny, latents):
    before = set(threading.enumerate())
    with shard_vae(tiny, THREE) as sharded:
        pending = [sharded.submit(z) for z in latents.split(1)]
    assert set(threading.enumerate()) <= before
    assert all(p.result().shape == (1, 3, 64, 64) for p in pending)
    with pytest.raises(RuntimeError, match="closed"):
        sharded.submit(latents)
    sharded.close()
    forgotten = shard_vae(tiny, THREE)
    forgotten.decode(latents)
    del forgotten
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_a_failure_while_closing_still_hands_its_job_over():
    def slow(value):
        time.sleep(0.02)
        return value

    def broken(value):
        time.sleep(0.02)
        raise RuntimeError("lost")

    pool = Pool([torch.device("cpu")] * 2)
    pending = [pool.submit([broken, slow], (i,)) for i in range(5)]
    pool.close()
    assert [p.result() for p in pending] == list(range(5))


ENDS = """
import sys, types
streamflow = sys.modules["streamflow"] = types.ModuleType("streamflow")  # its folder without what its import loads
streamflow.__path__ = [sys.argv[1]]
import torch
from streamflow.parallel.pool import Pool
pool = Pool([torch.device("cpu")] * 3)
kept = [pool.submit([lambda x: sys.stdout.write(f"{x} ")] * 3, (i,)) for i in range(6)]
"""


@pytest.mark.slow
def test_nothing_is_left_at_interpreter_end():
    folder = Path(parallel.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", ENDS, str(folder)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.split()) == list("012345")
    assert "Traceback" not in run.stderr


def test_measured_balance_gives_the_quick_device_more(tiny, latents):
    given = {0: 0, 1: 0}

    with odd(tiny, lambda number: time.sleep(0.3 * number), count=2, balance="measured") as sharded:
        for number, one in enumerate(sharded.replicas):
            plain = one.decode
            one.decode = lambda z, number=number, plain=plain, **k: (given.update({number: len(z)}), plain(z, **k))[1]
        sharded.decode(latents[:6])
        assert given == {0: 3, 1: 3}
        out = sharded.decode(latents[:6]).sample
        assert given[0] > given[1]
        assert torch.allclose(out, tiny.decode(latents[:6]).sample, atol=1e-5)


@pytest.mark.slow
def test_ten_thousand_frames_take_no_more_memory():
    vae = random_tiny_vae(4, blocks=2)
    z = torch.randn(1, 4, 4, 4)
    with shard_vae(vae, THREE) as sharded:

        def run(frames):
            waiting = []
            for _ in range(frames):
                waiting.append(sharded.submit(z))
                if len(waiting) > 3:
                    waiting.pop(0).result()
            [w.result() for w in waiting]
            gc.collect()
            return psutil.Process().memory_info().rss

        before = run(2_000)
        assert run(10_000) - before < 8 * 2**20
        assert sharded.pool.queued == 0


def test_it_is_a_sharded_vae_by_name(tiny):
    assert isinstance(parallel.shard_vae(tiny, "cpu"), ShardedVAE)
    with pytest.raises(AttributeError, match="it has RayModule, ShardedVAE, decode"):
        _ = parallel.nothing


# -- accelerated -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_copies_are_compiled_each_by_itself_and_put_back(latents):
    sharded = shard_vae(random_tiny_vae(4, blocks=2).requires_grad_(False), ["cpu"] * 2)
    codec = sharded.codec_of(Codec)
    velocity = Part("velocity", nn.Linear(4, 4).requires_grad_(False), {"x": torch.zeros(2, 4)})
    encoder = Part("encoder", codec.encoder, {"images": torch.zeros(2, 3, 8, 8)})
    parts = Parts(velocity, Part("decoder", codec.decoder, {"latents": latents[:2]}), encoder)
    before = [{k: v.clone() for k, v in one.state_dict().items()} for one in sharded.replicas]
    expected = codec.decode(latents)
    made = accelerate("compile", parts, check_options("compile", sharded.device, {"backend": "eager"}))
    decoder = made.modules["decoder"]
    assert all(isinstance(one, Compiled) for one in (*decoder.replicas, made.modules["velocity"]))
    assert {id(one.module) for one in decoder.replicas} == {id(one) for one in codec.decoder.replicas}
    assert set(made.seconds) == {"velocity", "decoder"}
    assert torch.allclose(decoder(latents), expected, atol=1e-5)
    assert torch.allclose(decoder.submit(latents[:1]).result(), expected[:1], atol=1e-5)
    made.undo()
    assert torch.equal(codec.decode(latents), expected)
    for one, old in zip(sharded.replicas, before, strict=True):
        assert all(torch.equal(v, old[k]) and v.stride() == old[k].stride() for k, v in one.state_dict().items())
