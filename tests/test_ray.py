"""The Ray examples, run as a user runs them: by the embedded model on CPU workers, whatever is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray]
pytest.importorskip("ray", reason="needs ray: pip install -r env/requirements-ray.txt")

from PIL import Image  # noqa: E402

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds for one run of an example
BATCH, SERVE = ROOT / "examples/ray_batch.py", ROOT / "examples/ray_serve.py"


class Run:
    """An example under way, its output in a file; `end` leaves no process of it behind."""

    def __init__(self, output: Path, script: Path, *arguments: object):
        self.output, self.deadline = output, time.monotonic() + LIMIT
        self.seen: set[psutil.Process] = set()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with output.open("w") as file:
            command = [sys.executable, str(script), *map(str, arguments)]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def wait_for(self, condition):
        """What the condition gives once it is true; an error when the run ends or its time is over before."""
        while not (found := condition()):
            self._look()
            assert self.process.poll() is None, f"it ended: {self.output.read_text()}"
            assert time.monotonic() < self.deadline, f"out of time: {self.output.read_text()}"
            time.sleep(0.1)
        return found

    def workers(self, kind: str) -> list[psutil.Process]:
        """Ray's workers of this run whose name begins so."""
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
        """(exit code, output), once it has ended by itself."""
        while self.process.poll() is None and time.monotonic() < self.deadline:
            self._look()
            time.sleep(0.2)
        assert self.process.poll() is not None, f"out of time: {self.output.read_text()}"
        return self.process.returncode, self.output.read_text()

    def left(self) -> list[psutil.Process]:
        """What is still there of it, a while after its end."""
        return psutil.wait_procs(self.seen, timeout=30)[1]

    def wait_for_end_of(self, kind: str) -> None:
        """Return when no worker of this kind is left."""
        while self.workers(kind):
            assert time.monotonic() < self.deadline, f"still there: {self.workers(kind)}"
            time.sleep(0.2)

    def end(self) -> None:
        for process in (*self.seen, self.process):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue  # which is what is wanted
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


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """By name, what tells one writing of a file from another."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.png")}


def test_a_batch_goes_on_after_a_kill_and_writes_each_picture_once(example, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(f"a fox, 3d render, {k}" for k in range(10)))
    arguments = ("--prompts", prompts, "--output", out, "--batch", 2, "--workers", 2)
    first = example(BATCH, *arguments)
    first.wait_for(lambda: out.exists() and len(pictures(out)) >= 2)
    first.process.send_signal(signal.SIGKILL)
    first.wait()
    # Its workers are gone; of Ray itself two small agents stay until they have noticed, about a minute.
    first.wait_for_end_of("MapWorker")
    there = pictures(out)
    assert 2 <= len(there) < 10

    second = example(BATCH, *arguments)
    # In the second run a worker is killed: its batch is drawn by another one.
    second.wait_for(lambda: len(pictures(out)) > len(there))
    killed = second.workers("MapWorker")[0]
    killed.kill()
    code, output = second.wait()
    assert code == 0, output
    assert f"10 pictures, {len(there)} are there already" in output
    after = pictures(out)
    assert len(after) == 10 and {name: after[name] for name in there} == there
    assert [path.name for path in out.iterdir() if path.suffix != ".png"] == []
    assert {Image.open(out / name).size for name in after} == {(128, 128)}
    assert second.left() == []


def test_a_folder_of_pictures_is_redrawn(example, tmp_path, picture):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for k in range(2):
        picture(k).save(photos / f"photo{k}.png")
    run = example(BATCH, "--pictures", photos, "--prompt", "a red apple, 3d render", "--output", out, "--workers", 1)
    code, output = run.wait()
    assert code == 0, output
    assert sorted(name.split("-")[0] for name in pictures(out)) == ["photo0", "photo1"]


def test_a_killed_replica_is_replaced_and_every_user_gets_a_picture(example, tmp_path, free_port):
    sheet = tmp_path / "sheet.png"
    run = example(SERVE, "--port", free_port, "--requests", 40, "--replicas", 1, "--output", sheet)
    run.wait_for(lambda: "is served by" in run.output.read_text())
    time.sleep(1)  # requests are under way
    (replica,) = run.workers("ServeReplica")
    replica.kill()
    code, output = run.wait()
    assert code == 0, output
    assert "asking again" in output and "40 pictures" in output
    assert Image.open(sheet).size == (4 * 128, 10 * 128)
    assert run.left() == []


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
