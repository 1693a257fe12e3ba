"""The engine cache: what names an engine, and that nothing but a whole, right engine is ever taken from it."""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from streamflow.acceleration import Part
from streamflow.acceleration.tensorrt import cache, clear_engines, list_engines
from streamflow.acceleration.tensorrt.cache import DamagedEngine, entry_for, get_or_build, own_folder
from streamflow.acceleration.tensorrt.library import Target
from streamflow.acceleration.tensorrt.options import Options, profile_of

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
FACTS = {"part": "velocity", "class": "Tiny", "gpu": {"name": "none"}, "tensorrt": "1.0"}
ENGINE = bytes(range(256)) * 64


class Counting:
    """A build that says how often it ran."""

    def __init__(self, data: bytes = ENGINE):
        self.data, self.count = data, 0

    def __call__(self, scratch: Path) -> bytes:
        assert scratch.is_dir()
        (scratch / "model.onnx").write_bytes(b"half of it")
        self.count += 1
        return self.data


@pytest.fixture
def entry(tmp_path):
    return entry_for(tmp_path / "engines", "velocity", FACTS)


def leftovers(directory: Path) -> list[str]:
    """Files other than engines, records and locks."""
    files = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    return [str(path) for path in files if path.suffix not in (".engine", ".json") and path.parts[0] != ".locks"]


def in_a_child(function) -> int:
    """Run it in a forked process and return the status it ended with, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_an_engine_is_built_once_and_then_taken(entry):
    build = Counting()
    assert get_or_build(entry, FACTS, build) == get_or_build(entry, FACTS, build) == ENGINE
    assert build.count == 1
    assert get_or_build(entry, FACTS, build, rebuild=True) == ENGINE and build.count == 2
    assert leftovers(entry.directory) == []


def test_the_record_beside_an_engine_is_readable(entry):
    get_or_build(entry, FACTS, Counting())
    record = json.loads(entry.record.read_text())
    assert record["facts"] == FACTS and record["bytes"] == len(ENGINE) and record["key"] in entry.engine.name


def truncate(entry):
    entry.engine.write_bytes(ENGINE[:-1])


def flip_a_bit(entry):
    entry.engine.write_bytes(ENGINE[:100] + bytes([ENGINE[100] ^ 1]) + ENGINE[101:])


def lose_the_engine(entry):
    entry.engine.unlink()


def lose_the_record(entry):
    entry.record.unlink()


def garble_the_record(entry):
    entry.record.write_text("{not json")


def make_the_record_a_list(entry):
    entry.record.write_text("[]")


def put_another_engine_there(entry):
    """Both files of an engine with other facts, under this one's names."""
    facts = {**FACTS, "tensorrt": "2.0"}
    other = entry_for(entry.directory, "velocity", facts)
    get_or_build(other, facts, Counting(b"another one"))
    other.engine.replace(entry.engine)
    other.record.replace(entry.record)


