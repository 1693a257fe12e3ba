"""The notebook is committed with its outputs, and they are what it gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NEEDS = "needs nbclient, ipykernel and matplotlib: python env/install.py --dev --bench"
BOOK = Path(__file__).parent.parent / "examples" / "straightness.ipynb"


def outputs(book: dict) -> list[list[tuple[str, str]]]:
    """(kind, text) of every output of every code cell; what libraries say on stderr is not one."""
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    return [[_output(one) for one in cell["outputs"] if one.get("name") != "stderr"] for cell in cells]


def _output(one: dict) -> tuple[str, str]:
    if one["output_type"] == "stream":
        return "text", "".join(one["text"])
    return ("picture", "") if "image/png" in one.get("data", {}) else (one["output_type"], "")


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_the_notebook_has_its_outputs_and_is_small():
    saved = outputs(json.loads(BOOK.read_text(encoding="utf-8")))
    assert {kind for cell in saved for kind, _ in cell} == {"text", "picture"}
    assert all(saved[1:]), "every cell after the first shows something"
    assert BOOK.stat().st_size < 400_000


@pytest.mark.slow
def test_the_notebook_runs_and_gives_its_saved_outputs(tmp_path, monkeypatch):
    for module in ("ipykernel", "matplotlib"):
        pytest.importorskip(module, reason=NEEDS)
    nbclient = pytest.importorskip("nbclient", reason=NEEDS)
    import nbformat

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    book = nbformat.read(BOOK, as_version=4)
    saved = outputs(book)
    where = {"metadata": {"path": str(BOOK.parent)}}
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=where).execute()
    given = outputs(book)
    assert [[kind for kind, _ in cell] for cell in given] == [[kind for kind, _ in cell] for cell in saved]
    for (_, now), (_, then) in zip(sum(given, []), sum(saved, []), strict=True):
        assert re.sub(r"\d+\.\d+", "", now) == re.sub(r"\d+\.\d+", "", then)
        assert numbers(now) == pytest.approx(numbers(then), rel=0.05)
