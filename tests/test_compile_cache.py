"""Compiled code in a file: a new process finds what was written, and nothing damaged, foreign or malicious reaches torch's
cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.compiler import _cache
from torch.utils._appending_byte_serializer import AppendingByteSerializer

from streamflow.acceleration import compile_cache
from streamflow.acceleration.compile_cache import NAME, load, machine_facts, save
from streamflow.app.cli import main

ROOT = Path(__file__).resolve().parents[1]
KEY = "ab/abcdef.best_config"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of torch's cache."""
    folder = tmp_path / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    return folder


def artifacts(*keys: str, kind: str = "autotune") -> bytes:
    """Torch's own bytes of artifacts with these keys."""
    _cache.CacheArtifactManager._ensure_cache_artifacts_registered()
    serializer = AppendingByteSerializer(serialize_fn=_cache._serialize_single_cache)
    entries = [_cache.CacheArtifactFactory.create(kind, key, b'{"num_warps": 4}') for key in keys]
    serializer.extend([(kind, entries)])
    return serializer.to_bytes()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """`written(*keys)`: a file of artifacts with these keys."""

    def write(*keys: str, kind: str = "autotune") -> Path:
        data = artifacts(*keys, kind=kind)
        monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (data, None))
        save(tmp_path / "made.cache", "cpu")
        return tmp_path / "made.cache"

    return write


def files(folder: Path) -> list[str]:
    return sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file())


def test_what_is_written_is_put_into_torchs_cache(written, cache):
    found = load(written(KEY), "cpu")
    assert found.entries == 1 and found.made_for == machine_facts("cpu")
    assert [one for one in files(cache) if "best_config" in one] == [KEY]


@pytest.mark.parametrize("key", ["../outside", "/tmp/outside", "ab/../../outside", "..", "a/b/c", "a\\..\\b", "ab/", ""])
def test_a_key_that_leaves_the_folder_is_refused(key, written, cache, tmp_path):
    path = written(KEY)
    data = artifacts(KEY, key)
    path.write_bytes(NAME + header(data) + data)
    with pytest.raises(ValueError, match="is no file name of torch's cache"):
        load(path, "cpu")
    assert not cache.exists() or files(cache) == []
    assert files(tmp_path) == ["made.cache"]


def header(data: bytes, **changes: object) -> bytes:
    import hashlib

    own = {"made_for": machine_facts("cpu"), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return json.dumps({**own, **changes}).encode() + b"\n"


DATA = b"no artifacts"
DAMAGED = {
    "empty": (b"", "is no compile cache of streamflow"),
    "another file": (b"PK\x03\x04" + bytes(100), "is no compile cache of streamflow"),
    "no header": (NAME, "its header cannot be read"),
    "half a header": (NAME + b'{"made_for": {', "its header cannot be read"),
    "no such keys": (NAME + b"{}\n", "its header cannot be read"),
    "a list": (NAME + b"[1]\n", "its header cannot be read"),
    "deep": (NAME + b"[" * 60000 + b"\n", "its header cannot be read"),
    "cut short": (NAME + header(DATA) + DATA[:-1], "it holds 11 bytes that are not the 12 that were written"),
    "a bit": (NAME + header(DATA) + b"nO artifacts", "bytes that are not the 12 that were written"),
    "facts of another kind": (NAME + header(DATA, made_for={"torch": [1]}) + DATA, "is damaged"),
    "no artifacts": (NAME + header(DATA) + DATA, "torch cannot read its artifacts"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name, tmp_path, cache):
    data, message = DAMAGED[name]
    path = tmp_path / "made.cache"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load(path, "cpu")
    assert not cache.exists() or files(cache) == []


def test_a_file_of_another_machine_is_refused_with_all_differences(written, monkeypatch):
    path = written(KEY)
    here = machine_facts("cpu")
    monkeypatch.setattr(compile_cache, "machine_facts", lambda device: {**here, "torch": "9.9", "gpu": "A card"})
    with pytest.raises(
        RuntimeError, match=rf"torch {here['torch']} and not 9\.9".replace("+", r"\+") + ".*gpu None and not A"
    ):
        load(path, "cpu")


def test_artifacts_that_are_not_needed_are_left_out(written, cache):
    assert load(written("some key", kind="pgo"), "cpu").entries == 0
    assert not cache.exists() or files(cache) == []


def test_nothing_compiled_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    with pytest.raises(RuntimeError, match=r"nothing was compiled in this process.*accelerate\('compile'\)"):
        save(tmp_path / "made.cache", "cpu")
    assert files(tmp_path) == []


def test_the_command_imports_and_says_what_is_wrong(written, tmp_path, capsys):
    path = written(KEY)
    assert main(["engines", "import", str(path), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 1
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["engines", "import", str(path), "--device", "cpu"]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main(["engines", "import", str(tmp_path / "none"), "--device", "cpu"]) == 1
    with pytest.raises(SystemExit) as stopped:
        main(["engines", "export", str(path), "--accelerate", "none"])
    assert stopped.value.code == 2 and "compiles nothing by torch.compile" in capsys.readouterr().err


DRAW = """
import json, sys
import torch
from torch._dynamo.utils import counters
from random_pipelines import random_pipeline, random_tiny_vae
from streamflow import StreamFlow
from streamflow.acceleration import compile_cache

torch.set_num_threads(1)
how, path = sys.argv[1:]
if how == "load":
    compile_cache.load(path, "cpu")
pipe = random_pipeline("sd3", num_layers=4)
pipe.vae = random_tiny_vae(16)
stream = StreamFlow(pipe, range(2), cfg_type="none")
stream.prepare("a red apple", num_inference_steps=2)
stream.accelerate("compile")
image = stream.txt2img()
if how == "save":
    compile_cache.save(path, "cpu")
own = {name: counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")}
print(json.dumps({**own, "image": image.double().sum().item()}))
"""


@pytest.mark.slow
def test_a_new_process_compiles_nothing_after_it_was_loaded(tmp_path):
    def run(how: str) -> dict:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / how),
        }
        command = [sys.executable, "-c", DRAW, how, str(tmp_path / "made.cache")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first, again = run("save"), run("load")
    assert first["fxgraph_cache_miss"] > 0 == first["fxgraph_cache_hit"]
    assert again["fxgraph_cache_hit"] == first["fxgraph_cache_miss"] and again["fxgraph_cache_miss"] == 0
    assert again["image"] == first["image"]


@pytest.mark.soak
def test_the_command_exports_what_the_embedded_model_compiles(tmp_path):
    command = [sys.executable, "-c", "from streamflow.app.cli import main; raise SystemExit(main())", "engines", "export"]
    small = ["--steps", "1", "--warmup", "1", "--device", "cpu", "--json", "--width", "64", "--height", "64"]
    path = tmp_path / "made.cache"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(path), *small], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["entries"] > 1
    assert load(path, "cpu").entries > 1


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["export", "missing/sd.cache"], "missing is no folder"),
        (["import", "sd.cache", "--device", "cuda:77"], "--device cuda:77"),
    ],
)
def test_the_commands_check_folder_and_device_first(arguments, says, tmp_path, monkeypatch, capsys):
    from streamflow.app.commands import engines

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        engines.main(arguments)
    assert ended.value.code == 2 and says in capsys.readouterr().err
