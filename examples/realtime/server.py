"""The page, on http://127.0.0.1:7860: images that follow a prompt as it is typed, or a camera restyled live.

    python examples/realtime/server.py
    python examples/realtime/server.py --model stabilityai/stable-diffusion-3.5-medium --device cuda --port 8000

The same as `streamflow serve`; `--help` lists the rest.
"""

import sys

from streamflow.app.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())
