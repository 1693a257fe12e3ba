"""Sharded decoding on real GPUs: the same images, no wait in the caller, order and memory kept."""

import gc

import pytest
import torch
from conftest import cuda_memory, never_waiting, noises, relative_error, streamed
from random_pipelines import random_pipeline, random_tiny_vae

from streamflow.parallel import decode, decode_tiled, interleave, shard_denoiser, shard_vae
from streamflow.parallel.plan import shares
from streamflow.parallel.replicas import check_memory
from streamflow.parallel.tiles import psnr, reach_of

pytestmark = pytest.mark.usefixtures("full_float32")
GPUS = torch.cuda.device_count()
one_gpu = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device, and torch sees none")]
two_gpus = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, and torch sees {GPUS}"),
]
DEVICES = [
    pytest.param(["cuda:0"] * 2, marks=one_gpu),
    pytest.param(["cuda:0", "cpu"], marks=one_gpu),
    pytest.param(["cuda:0", "cuda:1"], marks=two_gpus),
    pytest.param(["cuda:0", "cuda:1", "cpu"], marks=two_gpus),
]
CUDA_ONLY = [DEVICES[0], DEVICES[2]]


@pytest.fixture
def kl():
    return random_pipeline("sd3").vae.to("cuda:0").requires_grad_(False)


@pytest.fixture
def latents():
    return torch.randn(7, 16, 16, 16, generator=torch.Generator().manual_seed(0)).to("cuda:0")


def in_shares(vae, z, k):
    with torch.no_grad():
        return torch.cat([vae.decode(z[s.start : s.stop]).sample for s in shares(len(z), k) if len(s)])


@pytest.mark.parametrize("devices", CUDA_ONLY)
def test_rows_are_those_of_one_gpu_to_the_bit(kl, latents, devices):
    for n in (1, 2, 7):
        out = decode(kl, latents[:n], devices)
        assert out.device == latents.device
        assert torch.equal(out, in_shares(kl, latents[:n], len(devices)))


@pytest.mark.parametrize("devices", DEVICES)
def test_unlike_devices_and_the_place_of_the_result(kl, latents, devices):
    expected = in_shares(kl, latents, len(devices))
    for where in ("cpu", devices[-1]):
        out = decode(kl, latents, devices, output_device=where)
        assert out.device == torch.device(where)
        assert torch.allclose(out.to(expected.device), expected, atol=2e-3)
    assert torch.allclose(decode(kl, latents.cpu(), devices), expected.cpu(), atol=2e-3)


@pytest.mark.parametrize("devices", CUDA_ONLY)
def test_encoding_is_shared_too(kl, devices):
    pictures = torch.rand(5, 3, 64, 64, device="cuda:0") * 2 - 1
    with torch.no_grad(), shard_vae(kl, devices) as sharded:
        a, b = sharded.encode(pictures).latent_dist, kl.encode(pictures).latent_dist
    assert torch.allclose(a.mode(), b.mode(), atol=2e-3) and a.mode().device == pictures.device


@pytest.mark.parametrize("devices", DEVICES)
def test_frames_in_order_while_latents_and_results_come_and_go(kl, latents, devices):
    """Memory is given back and taken anew at once: streams that did not wait for each other would show here."""
    expected = [in_shares(kl, z, 1) for z in latents.split(1)]
    with shard_vae(kl, devices) as sharded:
        for round_ in range(4):
            pending = []
            for k in range(7):
                z = latents[k : k + 1] * 1.0
                pending.append(sharded.submit(z))
                del z
                torch.randn(1, 16, 16, 16, device="cuda:0").mul_(1e6)
            for k, one in enumerate(pending):
                picture = one.result()
                assert torch.allclose(picture.to("cuda:0"), expected[k], atol=2e-3), (round_, k)
                assert one.latency_s > 0
                del picture


@pytest.mark.parametrize("devices", [DEVICES[2]])
def test_an_image_stays_where_it_was_decoded(kl, latents, devices):
    with shard_vae(kl, devices) as sharded:
        out = [sharded.submit(z) for z in latents.split(1)[:2]]
        assert [p.result().device for p in out] == [torch.device(d) for d in devices]


