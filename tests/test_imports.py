"""The package's import order, read off the sources: a row imports only its own and the rows above it, without cycles."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import types
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import streamflow

ROOT = Path(streamflow.__file__).parent

# The entries of the package's folder: a row imports only its own and the rows above it. A folder orders its own files.
ROWS = (
    (
        *("_version", "_environment", "_files", "_grad_mode", "_queue", "_threads", "_validation", "_decibels"),
        *("_command_line", "pretrained", "samples"),
    ),
    ("flow", "image_utils", "image_filter", "io"),
    ("conditioning",),
    ("models",),
    ("stream",),
    ("acceleration",),
    ("parallel",),
    ("live",),
    ("pipeline", "video"),
    ("wrapper", "benchmark"),
    ("app", "__main__"),
    ("",),
)
ACCELERATION = 5  # imported by later rows inside functions only
OWNERS = {
    "streamdiffusion": ("pipeline",),
    "diffusers": ("models", "benchmark.full_size"),
    "tensorrt": ("acceleration",),
    "onnx": ("acceleration",),
    "onnxruntime": ("acceleration",),
    "openvino": ("acceleration",),
    "polygraphy": ("acceleration",),
    "torchao": ("acceleration",),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def row_of(module: str) -> int:
    entry = module.split(".")[0]
    found = [i for i, row in enumerate(ROWS) if entry in row]
    assert found, f"streamflow/{entry} is in no row of the import order: give it one in ROWS"
    return found[0]


def imports(tree: ast.AST) -> set[tuple[str, bool]]:
    """(absolute module, inside a function) for everything a module imports at run time, names of modules included."""
    found = set()

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update((alias.name, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found.update((target(node.module, alias.name), inside) for alias in node.names)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def target(module: str, name: str) -> str:
    """What `from module import name` imports: a module of this package, if name is one, else module."""
    return f"{module}.{name}" if f"{module}.{name}".removeprefix("streamflow.") in MODULES else module


def inner(tree: ast.AST) -> set[tuple[str, bool]]:
    """The imports of this package's modules, without `streamflow.`."""
    own = {(name, inside) for name, inside in imports(tree) if name.split(".")[0] == "streamflow"}
    return {(name.removeprefix("streamflow").removeprefix("."), inside) for name, inside in own}


@pytest.mark.parametrize("module", MODULES)
def test_a_row_imports_only_rows_above_it(module):
    own = row_of(module)
    for name, inside in inner(MODULES[module]):
        assert row_of(name) <= own, f"{module} (row {own}) imports {name} (row {row_of(name)})"
        if row_of(name) == ACCELERATION < own and name != "acceleration.accelerator":
            assert inside or own == ACCELERATION + 1, f"{module} imports {name} outside of a function"


def test_there_are_no_cycles():
    TopologicalSorter({module: {name for name, _ in inner(tree)} for module, tree in MODULES.items()}).prepare()


@pytest.mark.parametrize("package", OWNERS)
def test_only_its_owner_imports_a_heavy_package(package):
    users = {m for m, tree in MODULES.items() if any(name.split(".")[0] == package for name, _ in imports(tree))}
    assert {m for m in users if m not in OWNERS[package] and m.split(".")[0] not in OWNERS[package]} == set()


@pytest.mark.extras
@pytest.mark.skipif(None in map(importlib.util.find_spec, ("fastapi", "aiortc")), reason="needs the extras web and webrtc")
def test_every_public_name_says_what_it_is():
    """Modules, classes, functions and methods; what overrides inherits its docstring. Fields are told in their class's."""
    silent = []
    for name in (name for name in MODULES if not name.endswith("__main__")):
        module = importlib.import_module(f"streamflow.{name}".rstrip("."))
        found = {"": module, **{key: one for key, one in vars(module).items() if of(one, module)}}
        for one in list(found.values())[1:]:
            if inspect.isclass(one):
                told = {field.name for field in dataclasses.fields(one)} if dataclasses.is_dataclass(one) else ()
                methods = {key for key, it in vars(one).items() if isinstance(it, METHODS) and key not in told}
                found |= {f"{one.__name__}.{key}": getattr(one, key) for key in methods}
        silent += [f"{name}.{key}" for key, it in found.items() if not re.search(r"(^|\.)_", key) and not inspect.getdoc(it)]
    assert silent == []


METHODS = (types.FunctionType, property, staticmethod, classmethod)


def of(one, module):
    return (inspect.isclass(one) or inspect.isfunction(one)) and one.__module__ == module.__name__


def test_families_are_named_by_string_and_imported_on_use():
    from streamflow.models import FAMILIES

    top = {name for name, inside in inner(MODULES["models"]) if not inside}
    assert top == set()
    for where in (named for named in FAMILIES.values() if isinstance(named, str)):
        module, _, cls = where.partition(":")
        tree = MODULES[module.removeprefix("streamflow.")]
        assert cls in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


FLAGS = """
import os, json, sys, threading, torch
def flags():
    return {
        "grad": torch.is_grad_enabled(),
        "tf32 matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32 cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "precision": torch.get_float32_matmul_precision(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": torch.get_rng_state().sum().item(),
        "python threads": threading.active_count(),
        "files": sorted(os.listdir()),
    }
torch.manual_seed(0)
before = flags()
import streamflow
for name in streamflow.__all__:
    getattr(streamflow, name)
watched = ("streamflow.models.", "streamdiffusion.acceleration", "tensorrt")
loaded = [name for name in sys.modules if name.startswith(watched)]
families = [name for name in loaded if name.startswith("streamflow.models.families.")]
json.dump([before, flags(), families, [n for n in loaded if "models" not in n]], open(sys.argv[1], "w"))
"""


@pytest.mark.slow
def test_nothing_happens_at_import(tmp_path):
    """No print, no folder, no global flag, no family and no TensorRT layer, StreamDiffusion's included."""
    empty, answer = tmp_path / "empty", tmp_path / "answer.json"
    empty.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", FLAGS, str(answer)],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    before, after, families, accelerated = json.loads(answer.read_text())
    assert after == before
    assert families == [] and accelerated == []
