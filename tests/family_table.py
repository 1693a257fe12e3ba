"""The tables of families in docs/models.md, made of what the parity tests measured.

    python -m pytest -m "slow or not slow" tests/test_parity.py tests/test_families.py tests/test_references.py \
        --families static/families.json
    python tests/family_table.py

The first writes down what was found, family by family; the second writes the tables. A test compares them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from streamflow import models

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "static" / "families.json"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by tests/family_table.py -->\n", "<!-- end -->\n"
FAMILIES_HEAD = (
    *("family", "pipeline", "guidance", "image-to-image", "references", "image prompts", "diffusers"),
    "differences, what is refused",
)
EXACT_HEAD = ("family", "row by row", "in one batch", "the pipeline's own batch", "image-to-image")
EXPLAINED = """\
In the column image-to-image, "strength of ..." stands where diffusers has no such pipeline for the family: `strength` then
counts as it does in the pipeline that is named. The column references has the number of reference images that a frame takes;
where it takes any, the image of a call is the first, and `image_as="start"` draws from it instead. The column image prompts
has the number of IP-Adapters at once. The column diffusers has the oldest version that has the family.

How exact each family is, against its pipeline's own call:
"""
GUIDANCE = ("none", "full", "self", "initialize")


class Found:
    """What the tests find, by family; the worst of all cases is kept."""

    def __init__(self) -> None:
        self.families: dict[str, dict[str, Any]] = {}

    def _of(self, family: str) -> dict[str, Any]:
        empty = {"guidance": [], "equal": [], "error": None, "noise": None, "image": None}
        return self.families.setdefault("flux" if family == "schnell" else family, empty)

    def equal(self, family: str, cfg_type: str, dtype: Any) -> None:
        """Row by row, under this guidance, in this dtype, the stream's bits are the pipeline's."""
        self._add(family, "guidance", cfg_type)
        self._add(family, "equal", str(dtype).removeprefix("torch."))

    def guided(self, family: str, cfg_type: str) -> None:
        """Under this guidance of its own, streamed equals the sequential loop."""
        self._add(family, "guidance", cfg_type)

    def error(self, family: str, error: float, noise: float | None = None) -> None:
        """In one batch the stream is so far from the pipeline's frames one by one, and the pipeline's own batch so far."""
        self._most(family, "error", error)
        if noise is not None:
            self._most(family, "noise", noise)

    def image(self, family: str, error: float) -> None:
        """From an image the stream is so far from the image pipeline."""
        self._most(family, "image", error)

    def _add(self, family: str, key: str, value: str) -> None:
        kept = self._of(family)[key]
        if value not in kept:
            kept.append(value)
            kept.sort()

    def _most(self, family: str, key: str, value: float) -> None:
        kept = self._of(family)
        kept[key] = max(value, kept[key] or 0.0)

    def save(self, path: Path) -> None:
        """Write what was found; families that were not looked at stay as they are in the file."""
        before = json.loads(path.read_text())["families"] if path.exists() else {}
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        result = {"versions": versions, "families": dict(sorted({**before, **self.families}.items()))}
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def tables(result: dict[str, Any]) -> str:
    """Both tables in Markdown: what each family does, and how exact it is."""
    found = {family: result["families"][family] for family in models.FAMILIES if family in result["families"]}
    does = [_does(family, one) for family, one in found.items()]
    exact = [_exact(family, one) for family, one in found.items()]
    return f"{_table(FAMILIES_HEAD, does)}\n{EXPLAINED}\n{_table(EXACT_HEAD, exact)}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def _does(family: str, found: dict[str, Any]) -> list[str]:
    adapter = models.adapter_class(family)
    selected = "" if adapter.text_pipeline in models.PIPELINES else f' with `family="{family}"`'
    return [
        f"`{family}`",
        f"`{adapter.text_pipeline}`{selected}",
        ", ".join(f"`{one}`" for one in GUIDANCE if one in found["guidance"]),
        f"`{adapter.image_pipeline}`" if found["image"] is not None else f"strength of `{adapter.image_pipeline}`",
        _references(adapter),
        _image_prompts(adapter),
        adapter.since,
        adapter.note,
    ]


def _references(adapter: type[models.adapter.FlowAdapter]) -> str:
    if adapter.reference is None:
        return ""
    module, _, name = adapter.reference.partition(":")
    rule = getattr(import_module(module), name)
    most = "any" if rule.most is None else str(rule.most)
    return f"{most}, at least {rule.least}" if rule.least and rule.most is None else most


def _image_prompts(adapter: type[models.adapter.FlowAdapter]) -> str:
    if adapter.image_prompt is None:
        return ""
    module, _, name = adapter.image_prompt.partition(":")
    most = getattr(import_module(module), name).most
    return "any" if most is None else str(most)


def _exact(family: str, found: dict[str, Any]) -> list[str]:
    return [
        f"`{family}`",
        f"equal in {', '.join(found['equal'])}" if found["equal"] else "not to the bit",
        _number(found["error"]),
        "" if found["noise"] is None else _number(found["noise"]),
        "" if found["image"] is None else _number(found["image"]),
    ]


def _number(error: float) -> str:
    return f"{error:.0e}" if error else "equal"


def in_page(text: str, made: str) -> str:
    """The page's text with these tables in the place of those that it has."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + made + END + after


def main() -> int:
    made = in_page(PAGE.read_text(encoding="utf-8"), tables(json.loads(RESULTS.read_text(encoding="utf-8"))))
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
