"""The child process of `background`: `python -m streamflow.acceleration.tensorrt.child JOB MADE` builds what the job file
says and writes the engine's path to MADE. Its last words on stderr are the error."""

from __future__ import annotations

import sys
from pathlib import Path

from streamflow.acceleration.tensorrt.background import read_job
from streamflow.acceleration.tensorrt.engines import make
from streamflow.acceleration.tensorrt.errors import MissingTensorRT, TensorRTError


def main(job: str, made: str) -> int:
    """Build one engine into the cache; 1 where TensorRT could not, said on stderr."""
    try:
        entry, _ = make(**read_job(Path(job)))
    except (TensorRTError, MissingTensorRT) as error:
        print(error, file=sys.stderr)
        return 1
    Path(made).write_text(str(entry.engine), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