DAMAGES = (
    truncate,
    flip_a_bit,
    lose_the_engine,
    lose_the_record,
    garble_the_record,
    make_the_record_a_list,
    put_another_engine_there,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_engine_is_found_out_and_built_anew(entry, damage, caplog):
    get_or_build(entry, FACTS, Counting())
    damage(entry)
    with pytest.raises(DamagedEngine):
        entry.read()
    build = Counting()
    assert get_or_build(entry, FACTS, build) == ENGINE and build.count == 1
    assert any(record.levelno == logging.WARNING and "building anew" in record.message for record in caplog.records)
    assert entry.read() == ENGINE


@needs_fork
@pytest.mark.parametrize("step", ["in the build", "engine written", "engine in place", "record written"])
def test_a_build_killed_at_any_step_leaves_nothing_usable(entry, step, monkeypatch):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        replaced, replace = [], Path.replace

        def dying(self, target):
            replaced.append(target)
            if (step, len(replaced)) in {("engine written", 1), ("record written", 2)}:
                die()
            replace(self, target)
            if (step, len(replaced)) == ("engine in place", 1):
                die()

        monkeypatch.setattr(Path, "replace", dying)
        get_or_build(entry, FACTS, die if step == "in the build" else Counting())

    assert in_a_child(killed) == -signal.SIGKILL
    with pytest.raises(DamagedEngine):
        entry.read()
    build = Counting()
    assert get_or_build(entry, FACTS, build) == ENGINE and build.count == 1
    assert leftovers(entry.directory) == [] and not entry.scratch.exists()


@needs_fork
def test_a_rebuild_that_is_killed_does_not_leave_the_old_record_with_a_new_engine(entry, monkeypatch):
    get_or_build(entry, FACTS, Counting())

    def killed():
        replace = Path.replace

        def dying(self, target):
            replace(self, target)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Path, "replace", dying)
        get_or_build(entry, FACTS, Counting(b"x" * len(ENGINE)), rebuild=True)

    assert in_a_child(killed) == -signal.SIGKILL
    with pytest.raises(DamagedEngine):
        entry.read()


def test_a_build_that_fails_leaves_nothing(entry):
    def fails(scratch):
        (scratch / "big.onnx").write_bytes(b"x")
        raise ValueError("no such operation")

    with pytest.raises(ValueError, match="no such operation"):
        get_or_build(entry, FACTS, fails)
    assert list_engines(entry.directory) == [] and leftovers(entry.directory) == [] and not entry.scratch.exists()


@needs_fork
def test_of_two_processes_that_want_one_engine_one_builds(entry, tmp_path):
    log = tmp_path / "builds"

    def wants():
        def build(scratch):
            with log.open("a") as file:
                file.write("built\n")
            time.sleep(0.5)
            return ENGINE

        if get_or_build(entry, FACTS, build) != ENGINE:
            os._exit(1)

    pids = []
    for _ in range(3):
        if (pid := os.fork()) == 0:
            try:
                wants()
                os._exit(0)
            finally:
                os._exit(2)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert log.read_text() == "built\n"


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_a_file_in_the_way_of_the_scratch_folder_is_removed(entry):
    entry.directory.mkdir(mode=0o700)
    entry.scratch.write_bytes(b"x")
    assert get_or_build(entry, FACTS, Counting()) == ENGINE
    assert not entry.scratch.exists()


