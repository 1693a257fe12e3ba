"""Modules on Ray actors, and the Ray examples as a user runs them: on CPU workers, some of which are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import PROMPT
from torch import Tensor, nn

pytestmark = [pytest.mark.ray]
ray = pytest.importorskip("ray", reason="needs ray: pip install -r env/requirements-ray.txt")

from PIL import Image  # noqa: E402

from streamflow.models.codec import Codec  # noqa: E402
from streamflow.parallel import RayModule  # noqa: E402
from streamflow.parallel.plan import shares  # noqa: E402

ROOT = Path(__file__).parents[1]
# For the examples and Ray's workers: this package and its tests, and what the environment names, where Ray itself may be.
PATHS = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
LIMIT = 240  # seconds for one run of an example
BATCH, SERVE = ROOT / "examples/ray_batch.py", ROOT / "examples/ray_serve.py"


class Run:
    """A running example, with its output in a file. `end` ends all of its processes."""

    def __init__(self, output: Path, script: Path, *arguments: object):
        self.output, self.deadline = output, time.monotonic() + LIMIT
        self.seen: set[psutil.Process] = set()
        environment = {**os.environ, "PYTHONPATH": PATHS, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with output.open("w") as file:
            command = [sys.executable, str(script), *map(str, arguments)]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def wait_for(self, condition):
        """The value of the condition once it is true. It is an error if the run ends, or its time is over, before that."""
        while not (found := condition()):
            self._look()
            assert self.process.poll() is None, f"it ended: {self.output.read_text()}"
            assert time.monotonic() < self.deadline, f"out of time: {self.output.read_text()}"
            time.sleep(0.1)
        return found

    def workers(self, kind: str) -> list[psutil.Process]:
        """The Ray workers of this run with a name that starts with `kind`."""
        self._look()
        found = []
        for process in self.seen:
            try:
                if process.is_running() and " ".join(process.cmdline()).startswith(f"ray::{kind}"):
                    found.append(process)
            except psutil.Error:
                continue  # it ended meanwhile
        return found

    def wait(self) -> tuple[int, str]:
        """(exit code, output), after it has ended by itself."""
        while self.process.poll() is None and time.monotonic() < self.deadline:
            self._look()
            time.sleep(0.2)
        assert self.process.poll() is not None, f"out of time: {self.output.read_text()}"
        return self.process.returncode, self.output.read_text()

    def left(self) -> list[psutil.Process]:
        """The processes that still run 30 s after its end."""
        return psutil.wait_procs(self.seen, timeout=30)[1]

    def wait_for_end_of(self, kind: str) -> None:
        """Wait until no worker of this kind is left."""
        while self.workers(kind):
            assert time.monotonic() < self.deadline, f"still there: {self.workers(kind)}"
            time.sleep(0.2)

    def end(self) -> None:
        for process in (*self.seen, self.process):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue  # it has ended already
        self.process.wait()

    def _look(self) -> None:
        if self.process.poll() is None:
            self.seen.update(psutil.Process(self.process.pid).children(recursive=True))


@pytest.fixture
def example(tmp_path):
    """`example(script, arguments...)`: a `Run`."""
    runs: list[Run] = []

    def start(script: Path, *arguments: object) -> Run:
        runs.append(Run(tmp_path / f"output{len(runs)}.txt", script, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def images(folder: Path) -> dict[str, tuple[int, int]]:
    """For each file name, the inode and time of writing, which differ if the file was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.png")}


def test_a_batch_goes_on_after_a_kill_and_writes_each_image_once(example, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(f"a fox, 3d render, {k}" for k in range(10)))
    arguments = ("--prompts", prompts, "--output", out, "--batch", 2, "--workers", 2)
    first = example(BATCH, *arguments)
    first.wait_for(lambda: out.exists() and len(images(out)) >= 2)
    first.process.send_signal(signal.SIGKILL)
    first.wait()
    # Its workers are gone; of Ray itself two small agents stay until they have noticed, about a minute.
    first.wait_for_end_of("MapWorker")
    there = images(out)
    assert 2 <= len(there) < 10

    second = example(BATCH, *arguments)
    # In the second run a worker is killed: its batch is drawn by another one.
    second.wait_for(lambda: len(images(out)) > len(there))
    killed = second.workers("MapWorker")[0]
    killed.kill()
    code, output = second.wait()
    assert code == 0, output
    assert f"10 images, {len(there)} exist already" in output
    after = images(out)
    assert len(after) == 10 and {name: after[name] for name in there} == there
    assert [path.name for path in out.iterdir() if path.suffix != ".png"] == []
    assert {Image.open(out / name).size for name in after} == {(128, 128)}
    assert second.left() == []


def test_a_folder_of_images_is_redrawn(example, tmp_path, picture):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for k in range(2):
        picture(k).save(photos / f"photo{k}.png")
    run = example(BATCH, "--images", photos, "--prompt", "a red apple, 3d render", "--output", out, "--workers", 1)
    code, output = run.wait()
    assert code == 0, output
    assert sorted(name.split("-")[0] for name in images(out)) == ["photo0", "photo1"]


def test_a_killed_replica_is_replaced_and_every_user_gets_an_image(example, tmp_path, free_port):
    sheet = tmp_path / "sheet.png"
    run = example(SERVE, "--port", free_port, "--requests", 40, "--replicas", 1, "--output", sheet)
    run.wait_for(lambda: "is served by" in run.output.read_text())
    time.sleep(1)  # requests are in flight
    (replica,) = run.workers("ServeReplica")
    replica.kill()
    code, output = run.wait()
    assert code == 0, output
    assert "trying again" in output and "40 images" in output
    assert Image.open(sheet).size == (4 * 128, 10 * 128)
    assert run.left() == []