@pytest.mark.parametrize("devices", CUDA_ONLY)
def test_the_caller_never_waits_for_a_gpu(kl, latents, devices):
    with shard_vae(kl, devices) as sharded:
        [sharded.submit(z).result() for z in latents.split(1)]
        sharded.decode(latents)
        for device in range(GPUS):
            torch.cuda.synchronize(device)
        torch.cuda._sleep(10**9)  # about half a second on this stream, behind which the latents are
        z = latents * 1.0
        torch.cuda.set_sync_debug_mode("error")
        try:
            pending = sharded.submit(z[:1])
            pending.result()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not pending.done()
        assert torch.allclose(pending.result().to("cuda:0"), in_shares(kl, z[:1], 1), atol=2e-3)


@pytest.mark.parametrize("devices", [DEVICES[2]])
def test_the_denoising_stream_is_not_held_by_decodes_elsewhere(kl, latents, devices):
    """Work on the caller's stream ends while the other GPU still decodes."""
    with shard_vae(kl, ["cuda:1"], depth=8) as sharded:
        sharded.submit(latents).result()
        torch.cuda.synchronize(1)
        plain = sharded.replicas[0].decode

        def slow(*args, **kwargs):
            torch.cuda._sleep(2 * 10**9)
            return plain(*args, **kwargs)

        sharded.replicas[0].decode = slow
        pending = [sharded.submit(latents[:1]) for _ in range(2)]
        own = torch.cuda.current_stream(0).record_event()
        own.synchronize()
        assert not pending[1].done()
        assert pending[1].result().shape == (1, 3, 128, 128)


@pytest.mark.parametrize("devices", CUDA_ONLY)
def test_frames_take_no_more_memory(kl, latents, devices):
    with shard_vae(kl, devices) as sharded:

        def run(n):
            waiting = []
            for _ in range(n):
                waiting.append(sharded.submit(latents[:1]))
                if len(waiting) > len(devices):
                    waiting.pop(0).result()
            [w.result() for w in waiting]
            waiting.clear()
            gc.collect()
            return cuda_memory()[0], sum(torch.cuda.memory_reserved(d) for d in range(GPUS))

        allocated, reserved = run(200)
        after = run(600)
        assert after[0] == allocated and after[1] <= reserved + 64 * 2**20


@pytest.mark.parametrize("devices", CUDA_ONLY)
def test_a_gpu_out_of_memory_is_dropped(kl, latents, devices, caplog):
    with shard_vae(kl, devices) as sharded:

        def full(*args, **kwargs):
            return torch.empty(2**50, device="cuda:0")

        sharded.replicas[1].decode = full
        assert torch.equal(sharded.decode(latents).sample, in_shares(kl, latents, len(devices)))
        assert "OutOfMemoryError" in caplog.text and sharded.lanes == 1


@pytest.mark.parametrize("devices", CUDA_ONLY)
def test_tiles_are_the_whole_decode(devices):
    vae = random_tiny_vae(4).to("cuda:0").requires_grad_(False)
    z = torch.randn(1, 4, 72, 96, device="cuda:0")
    assert reach_of(vae, z[..., :1, :1]).local
    whole = vae.decode(z).sample
    for tile in (20, "auto"):
        tiled = decode(vae, z, devices, tile=tile)
        assert tiled.device == z.device and torch.allclose(tiled, whole, atol=1e-4)


@pytest.mark.parametrize("devices", CUDA_ONLY)
def test_kl_tiles_are_near_the_whole_decode(kl, devices):
    z = torch.nn.functional.interpolate(torch.randn(1, 16, 8, 8, device="cuda:0"), size=(64, 64), mode="bicubic")
    with shard_vae(kl, devices) as sharded, torch.no_grad():
        tiled = decode_tiled(sharded, z)
        assert psnr(tiled, kl.decode(z).sample) > 20


@pytest.mark.parametrize("devices", CUDA_ONLY)
@pytest.mark.parametrize("kind", ["cuda-graph", "compile"])
def test_accelerated_copies_draw_the_same(cuda_stream, devices, kind):
    from streamflow.acceleration import Parts, check_options
    from streamflow.parallel.accelerated import accelerate

    stream = cuda_stream("sd3")
    sharded = shard_vae(stream.vae, devices)
    codec = sharded.codec_of(lambda vae: stream.adapter.codec(vae, 64, 64))
    x = noises(stream, 4)
    expected = codec.decode(x)
    pictures = torch.zeros(1, 3, 64, 64, device="cuda:0")
    parts = Parts.of(stream.adapter, codec, stream.parts().velocity.inputs, x[:1], pictures)
    made = accelerate(kind, parts, check_options(kind, stream.device, {}))
    decoder = made.modules["decoder"]
    for _ in range(3):
        assert (decoder(x) - expected).abs().max() <= 4 / 255
        frames = [decoder.submit(one) for one in x.split(1)]
        assert all(
            (f.result().to("cuda:0") - e).abs().max() <= 4 / 255 for f, e in zip(frames, expected.split(1), strict=True)
        )
    made.undo()
    assert torch.equal(codec.decode(x), expected)


