"""Ranks that compute for rank 0: real processes over gloo. What comes back is what one process computes, in order, whoever
dies on the way."""

from __future__ import annotations

import logging
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
from streamflow.parallel.distributed import RankLost, served, wire
from streamflow.parallel.distributed.wire import DTYPES, RECORD, Argument, Message, Op, Unsendable, header, read_header
from streamflow.parallel.plan import shares

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
LIMIT = 60  # seconds after which a rank that should have ended is an error


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Net(nn.Module):
    """Stands for a decoder and for a velocity. `acts`: by rank and number of its call, what the process does then."""

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
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("streamflow").addHandler(handler)
    try:
        torch.save((body(rank), said), answer)
    except (RuntimeError, ValueError) as error:
        torch.save((error, said), answer)
        os._exit(1)


def run(world: int, body: Callable, folder: Path, stopped: bool = False) -> tuple[list[int], list]:
    """(exit codes, (what body(rank) gave or raised, what was logged)) of so many ranks, all of which must end by
    themselves, but for one that has stopped itself."""
    context, port = multiprocessing.get_context("fork"), free_port()
    files = [folder / f"rank{rank}.pt" for rank in range(world)]
    processes = [context.Process(target=rank_main, args=(r, world, port, body, files[r])) for r in range(world)]
    for process in processes:
        process.start()
    try:
        for process in processes[: 1 if stopped else world]:
            process.join(LIMIT)
        late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        assert stopped or not late, f"ranks {late} did not end"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [p.exitcode for p in processes], [torch.load(f, weights_only=False) if f.exists() else None for f in files]


def inputs(n: int) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(n))


def on_rank_0(modules: dict[str, nn.Module], act: Callable, **options) -> Callable:
    """A body for `run`: what `act(remote)` gives on rank 0."""

    def body(rank: int):
        with torch.no_grad(), served(modules, device="cpu", joining=LIMIT, **{"timeout": LIMIT, **options}) as remote:
            return None if remote is None else act(remote)

    return body


def by_shares(net: nn.Module, x: Tensor, workers: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(x[s.start : s.stop]) for s in shares(len(x), workers) if s])


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    monkeypatch.setenv("RANK", "-1")  # what this process itself computes acts on no one


def test_rows_and_frames_are_those_of_one_process(tmp_path):
    def act(remote):
        rows = {n: remote.decoder(inputs(n)) for n in (1, 2, 3, 7)}
        frames = list(remote.frames("decoder", (inputs(1) + k for k in range(9))))
        return rows, frames, remote.ranks

    codes, results = run(3, on_rank_0({"decoder": Net()}, act), tmp_path)
    assert codes == [0, 0, 0]
    (rows, frames, ranks), said = results[0]
    assert ranks == (0, 1, 2)
    for n, pictures in rows.items():
        assert torch.equal(pictures, by_shares(Net(), inputs(n), 3))
    expected = [Net()(inputs(1) + k) for k in range(9)]
    assert all(torch.equal(a, b) for a, b in zip(frames, expected, strict=True))
    assert not any("lost" in line or "dropped" in line for line in said)


def test_a_prompt_stays_where_it_is_until_it_changes(tmp_path):
    """A velocity's conditioning travels once; a tensor written in place, or another one, travels again."""

    def act(remote):
        text, ids = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(1)), torch.arange(7.0)
        sent, given = [], []
        original = remote._peers[0]._link.ask
        remote._peers[0]._link.ask = lambda message: sent.append([a.kept for a in message.arguments]) or original(message)
        for change in (None, None, "written", "another"):
            if change == "written":
                text.mul_(2)
            text = text + 1 if change == "another" else text
            given.append((remote.velocity(inputs(5), torch.arange(5.0), text=text, ids=ids), text.clone()))
        return given, list(sent), ids

    codes, results = run(2, on_rank_0({"velocity": Net()}, act, shared=("ids",)), tmp_path)
    (given, sent, ids), _ = results[0]
    assert codes == [0, 0]
    for v, text in given:
        torch.testing.assert_close(v, Net()(inputs(5), torch.arange(5.0), text=text, ids=ids))
    assert [call[2:] for call in sent] == [[False, False], [True, True], [False, True], [False, True]]


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
    assert relative_error(results[0][0], alone) < 1e-4


