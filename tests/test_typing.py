"""The types of the package, checked by pyright with the settings of pyproject.toml."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="needs pyright (env/install.py --dev)")
def test_pyright_finds_no_errors():
    run = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    report = json.loads(run.stdout)
    errors = [one for one in report["generalDiagnostics"] if one["severity"] == "error"]
    found = [f"{one['file']}:{one['range']['start']['line'] + 1}: {one['message']}" for one in errors]
    assert report["summary"]["filesAnalyzed"] > 100 and not found, "\n".join(found)