def test_an_example_decodes_on_ray(example, tmp_path):
    out = tmp_path / "decode.png"
    run = example(ROOT / "examples/multi_gpu_decode.py", "--ray", 2, "--count", 3, "--steps", 2, "--output", out)
    code, output = run.wait()
    assert code == 0, output
    assert output.index("frame 0 ") < output.index("frame 1 ") < output.index("frame 2 ") and out.stat().st_size > 1000
    assert run.left() == []


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# -- modules on actors ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A velocity and a decoder; `forward` refuses other channels than 4."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor, *, text: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        out = self.conv(x)
        return out if text is None else out * text.reshape(-1, 1, 1, 1) + ids.sum()


class KilledAt(nn.Module):
    """A module whose process is killed in its call of this number, once in all processes together."""

    def __init__(self, module: nn.Module, call: int, mark: Path):
        super().__init__()
        self.module, self.call, self.mark, self.calls = module, call, mark, 0

    def forward(self, *args: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.module(*args)


@pytest.fixture(scope="module")
def two_cores():
    variables = {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    yield
    ray.shutdown()


def inputs(n: int) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def by_shares(net: nn.Module, x: Tensor, workers: int) -> Tensor:
    return torch.cat([net(x[rows.start : rows.stop]) for rows in shares(len(x), workers) if rows])


def test_rows_are_those_of_one_process_to_the_bit(two_cores):
    net = Net()
    on_ray = RayModule(net, 2, num_gpus=0)
    for n in (1, 2, 5):
        assert torch.equal(on_ray(inputs(n)), by_shares(net, inputs(n), 2))


def test_named_arguments_are_shared_by_row_and_others_stay_whole(two_cores):
    net, text, ids = Net(), torch.randn(5), torch.arange(5.0)
    on_ray = RayModule(net, 2, num_gpus=0, shared=("ids",))
    with torch.no_grad():
        torch.testing.assert_close(on_ray(inputs(5), text=text, ids=ids), net(inputs(5), text=text, ids=ids))


def test_an_actor_killed_in_mid_run_loses_no_frame(two_cores, stream_of, tmp_path):
    stream = stream_of("sd3")
    stream.prepare(PROMPT, num_inference_steps=4)
    alone = [(frame.id, frame.wait().image.clone()) for frame in stream.frames([None] * 8)]
    plain = stream.codec
    decoder = KilledAt(plain.decoder, 2, tmp_path / "killed")
    stream.codec = Codec.of(RayModule(decoder, 2, num_gpus=0), plain.encoder)
    stream.prepare(PROMPT, num_inference_steps=4)
    frames = [(frame.id, frame.wait().image) for frame in stream.frames([None] * 8)]
    assert decoder.mark.exists()
    assert [number - frames[0][0] for number, _ in frames] == list(range(8))
    assert all(torch.equal(image, expected) for (_, image), (_, expected) in zip(frames, alone, strict=True))


@pytest.mark.parametrize("way", ["rows", "calls"])
def test_the_call_of_a_killed_actor_is_repeated(way, two_cores, tmp_path):
    net, x = Net(), inputs(4)
    on_ray = RayModule(KilledAt(net, 2, tmp_path / "killed"), 2, num_gpus=0)
    if way == "rows":
        found = [on_ray(x + k) for k in range(4)]
        expected = [by_shares(net, x + k, 2) for k in range(4)]
    else:
        found = [pending.result() for pending in [on_ray.submit(x + k) for k in range(6)]]
        expected = [by_shares(net, x + k, 1) for k in range(6)]
    assert (tmp_path / "killed").exists()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_restarts_of_an_actor_are_limited(two_cores, tmp_path):
    on_ray = RayModule(KilledAt(Net(), 1, tmp_path / "killed"), 1, num_gpus=0, restarts=0)
    with pytest.raises(ray.exceptions.RayActorError):
        on_ray(inputs(1))


def test_an_error_of_the_module_is_raised_and_the_actor_stays(two_cores):
    net = Net()
    on_ray = RayModule(net, 1, num_gpus=0)
    with pytest.raises(RuntimeError, match="to have 4 channels"):
        on_ray(torch.zeros(1, 5, 8, 8))
    for bad, error in ((torch.zeros(0, 4, 8, 8), "empty"), ("text", "tensor")):
        with pytest.raises((ValueError, TypeError), match=error):
            on_ray(bad)
    assert torch.equal(on_ray.submit(inputs(2)).result(), by_shares(net, inputs(2), 1))


@pytest.mark.parametrize(
    ("actors", "num_gpus", "error"), [(3, 0, "2 cores"), (0, 0, "0 actors"), (1, 1, "0 GPUs.*num_gpus=0")]
)
def test_more_actors_than_the_cluster_has_room_for_are_refused(actors, num_gpus, error, two_cores):
    with pytest.raises(ValueError, match=error):
        RayModule(Net(), actors, num_gpus=num_gpus)


def test_the_actors_end_with_their_module(two_cores):
    def actors() -> list[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        return [one for one in children if " ".join(one.cmdline()).startswith("ray::_Actor")]

    deadline = time.monotonic() + 60
    on_ray = RayModule(Net(), 1, num_gpus=0)
    while len(found := actors()) != 1:  # those of the tests before have ended, and this one has its name
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    del on_ray
    assert psutil.wait_procs(found, timeout=30)[1] == []