@pytest.mark.parametrize("way", ["rows", "frames"])
def test_a_killed_rank_s_work_is_done_by_the_others(way, tmp_path):
    net = Net({(2, 2): die})
    x = inputs(7)

    def act(remote):
        if way == "rows":
            return [remote.decoder(x) for _ in range(4)], remote.ranks
        return list(remote.frames("decoder", (x + k for k in range(12)))), remote.ranks

    codes, results = run(4, on_rank_0({"decoder": net}, act), tmp_path)
    assert codes == [0, 0, -signal.SIGKILL, 0]
    (given, ranks), said = results[0]
    assert ranks == (0, 1, 3)
    if way == "rows":
        expected = [by_shares(Net(), x, 4)] * 2 + [by_shares(Net(), x, 3)] * 2
    else:
        expected = [Net()(x + k) for k in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert [line for line in said if line.startswith("rank 2 is lost")]


def test_a_rank_that_falls_silent_is_noticed_within_the_timeout(tmp_path):
    x = inputs(4)

    def act(remote):
        start = time.monotonic()
        pictures = remote.decoder(x)
        return pictures, time.monotonic() - start, remote.ranks

    body = on_rank_0({"decoder": Net({(1, 1): stop})}, act, timeout=1.0)
    codes, results = run(2, body, tmp_path, stopped=True)
    (pictures, seconds, ranks), said = results[0]
    assert torch.equal(pictures, by_shares(Net(), x, 2))
    assert 0.9 < seconds < 20 and ranks == (0,)
    assert [line for line in said if line.startswith("rank 1 is lost")]


def test_a_rank_that_dies_while_idle_is_noticed_by_its_silence(tmp_path):
    def act(remote):
        remote.decoder(inputs(2))
        deadline = time.monotonic() + LIMIT
        while 1 in remote.ranks and time.monotonic() < deadline:
            time.sleep(0.05)
        return remote.ranks

    net = Net({(1, 1): lambda: signal.setitimer(signal.ITIMER_REAL, 0.3)})  # SIGALRM ends the process
    codes, results = run(2, on_rank_0({"decoder": net}, act, timeout=2.0), tmp_path)
    assert codes == [0, -signal.SIGALRM]
    assert results[0][0] == (0,)


def test_servers_end_with_an_error_when_rank_0_is_killed(tmp_path):
    net = Net({(0, 2): die})
    codes, results = run(
        3, on_rank_0({"decoder": net}, lambda remote: [remote.decoder(inputs(3)) for _ in range(2)]), tmp_path
    )
    assert codes == [-signal.SIGKILL, 1, 1]
    for error, _ in results[1:]:
        assert isinstance(error, RankLost) and "rank 0" in str(error) and "start all ranks anew" in str(error)


def test_a_rank_whose_module_raises_is_dropped_and_leaves_in_peace(tmp_path):
    x = inputs(6)
    net = Net({(1, 2): fail})

    def act(remote):
        return [remote.decoder(x) for _ in range(3)], remote.ranks

    codes, results = run(3, on_rank_0({"decoder": net}, act), tmp_path)
    (given, ranks), said = results[0]
    assert codes == [0, 0, 0] and ranks == (0, 2)
    expected = [by_shares(Net(), x, 3)] * 2 + [by_shares(Net(), x, 2)]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert [line for line in said if line.startswith("rank 1 is dropped") and "this GPU is full" in line]


def test_what_every_rank_refuses_names_each_cause_and_drops_nobody(tmp_path):
    def act(remote):
        with pytest.raises(RuntimeError, match=r"every rank failed: rank 0: .*; rank 1: ") as caught:
            remote.decoder(torch.zeros(2, 5, 8, 8))
        with pytest.raises(ValueError, match="no rows"):
            remote.decoder(torch.zeros(0, 4, 8, 8))
        with pytest.raises(AttributeError, match="there are decoder"):
            _ = remote.encoder
        return str(caught.value), remote.ranks, remote.decoder(inputs(2)), remote

    def body(rank):
        given = on_rank_0({"decoder": Net()}, act)(rank)
        if given is None:
            return None
        with pytest.raises(RuntimeError, match="let go"):
            given[3].decoder(inputs(2))
        return given[:3]

    codes, results = run(2, body, tmp_path)
    (message, ranks, pictures), _ = results[0]
    assert codes == [0, 0] and ranks == (0, 1)
    assert "expected input" in message and torch.equal(pictures, by_shares(Net(), inputs(2), 2))


def test_a_slow_rank_makes_the_inputs_wait(tmp_path):
    """No more calls are under way than each rank may have, and no rank is idle for want of inputs."""

    def act(remote):
        taken, most = 0, 0

        def source():
            nonlocal taken
            for k in range(10):
                taken += 1
                yield inputs(1) + k

        for done, _ in enumerate(remote.frames("decoder", source())):
            most = max(most, taken - done)
        return most

    net = Net({(rank, call): lambda: time.sleep(0.03) for rank in (1, 2) for call in range(1, 11, rank)})
    _, results = run(3, on_rank_0({"decoder": net}, act, in_flight=2), tmp_path)
    assert 2 < results[0][0] <= 4 + 1


def test_ranks_with_other_weights_are_refused(tmp_path):
    def body(rank):
        return on_rank_0({"decoder": Net(seed=rank)}, lambda remote: None)(rank)

    codes, results = run(2, body, tmp_path)
    assert codes == [1, 1]
    assert all("the weights of 'decoder' on rank 1" in str(error) for error, _ in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_header_says_all_but_the_values(dtype):
    tensors = (Argument(torch.ones(2, 0, 3, dtype=dtype)), Argument(torch.ones((), dtype=dtype), "größe"))
    read = read_header(header(Message(Op.CALL, 3, (*tensors, Argument(None, "kept", True)))), CPU)
    assert (read.op, read.part) == (Op.CALL, 3)
    assert [(a.name, a.kept) for a in read.arguments] == [("", False), ("größe", False), ("kept", True)]
    assert [(a.tensor.shape, a.tensor.dtype) for a in read.arguments[:2]] == [((2, 0, 3), dtype), ((), dtype)]


def test_what_a_header_cannot_say_is_refused():
    with pytest.raises(ValueError, match="16 tensors at most, not 17"):
        header(Message(Op.CALL, 0, (Argument(torch.ones(1)),) * 17))
    with pytest.raises(ValueError, match="complex64"):
        header(Message(Op.CALL, 0, (Argument(torch.ones(1, dtype=torch.complex64)),)))
    assert Message.failed("zu groß").text == "zu groß"


SHAPE, FIRST = 6, slice(3, 3 + RECORD)  # where a header's first shape begins, and its first record lies


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({0: 99}, "not a valid Op"),
        ({1: -1}, "the number of a module is -1"),
        ({2: 2**40}, "the number of tensors is 1099511627776: it is from 0 to 16"),
        ({2: 17}, "the number of tensors is 17"),
        ({2: -1}, "the number of tensors is -1"),
        ({3: 2}, "a mark of a kept tensor is 2"),
        ({4: len(DTYPES)}, "a dtype is 10"),
        ({4: -1}, "a dtype is -1"),
        ({5: 9}, "the number of dimensions is 9: it is from 0 to 8"),
        ({5: -1}, "the number of dimensions is -1"),
        ({SHAPE: 2**62}, "a size is 4611686018427387904"),
        ({SHAPE: -1}, "a size is -1"),
        ({SHAPE: 2**32, SHAPE + 1: 2**32}, "the product of a tensor's sizes is 36893488147419103232"),
        ({SHAPE: 2**32, SHAPE + 1: 2**32, SHAPE + 2: 0}, "the product of a tensor's sizes is 18446744073709551616"),
        ({SHAPE: 2**15, SHAPE + 1: 2**15}, "announces 17,179,869,184 bytes of tensors, and 4,294,967,296"),
        ({SHAPE + 8: -1}, "utf-8"),
    ],
    ids=str,
)
def test_a_header_that_cannot_be_is_refused_before_anything_is_allocated(changes, says, monkeypatch):
    numbers = header(Message(Op.CALL, 0, (Argument(torch.ones(2, 2, 2, dtype=torch.float64)),)))
    assert read_header(numbers, CPU).arguments[0].tensor.shape == (2, 2, 2)
    for at, number in changes.items():
        numbers[at] = number
    monkeypatch.setattr(wire.torch, "empty", None)
    with pytest.raises(ValueError, match=says):
        read_header(numbers, CPU)


