"""Ranks that compute for rank 0: real processes over gloo. Rows are those of one process, and a lost rank ends the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conftest import PROMPT, noises, relative_error, streamed
from torch import Tensor, nn

from streamflow.models.codec import Codec
from streamflow.models.row_by_row import RowByRow
from streamflow.parallel.distributed import RankLost, served
from streamflow.parallel.plan import shares

ROOT = Path(__file__).parents[1]
LIMIT = 60  # seconds after which a rank that should have ended is an error


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Net(nn.Module):
    """A decoder or a velocity. `acts`: by rank and number of its call, what the process does then."""

    def __init__(self, acts: dict[tuple[int, int], Callable[[], None]] | None = None, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(4, 3, 3, padding=1)
        self.acts, self.calls = acts or {}, 0

    def forward(
        self, x: Tensor, t: Tensor | None = None, *, text: Tensor | None = None, ids: Tensor | None = None
    ) -> Tensor:
        self.calls += 1
        self.acts.get((int(os.environ["RANK"]), self.calls), lambda: None)()
        out = self.conv(x)
        if t is not None:
            assert len(t) == len(text) == len(x) and ids.shape == (7,)
            out = out * t.reshape(-1, 1, 1, 1) + text.mean(dim=(1, 2)).reshape(-1, 1, 1, 1) + ids.sum()
        return out


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise MemoryError("this GPU is full")


def rank_main(rank: int, world: int, port: int, body: Callable, answer: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        torch.save(body(rank), answer)
    except (RuntimeError, ValueError, MemoryError) as error:
        torch.save(error, answer)
        os._exit(1)


def run(world: int, body: Callable, folder: Path, stopped: bool = False) -> tuple[list[int], list]:
    """(exit codes, what body(rank) returned or raised) of so many ranks. All of them must end by themselves; `stopped`: but
    for rank 1, which has stopped itself."""
    context, port = multiprocessing.get_context("fork"), free_port()
    files = [folder / f"rank{rank}.pt" for rank in range(world)]
    processes = [context.Process(target=rank_main, args=(r, world, port, body, files[r])) for r in range(world)]
    for process in processes:
        process.start()
    try:
        waited = [rank for rank in range(world) if not (stopped and rank == 1)]
        for rank in waited:
            processes[rank].join(LIMIT)
        late = [rank for rank in waited if processes[rank].exitcode is None]
        assert not late, f"ranks {late} did not end"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [p.exitcode for p in processes], [torch.load(f, weights_only=False) if f.exists() else None for f in files]


def inputs(n: int) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(n))


def on_rank_0(modules: dict[str, nn.Module], act: Callable, **options) -> Callable:
    """A body for `run`: what `act(remote)` returns on rank 0."""

    def body(rank: int):
        with torch.no_grad(), served(modules, **{"timeout": LIMIT, **options}) as remote:
            return None if remote is None else act(remote)

    return body


def by_shares(net: nn.Module, x: Tensor, workers: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(x[s.start : s.stop]) for s in shares(len(x), workers) if s])


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    monkeypatch.setenv("RANK", "-1")  # what this process itself computes acts on no one


def test_rows_are_those_of_one_process_to_the_bit(tmp_path):
    def act(remote):
        return {n: remote.decoder(inputs(n)) for n in (1, 2, 3, 7)}

    codes, (rows, *others) = run(3, on_rank_0({"decoder": Net()}, act), tmp_path)
    assert codes == [0, 0, 0] and others == [None, None]
    for n, images in rows.items():
        assert torch.equal(images, by_shares(Net(), inputs(n), 3))


def test_named_arguments_are_shared_by_row_and_others_stay_whole(tmp_path):
    def act(remote):
        text, ids = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(1)), torch.arange(7.0)
        return [(remote.velocity(inputs(7), torch.arange(7.0), text=text * k, ids=ids), text * k, ids) for k in (1, 2)]

    codes, results = run(2, on_rank_0({"velocity": Net()}, act, shared=("ids",)), tmp_path)
    assert codes == [0, 0]
    for v, text, ids in results[0]:
        torch.testing.assert_close(v, Net()(inputs(7), torch.arange(7.0), text=text, ids=ids))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.bool], ids=str
)
def test_every_dtype_and_layout_crosses_between_ranks(dtype, tmp_path):
    x = torch.arange(24).reshape(4, 2, 3).to(dtype)

    def act(remote):
        return remote.same(x.transpose(1, 2)), remote.same(x[:, :, :0])

    class Same(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return x, {"x": x}

    codes, results = run(2, on_rank_0({"same": Same()}, act), tmp_path)
    assert codes == [0, 0]
    for (first, second), expected in zip(results[0], (x.transpose(1, 2), x[:, :, :0]), strict=True):
        assert first.dtype == dtype and torch.equal(first, expected) and torch.equal(second["x"], expected)


def test_a_stream_draws_the_same_with_its_network_and_its_decoder_shared(stream_of, tmp_path):
    stream = stream_of("flux")
    alone = torch.cat([stream.decode_image(x) for x in streamed(stream, noises(stream, 5)).split(2)])

    def act(remote):
        stream.velocity = remote.velocity
        stream.codec = Codec.of(remote.decoder, stream.codec.encoder)
        latents = streamed(stream, noises(stream, 5))
        return torch.cat([stream.decode_image(x) for x in latents.split(2)])

    stream.prepare(PROMPT, num_inference_steps=4)
    modules = {"velocity": stream.velocity, "decoder": stream.codec.decoder}
    body = on_rank_0(modules, act, shared=stream.adapter.shared_inputs)
    codes, results = run(2, body, tmp_path)
    assert codes == [0, 0]
    assert relative_error(results[0], alone) < 1e-4


# -- a lost rank ends the run -----------------------------------------------------------------------------------------


def calls(n: int, rows: int = 7) -> Callable:
    return lambda remote: [remote.decoder(inputs(rows)) for _ in range(n)]


def test_a_killed_rank_ends_the_others_with_an_error_that_names_it(tmp_path):
    codes, results = run(4, on_rank_0({"decoder": Net({(2, 2): die})}, calls(4)), tmp_path)
    assert codes == [1, 1, -signal.SIGKILL, 1]
    lost = [str(error) for error in results if isinstance(error, RankLost)]
    assert [message.split(":")[0] for message in lost] == ["rank 2 is lost", "rank 0 is lost", "rank 0 is lost"]


def test_a_silent_rank_ends_the_others_within_the_timeout(tmp_path):
    start = time.monotonic()
    codes, results = run(3, on_rank_0({"decoder": Net({(1, 1): stop})}, calls(2), timeout=2.0), tmp_path, stopped=True)
    assert codes == [1, -signal.SIGKILL, 1] and time.monotonic() - start < 30
    assert "rank 1 is lost" in str(results[0]) and "rank 0 is lost" in str(results[2])


def test_a_killed_rank_0_ends_the_others_with_an_error(tmp_path):
    codes, results = run(3, on_rank_0({"decoder": Net({(0, 2): die})}, calls(2)), tmp_path)
    assert codes == [-signal.SIGKILL, 1, 1]
    for error in results[1:]:
        assert isinstance(error, RankLost) and "rank 0 is lost" in str(error) and "start all ranks again" in str(error)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_a_module_ends_all_ranks_and_stays_the_error_of_its_rank(rank, tmp_path):
    codes, results = run(3, on_rank_0({"decoder": Net({(rank, 2): fail})}, calls(3)), tmp_path)
    assert codes == [1, 1, 1]
    assert isinstance(results[rank], MemoryError) and "this GPU is full" in str(results[rank])
    assert all(isinstance(results[other], RankLost) for other in range(3) if other != rank)


def test_an_error_in_the_block_of_rank_0_ends_all_ranks(tmp_path):
    def act(remote):
        raise ValueError("no more prompts")

    codes, results = run(2, on_rank_0({"decoder": Net()}, act), tmp_path)
    assert codes == [1, 1]
    assert str(results[0]) == "no more prompts" and isinstance(results[1], RankLost)


def test_a_bad_batch_is_refused_before_anything_is_sent(tmp_path):
    def act(remote):
        for bad, error in ((torch.zeros(0, 4, 8, 8), "empty"), (torch.zeros(()), "batch"), ("text", "tensor")):
            with pytest.raises((ValueError, TypeError), match=error):
                remote.decoder(bad)
        with pytest.raises(AttributeError, match="encoder"):
            _ = remote.encoder
        return remote.decoder(inputs(2))

    codes, results = run(2, on_rank_0({"decoder": Net()}, act), tmp_path)
    assert codes == [0, 0] and torch.equal(results[0], by_shares(Net(), inputs(2), 2))


def test_ranks_with_other_weights_or_names_are_refused(tmp_path):
    def other_weights(rank):
        return on_rank_0({"decoder": Net(seed=rank)}, lambda remote: None)(rank)

    def other_names(rank):
        return on_rank_0({"decoder" if rank == 0 else "encoder": Net()}, lambda remote: None)(rank)

    for body in (other_weights, other_names):
        codes, results = run(2, body, tmp_path)
        assert codes == [1, 1]
        assert all(
            isinstance(error, ValueError) and "decoder on rank 1 is not as on rank 0" in str(error) for error in results
        )


@pytest.mark.parametrize(
    ("modules", "options", "message"),
    [
        ({"decoder": Net()}, {"timeout": 0}, "timeout"),
        ({"decoder": Net()}, {"timeout": float("inf")}, "timeout"),
        ({}, {}, "one module or more"),
        ({"velocity": RowByRow(Net(), pairs=True)}, {}, "pairs"),
        ({"decoder": Net()}, {}, "torchrun"),
    ],
)
def test_settings_that_cannot_be_are_refused(modules, options, message, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match=message), served(modules, **options):
        pass


# -- by torchrun ------------------------------------------------------------------------------------------------------

DRAW = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_parallel_distributed import Net, die, inputs
from streamflow.parallel.distributed import served
torch.set_num_threads(1)
with torch.no_grad(), served({"decoder": Net({(1, 3): die})}, timeout=20) as remote:
    if remote is None:
        sys.exit(0)
    while True:
        remote.decoder(inputs(4))
"""