def test_nothing_is_written_through_a_link(entry, tmp_path):
    """Neither under temporary names that could be guessed, nor under the engine's own."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    entry.directory.mkdir(mode=0o700)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/kept").touch()
    entry.scratch.symlink_to(tmp_path / "folder")

    def build(scratch):
        (scratch / "model.onnx").write_bytes(b"x")
        for kind in (".engine", ".json"):
            for name in (f".{entry.stem}.{os.getpid()}{kind}.tmp", f".{entry.stem}{kind}.tmp", f"{entry.stem}{kind}"):
                (entry.directory / name).symlink_to(victim)
        return ENGINE

    assert get_or_build(entry, FACTS, build) == ENGINE == entry.read()
    assert victim.read_text() == "precious" and not entry.engine.is_symlink() and not entry.record.is_symlink()
    assert [one.name for one in (tmp_path / "folder").iterdir()] == ["kept"]
    assert leftovers(entry.directory) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
class TestFolders:
    def test_a_new_one_is_the_user_s_alone_whatever_the_umask(self, entry):
        before = os.umask(0o002)
        try:
            get_or_build(entry, FACTS, Counting())
        finally:
            os.umask(before)
        assert entry.directory.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
    def test_one_that_others_can_write_to_is_refused_and_not_read(self, entry, mode):
        get_or_build(entry, FACTS, Counting())
        entry.directory.chmod(mode)
        with pytest.raises(PermissionError, match=rf"other users can write .*mode {mode:o}.*chmod go-w"):
            get_or_build(entry, FACTS, Counting())
        entry.directory.chmod(0o755)
        assert get_or_build(entry, FACTS, Counting()) == ENGINE

    def test_one_behind_a_link_is_judged_itself(self, entry, tmp_path):
        open_to_all = tmp_path / "open"
        open_to_all.mkdir()
        open_to_all.chmod(0o777)
        entry.directory.symlink_to(open_to_all)
        with pytest.raises(PermissionError, match="chmod go-w"):
            get_or_build(entry, FACTS, Counting())

    @pytest.mark.parametrize(
        ("owner", "user", "allowed"), [(0, 1000, True), (1000, 1000, True), (1001, 1000, False), (5, 0, False)]
    )
    def test_one_of_another_user_is_refused_unless_that_is_root(self, entry, owner, user, allowed, monkeypatch):
        real = Path.stat
        entry.directory.mkdir(mode=0o700)

        def stat(self, **options):
            found = list(real(self, **options))
            found[4] = owner
            return os.stat_result(found)

        monkeypatch.setattr(Path, "stat", stat)
        monkeypatch.setattr(os, "geteuid", lambda: user)
        with nullcontext() if allowed else pytest.raises(PermissionError, match=f"belongs to user {owner}.*chown {user}"):
            own_folder(entry.directory)


@pytest.mark.parametrize("text", ["[" * 100_000, "{" + '"a":' * 3, "[]", "1", '{"format": 1}', '{"format": 1, "key": []}'])
def test_a_record_that_is_none_is_a_damaged_engine(entry, text):
    get_or_build(entry, FACTS, Counting())
    entry.record.write_text(text)
    with pytest.raises(DamagedEngine):
        entry.read()


# -- list and clear -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    from streamflow.app.cli import main

    return main(["engines", *arguments])


def test_list_and_clear(entry, capsys):
    directory = str(entry.directory)
    assert command("list", "--engine-dir", directory) == 0 and "0 engines" in capsys.readouterr().out
    get_or_build(entry, {**FACTS}, Counting())
    entry.record.write_text(json.dumps({**json.loads(entry.record.read_text()), "bytes": 3}))
    other = entry_for(entry.directory, "decoder", {**FACTS, "part": "decoder"})
    get_or_build(other, {**FACTS, "part": "decoder"}, Counting())
    mine = entry.directory / "my-notes.json"
    mine.write_text("{}")
    assert command("list", "--engine-dir", directory) == 0
    out = capsys.readouterr().out
    assert "2 engines" in out and out.count("DAMAGED") == 1 and "Tiny" in out
    assert command("list", "--json", "--engine-dir", directory) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    assert sorted(one["module"] for one in engines) == ["Tiny", "Tiny"] and sum(bool(one["damaged"]) for one in engines) == 1
    assert command("clear", "--engine-dir", directory) == 0 and "deleted 2 engines" in capsys.readouterr().out
    assert list_engines(entry.directory) == [] and mine.exists()
    assert command("clear", "--json", "--engine-dir", directory) == 0 and json.loads(capsys.readouterr().out)["deleted"] == 0


def test_clear_leaves_an_engine_that_is_being_built(entry):
    get_or_build(entry, FACTS, Counting())
    with entry.locked():
        assert clear_engines(entry.directory) == (0, 0, [entry.stem])
    count, freed, busy = clear_engines(entry.directory)
    assert (count, busy) == (1, []) and freed > len(ENGINE)
    assert list_engines(entry.directory) == []


def test_clear_sweeps_what_a_killed_build_left(entry):
    entry.scratch.mkdir(parents=True)
    (entry.scratch / "weights.onnx").write_bytes(b"x")
    assert clear_engines(entry.directory)[0] == 0 and not entry.scratch.exists()


# -- the key --------------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = scale
        self.register_buffer("table", torch.ones(2), persistent=False)
        self.layout = lambda x, width=64: x
        self.size = {"height": 64}

    def forward(self, x):
        return self.linear(x) * self.scale


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny()


def key_of(module, x=None, options=None, target=None, version="TensorRT 1.0", **part) -> str:
    part = Part("velocity", module, {"x": torch.zeros(2, 4) if x is None else x}, **part)
    options = Options(engine_dir="e") if options is None else options
    target = target or Target()
    return cache.key(cache.facts(part, profile_of(part, options), options, target, version))


def changed(change) -> nn.Module:
    torch.manual_seed(0)
    module = Tiny()
    change(module)
    return module


def add_lora(module, scale=1.0):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False), module)
    module.linear.scaling["default"] = scale


def closing_over(height):
    return lambda z: z.reshape(height, -1)


CHANGES = {
    "a weight by one bit": lambda m: m.linear.weight.data[0, 0].add_(1e-7),
    "a buffer outside of state_dict": lambda m: m.table.zero_(),
    "a LoRA": add_lora,
    "a LoRA, weaker": lambda m: add_lora(m, 0.5),
    "a LoRA, switched off": lambda m: (add_lora(m), m.linear.enable_adapters(False)),
    "an attribute": lambda m: setattr(m, "scale", 2.0),
    "an entry of an attribute": lambda m: m.size.update(height=128),
    "a function's closure": lambda m: setattr(m, "layout", closing_over(64)),
    "another closure": lambda m: setattr(m, "layout", closing_over(128)),
    "its dtype": lambda m: m.half(),
    "its training mode": lambda m: m.eval(),
    "a submodule": lambda m: setattr(m, "linear", nn.Sequential(m.linear)),
}


def test_the_key_changes_with_all_that_changes_the_engine(tiny):
    keys = {name: key_of(changed(change)) for name, change in CHANGES.items()}
    keys |= {
        "nothing": key_of(tiny),
        "another shape": key_of(tiny, torch.zeros(2, 4, 4)),
        "another batch": key_of(tiny, torch.zeros(3, 4)),
        "another dtype": key_of(tiny, torch.zeros(2, 4).half()),
        "a profile": key_of(tiny, options=Options(max_batch=8)),
        "a shared input": key_of(tiny, shared=frozenset({"x"})),
        "tf32": key_of(tiny, options=Options(tf32=True)),
        "workspace": key_of(tiny, options=Options(workspace_gb=1)),
        "optimization level": key_of(tiny, options=Options(optimization_level=1)),
        "another GPU": key_of(tiny, target=Target("NVIDIA GeForce RTX 4090", (8, 9))),
        "another capability": key_of(tiny, target=Target(capability=(12, 0))),
        "another TensorRT": key_of(tiny, version="TensorRT 1.1"),
    }
    for name, key in keys.items():
        assert [other for other, its in keys.items() if its == key] == [name]


@pytest.mark.parametrize("version", ["streamflow", "torch", "diffusers", "onnxscript"])
def test_the_key_changes_with_what_exports(tiny, monkeypatch, version):
    before, found = key_of(tiny), cache.versions()
    assert version in found
    monkeypatch.setattr(cache, "versions", lambda: {**found, version: "0"})
    assert key_of(tiny) != before


def test_the_key_does_not_change_with_what_does_not_matter(tiny):
    x = torch.randn(2, 4)
    assert key_of(tiny) == key_of(copy.deepcopy(tiny)) == key_of(changed(lambda m: None), x)
    for options in (Options(engine_dir="elsewhere"), Options(use_cuda_graph=True), Options(fallback="eager")):
        assert key_of(tiny, options=options) == key_of(tiny)


def test_packed_decoders_of_two_sizes_have_two_keys(pipes):
    """64x128 and 128x64 pixels are as many tokens; what tells them apart lies in a closure of the decoder."""
    from streamflow.models import adapter_for

    pipe = pipes("flux")
    adapter, latents = adapter_for(pipe), torch.zeros(1, 32, 64)
    keys = {key_of(adapter.codec(pipe.vae, h, w).decoder, latents) for h, w in ((64, 128), (128, 64))}
    assert len(keys) == 2