@pytest.mark.parametrize("shape", [(0,), (2**40, 0), (3, 0, 2**32), (0, 2**48)], ids=str)
def test_both_sides_count_an_empty_tensor_as_0_bytes(shape):
    large = Argument(torch.empty(2**32, dtype=torch.uint8, device="meta"))  # all the bytes that a message may have
    numbers = header(Message(Op.CALL, 0, (large, Argument(torch.empty(shape, dtype=torch.float64)))))
    read = read_header(numbers, torch.device("meta"))
    assert [one.tensor.shape for one in read.arguments] == [(2**32,), shape]


@pytest.mark.parametrize("shape", [(0, 2**48 + 1), (2**31, 0, 2**31)], ids=str)
def test_an_empty_tensor_whose_header_would_be_refused_is_not_sent(shape):
    with pytest.raises(Unsendable, match="an empty tensor of shape"):
        header(Message(Op.CALL, 0, (Argument(torch.empty(shape)),)))


@pytest.mark.parametrize("text", ["", "été", "no file 'a\udc80b'", "\ud800"])
def test_every_error_message_can_be_sent(text):
    assert Message.failed(text).text == text.encode(errors="backslashreplace").decode()


def test_all_tensors_of_a_header_count_together():
    numbers = header(Message(Op.CALL, 0, (Argument(torch.ones(1, dtype=torch.uint8)),)))
    numbers[SHAPE], numbers[2] = 2**29, 16
    for k in range(1, 16):
        numbers[3 + k * RECORD : 3 + (k + 1) * RECORD] = numbers[FIRST]
    with pytest.raises(ValueError, match="announces 8,589,934,592 bytes"):
        read_header(numbers, CPU)
    with pytest.raises(ValueError, match=r"a header is int64 \[\d+\], not torch.int64 \[3\]"):
        read_header(numbers[:3], CPU)
    large = torch.empty(2**32 + 1, dtype=torch.uint8, device="meta")
    with pytest.raises(Unsendable, match="4,294,967,296 bytes of tensors at most"):
        header(Message(Op.CALL, 0, (Argument(large),)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 0}, "timeout"),
        ({"joining": float("inf")}, "joining"),
        ({"in_flight": 0}, "in_flight"),
        ({}, "torchrun"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, said, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match=said), served({"decoder": Net()}, **options):
        pass