@pytest.fixture
def torchrun():
    """`torchrun(arguments...)`: started, its output in one pipe; killed at the end of the test if it is still there."""
    started: list[subprocess.Popen] = []

    def start(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
        environment = {**{k: v for k, v in os.environ.items() if k != "RANK"}, "OMP_NUM_THREADS": "1"}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **output))
        return started[-1]

    yield start
    for one in started:
        for process in psutil.Process(one.pid).children(recursive=True) if one.poll() is None else ():
            process.kill()
        one.kill()
        one.wait()


def ended(*launched: subprocess.Popen) -> list[tuple[int, str]]:
    """(exit code, output) of each, once they have ended; none of their processes may be left."""
    seen: set[psutil.Process] = set()
    deadline = time.monotonic() + 240
    while any(one.poll() is None for one in launched) and time.monotonic() < deadline:
        for one in launched:
            if one.poll() is None:
                seen.update(psutil.Process(one.pid).children(recursive=True))
        time.sleep(0.1)
    left = psutil.wait_procs(seen, timeout=5)[1]
    late = [one.pid for one in launched if one.poll() is None]
    for process in left:
        process.kill()
    assert not late and not left, f"still there: {late or left}"
    return [(one.returncode, one.stdout.read()) for one in launched]


@pytest.mark.slow
def test_the_example_runs_by_torchrun(torchrun, tmp_path):
    sheet = tmp_path / "sheet.png"
    command = ("--nproc-per-node", 2, "--master-port", free_port(), "examples/torchrun_decode.py", "--output", sheet)
    ((code, output),) = ended(torchrun(*command, "--frames", 5))
    assert code == 0, output
    assert "5 images, the same to the bit: yes" in output and sheet.stat().st_size > 1000


