"""Every pipeline class of the installed diffusers has a kind, the same as in tests/data/pipeline_kinds.json, and its source
agrees with it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import diffusers
import pytest

from streamflow import StreamFlow
from streamflow.models import FAMILIES, PIPELINES, adapter_for
from streamflow.models.pipeline_kinds import Kind, kind_of

EXPORTED = {name for names in diffusers._import_structure.values() for name in names}
PIPES = {name for name in EXPORTED if name.endswith("Pipeline")}
SNAPSHOT = json.loads((Path(__file__).parent / "data" / "pipeline_kinds.json").read_text(encoding="utf-8"))
ADAPTERS = {name for name, family in PIPELINES.items() if family != "fallback" and name in PIPES}


def _texts() -> dict[str, str]:
    """Class name to the text of its file, without importing any."""
    texts = [
        path.read_text(encoding="utf-8") for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")
    ]
    return {name: text for text in texts for name in re.findall(r"^class (\w+)", text, re.MULTILINE)}


TEXTS = _texts()


KINDS = {name: kind_of(getattr(diffusers, name)) for name in PIPES}


def _of(kind: str) -> list[str]:
    return [name for name, own in KINDS.items() if own.name == kind and name not in ADAPTERS]


def _arguments(name: str) -> set[str]:
    """The names of the arguments of a pipeline's call."""
    body = next(node.body for node in ast.parse(TEXTS[name]).body if isinstance(node, ast.ClassDef) and node.name == name)
    call = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__call__")
    return {argument.arg for argument in (*call.args.args, *call.args.kwonlyargs)}


def test_every_pipeline_class_of_diffusers_has_the_kind_of_the_snapshot():
    """The snapshot lists the classes of each kind or reason for refusal, without "Pipeline" at the end of their names."""
    listed = {f"{name}Pipeline": kind for kind, names in SNAPSHOT.items() for name in names.split()}
    assert set(listed) == PIPES, "check the kinds of new classes, and add them to tests/data/pipeline_kinds.json"
    found = {name: kind.reason or kind.name for name, kind in KINDS.items()}
    assert {**found, **dict.fromkeys(ADAPTERS, "adapter")} == listed
    assert all(bool(kind.reason) == (kind.name == "refused") for kind in KINDS.values())


def test_the_family_table_and_the_kinds_agree():
    assert not ADAPTERS & {name for name, kind in KINDS.items() if kind.name == "not a flow"}
    assert {name for name, family in PIPELINES.items() if family == "fallback"} <= set(_of("fallback"))


def test_no_class_that_is_made_with_a_flow_scheduler_is_said_to_be_no_flow():
    assert [name for name in _of("not a flow") if "FlowM" in TEXTS.get(name, "")] == []


def test_every_class_for_the_fallback_takes_what_it_sets():
    for name in _of("fallback"):
        assert {"prompt", "latents", "output_type", "height", "width"} <= _arguments(name), name
        assert "Flow" in TEXTS[name], name


def _pipe(cls: type):
    """A pipeline of this class without parts."""
    pipe = object.__new__(cls)
    vars(pipe).update(scheduler=None, hf_device_map=None)
    return pipe


def test_a_refused_class_is_refused_with_its_reason_by_either_way():
    for name in _of("refused"):
        for family in (None, "fallback"):
            with pytest.raises(ValueError) as error:
                adapter_for(_pipe(getattr(diffusers, name)), family)
            assert str(error.value) == f"{name} {KINDS[name].reason}"


def test_a_class_of_no_known_kind_has_none():
    assert kind_of(type("SomethingNewPipeline", (), {})) is None
    assert kind_of(type("MyPipeline", (diffusers.DiffusionPipeline,), {})) is None
    assert kind_of(type("MyFlux", (diffusers.FluxPipeline,), {})) == Kind("fallback")


def test_the_errors_for_other_classes_name_a_remedy():
    with pytest.raises(ValueError, match="family='fallback'"):
        adapter_for(_pipe(diffusers.Krea2Pipeline))
    with pytest.raises(ValueError, match="family='fallback'") as error:
        StreamFlow(_pipe(type("SomethingNewPipeline", (), {})))
    assert all(family in str(error.value) for family in FAMILIES)
    with pytest.raises(ValueError, match="not a flow"):
        adapter_for(_pipe(diffusers.PixArtSigmaPipeline))
    with pytest.raises(ValueError, match="WanPipeline draws videos"):
        adapter_for(_pipe(type("MyWan", (diffusers.WanPipeline,), {})))