# -- by torchrun ------------------------------------------------------------------------------------------------------

DRAW = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from test_parallel_distributed import Net, die, inputs
from streamflow.parallel.distributed import served
torch.set_num_threads(1)
with torch.no_grad(), served({"decoder": Net({(1, 3): die})}, timeout=20) as remote:
    if remote is None:
        sys.exit(0)
    pictures = list(remote.frames("decoder", (inputs(1) + k for k in range(8))))
    print("equal:", all(torch.equal(p, Net()(inputs(1) + k)) for k, p in enumerate(pictures)), len(pictures), remote.ranks)
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
    assert "5 pictures, the same to the bit: yes" in output and sheet.stat().st_size > 1000


@pytest.mark.slow
def test_rank_0_outlives_a_rank_of_another_torchrun(torchrun, tmp_path):
    """As on two machines: each torchrun looks after its own processes."""
    script, port = tmp_path / "draw.py", free_port()
    script.write_text(DRAW)
    nodes = [
        torchrun(
            "--nnodes", 2, "--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port, script, ROOT / "tests"
        )
        for node in range(2)
    ]
    said = ""
    while "equal:" not in said and (line := nodes[0].stdout.readline()):
        said += line
    ((other, _),) = ended(nodes[1])
    assert "equal: True 8 (0,)" in said and "rank 1 is lost" in said and other != 0
    assert not psutil.wait_procs(psutil.Process(nodes[0].pid).children(recursive=True), timeout=10)[1]
    # The torchrun of rank 0, which has nothing left to look after, would now wait five minutes for the one that is gone.