@pytest.mark.slow
def test_a_killed_rank_ends_a_torchrun_with_an_error(torchrun, tmp_path):
    script = tmp_path / "draw.py"
    script.write_text(DRAW)
    ((code, output),) = ended(torchrun("--nproc-per-node", 3, "--master-port", free_port(), script, ROOT / "tests"))
    assert code != 0 and "SIGKILL" in output.upper().replace(" ", ""), output


@pytest.mark.slow
def test_a_killed_rank_of_another_torchrun_ends_the_run_of_rank_0(torchrun, tmp_path):
    """As on two machines, where each torchrun looks after its own processes."""
    script, port = tmp_path / "draw.py", free_port()
    script.write_text(DRAW)
    where = ("--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", port)
    nodes = [torchrun(*where, "--node-rank", node, script, ROOT / "tests") for node in range(2)]
    (code, output), (other, _) = ended(*nodes)
    assert code != 0 and other != 0 and "rank 1 is lost" in output, output


# -- by NCCL ----------------------------------------------------------------------------------------------------------

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

ON_GPUS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_parallel_distributed import Net, by_shares, inputs
from streamflow.parallel.distributed import local_device, served
device = local_device()
net, x = Net().to(device), inputs(5).to(device)
alone = by_shares(net, x, 2)
with torch.no_grad(), served({"decoder": net}, timeout=20) as remote:
    if remote is None:
        sys.exit(0)
    rows = [remote.decoder(x) for _ in range(3)]
    print("equal:", all(r.device == device and torch.allclose(r, alone, atol=1e-5) for r in rows))
"""


@pytest.mark.multi_gpu
@pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, and torch sees {GPUS}")
def test_two_gpus_share_rows_by_nccl(torchrun, tmp_path):
    script = tmp_path / "draw.py"
    script.write_text(ON_GPUS)
    ((code, output),) = ended(torchrun("--nproc-per-node", 2, "--master-port", free_port(), script, ROOT / "tests"))
    assert code == 0 and "equal: True" in output, output
