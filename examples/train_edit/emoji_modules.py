"""Makes the modules of examples/train_emoji importable: `captions`, `model_folder`, `pack` and `training`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EMOJI = HERE.parent / "train_emoji"
HOLDOUT = EMOJI / "holdout.json"

if str(EMOJI) not in sys.path:
    sys.path.append(str(EMOJI))