@pytest.mark.slow
def test_within_one_torchrun_a_killed_rank_ends_the_run_with_an_error(torchrun, tmp_path):
    script = tmp_path / "draw.py"
    script.write_text(DRAW.replace("range(8)", "range(10**9)"))
    ((code, output),) = ended(torchrun("--nproc-per-node", 3, "--master-port", free_port(), script, ROOT / "tests"))
    assert code != 0 and "SIGKILL" in output.upper().replace(" ", ""), output


# -- by NCCL ----------------------------------------------------------------------------------------------------------

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
needs_two = pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, and torch sees {GPUS}")

ON_GPUS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_parallel_distributed import Net, by_shares, die, inputs
from streamflow.parallel.distributed import local_device, served
device = local_device()
alone = Net().to(device)
with torch.no_grad(), served({"decoder": Net(ACTS).to(device)}, timeout=20) as remote:
    if remote is None:
        sys.exit(0)
    print("wire:", *(peer._link.wire for peer in remote._peers))
    rows = [remote.decoder(inputs(5).to(device)) for _ in range(3)]
    assert all(r.device == device and torch.allclose(r, by_shares(alone, inputs(5).to(device), 2), atol=1e-5) for r in rows)
    frames = list(remote.frames("decoder", (inputs(1).to(device) + k for k in range(8))))
    assert all(torch.allclose(p, alone(inputs(1).to(device) + k), atol=1e-5) for k, p in enumerate(frames))
    print("equal:", len(frames), remote.ranks)
"""


@pytest.mark.multi_gpu
@needs_two
def test_two_gpus_share_rows_and_frames_by_nccl(torchrun, tmp_path):
    script = tmp_path / "draw.py"
    script.write_text(ON_GPUS.replace("ACTS", "{}"))
    ((code, output),) = ended(torchrun("--nproc-per-node", 2, "--master-port", free_port(), script, ROOT / "tests"))
    assert code == 0 and "wire: cuda" in output and "equal: 8 (0, 1)" in output, output


@pytest.mark.multi_gpu
@needs_two
@pytest.mark.parametrize("call", [2, 6])
def test_a_rank_killed_beside_nccl_is_replaced(call, torchrun, tmp_path, monkeypatch):
    """It dies in a call, by rows or by frame, not in a transfer."""
    script, port = tmp_path / "draw.py", free_port()
    script.write_text(ON_GPUS.replace("ACTS", f"{{(1, {call}): die}}"))
    nodes = []
    for node in range(2):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(node))
        where = ("--nnodes", 2, "--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port)
        nodes.append(torchrun(*where, script, ROOT / "tests"))
    said = ""
    while "equal:" not in said and (line := nodes[0].stdout.readline()):
        said += line
    assert "equal: 8 (0,)" in said and "rank 1 is lost" in said, said
    ended(nodes[1])
