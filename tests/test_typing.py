"""What is public has types that a type checker can use: pyright agrees with a script that uses it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="needs pyright: python env/install.py --dev")
def test_pyright_agrees_with_a_use_of_every_public_call(tmp_path):
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)], "include": ["typed_use.py"]}))
    (tmp_path / "typed_use.py").write_bytes((ROOT / "tests/typed_use.py").read_bytes())
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)]
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    said = json.loads(run.stdout)
    told = [f"{one['range']['start']['line'] + 1}: {one['message']}" for one in said["generalDiagnostics"]]
    assert said["summary"]["filesAnalyzed"] == 1 and told == []