@pytest.mark.parametrize("n", [pytest.param(1, marks=one_gpu)])
def test_memory_is_checked_with_numbers(n):
    large = torch.nn.Linear(10**7, 10**7, device="meta", bias=False)
    with pytest.raises(MemoryError, match=r"1 x Linear on cuda:0 needs 400,000,000,000,000 bytes"):
        check_memory(large, [torch.device("cuda", 0)] * n)


def drawn(stream):
    return streamed(stream, noises(stream, 6)).float()


@pytest.mark.parametrize("devices", CUDA_ONLY)
@pytest.mark.parametrize("kind", ["none", "cuda-graph", "compile"])
@pytest.mark.parametrize("family,cfg_type", [("sd3", "full"), ("flux", "none"), ("instaflow", "initialize")])
def test_rows_over_gpus_are_those_of_one(cuda_stream, devices, kind, family, cfg_type):
    guided = {} if cfg_type == "none" else {"guidance_scale": 3.0, "negative_prompt": "blurry"}
    stream = cuda_stream(family, cfg_type=cfg_type, prepare=guided)
    plain = drawn(stream)
    sharded = shard_denoiser(stream, devices)
    stream.accelerate(kind)
    for _ in range(2):
        assert relative_error(drawn(stream), plain) < 1e-3
    stream.accelerate("none")
    stream.velocity = sharded.source
    assert torch.equal(drawn(stream), plain)


@pytest.mark.parametrize("spread", [shard_denoiser, interleave])
@pytest.mark.parametrize("devices", CUDA_ONLY)
def test_a_tick_on_several_devices_never_waits(cuda_stream, devices, spread):
    stream = cuda_stream("sd3")
    spread(stream, devices)
    stream.accelerate("cuda-graph")
    drawn(stream)
    stream.prepare("a red apple", num_inference_steps=4)
    noise = noises(stream, 24).split(1)
    for one in noise[:12]:
        stream.predict_x0_batch(one)
    with never_waiting():
        for one in noise[12:]:
            stream.predict_x0_batch(one)


@pytest.mark.parametrize("spread", [shard_denoiser, interleave])
@pytest.mark.parametrize("devices", CUDA_ONLY)
def test_denoiser_and_vae_together_keep_every_frame(cuda_stream, picture, devices, spread):
    stream = cuda_stream("sd3")
    plain = [frame.image.clone() for frame in stream.frames(picture(k) for k in range(9))]
    stream.prepare("a red apple, 3d render", num_inference_steps=4)
    spread(stream, devices)
    with shard_vae(stream.vae, devices) as stream.vae:
        stream.accelerate("cuda-graph")
        frames = list(stream.frames(picture(k) for k in range(9)))
        assert [frame.id for frame in frames] == list(range(9))
        for frame, expected in zip(frames, plain, strict=True):
            assert (frame.wait().image.to("cuda:0") - expected).abs().max() <= 4 / 255


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("kind", ["none", "cuda-graph", "compile"])
@pytest.mark.parametrize("family,cfg_type", [("sd3", "full"), ("instaflow", "initialize")])
def test_frames_in_turn_are_those_of_one_gpu(cuda_stream, picture, devices, kind, family, cfg_type):
    guided = {"guidance_scale": 3.0, "negative_prompt": "blurry"}
    stream = cuda_stream(family, cfg_type=cfg_type, prepare=guided)

    def inputs():
        for k in range(9):
            if k == 5:
                stream.update_prompt("a green apple", scope="now")
            yield picture(k)

    def images():
        stream.prepare("a red apple, 3d render", num_inference_steps=4, **guided)
        return torch.stack([frame.wait().image.to("cuda:0") for frame in stream.frames(inputs())])

    plain = images()
    interleaved = interleave(stream, devices)
    stream.accelerate(kind)
    for _ in range(2):
        assert relative_error(images(), plain) < 1e-3
    stream.accelerate("none")
    stream.velocity = interleaved.source
    assert torch.equal(images(), plain)
