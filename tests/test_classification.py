"""Every pipeline class of the installed diffusers is classified, and the classes say of themselves what their kind says."""

from __future__ import annotations

import ast
from pathlib import Path

import diffusers
import pytest

from streamflow import StreamFlow
from streamflow.models import FAMILIES, PIPELINES, adapter_for
from streamflow.models.pipeline_kinds import CLASSES

EXPORTED = {name for names in diffusers._import_structure.values() for name in names}
PIPES = {name for name in EXPORTED if name.endswith("Pipeline")}
KINDS = ("adapter", "fallback", "not a flow", "refused")


def _sources() -> dict[str, tuple[ast.ClassDef, str]]:
    """Class name to (its definition, the text of its file), without importing any."""
    found = {}
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = node, text
    return found


SOURCES = _sources()


def _of(kind: str) -> list[str]:
    return [name for name, (own, _) in CLASSES.items() if own == kind]


def _arguments(name: str) -> set[str]:
    """The names of the arguments of a pipeline's call."""
    call = next(node for node in SOURCES[name][0].body if isinstance(node, ast.FunctionDef) and node.name == "__call__")
    return {argument.arg for argument in (*call.args.args, *call.args.kwonlyargs)}


def test_every_pipeline_class_of_diffusers_is_classified_and_no_other():
    assert set(CLASSES) == PIPES, "decide what becomes of new classes in streamflow/models/pipeline_kinds.py"
    assert {kind for kind, _ in CLASSES.values()} == set(KINDS)
    assert all(bool(reason) == (kind == "refused") for kind, reason in CLASSES.values())


def test_the_family_table_and_the_classification_agree():
    adapters = {name for name, family in PIPELINES.items() if family != "fallback" and name in PIPES}
    assert adapters == set(_of("adapter"))
    assert {name for name, family in PIPELINES.items() if family == "fallback"} <= set(_of("fallback"))


def test_no_class_that_is_made_with_a_flow_scheduler_is_said_to_be_no_flow():
    for name in _of("not a flow"):
        init = (
            next((n for n in SOURCES[name][0].body if getattr(n, "name", "") == "__init__"), None)
            if name in SOURCES
            else None
        )
        assert "FlowM" not in (ast.unparse(init) if init else ""), name


def test_every_class_for_the_fallback_takes_what_it_sets():
    for name in _of("fallback"):
        assert {"prompt", "latents", "output_type", "height", "width"} <= _arguments(name), name
        assert "Flow" in SOURCES[name][1], name


class OfNobody:
    """A pipeline class that diffusers does not have."""


def _pipe(name: str):
    """Of a class of that name, which is all that is looked at."""
    return type(name, (OfNobody,), {"scheduler": None, "components": {}, "hf_device_map": None})()


def test_a_refused_class_is_refused_with_its_reason_by_either_way():
    for name in _of("refused"):
        for family in (None, "fallback"):
            with pytest.raises(ValueError) as error:
                adapter_for(_pipe(name), family)
            assert str(error.value) == f"{name} {CLASSES[name][1]}"


def test_other_classes_are_told_what_to_do():
    with pytest.raises(ValueError, match="family='fallback'"):
        adapter_for(_pipe("Krea2Pipeline"))
    with pytest.raises(ValueError, match="family='fallback'") as error:
        StreamFlow(_pipe("SomethingNewPipeline"))
    assert all(family in str(error.value) for family in FAMILIES)
    with pytest.raises(ValueError, match="not a flow"):
        adapter_for(_pipe("PixArtSigmaPipeline"))
    with pytest.raises(ValueError, match="WanPipeline draws films"):
        adapter_for(type("MyWan", (type(_pipe("WanPipeline")),), {})())
