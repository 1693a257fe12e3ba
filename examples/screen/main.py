"""A part of the screen restyled in a window beside it.

    python examples/screen/main.py --left 0 --top 0 --width 512 --height 512 --prompt "a fox, flat vector"

Needs mss and pygame: pip install "streamflow-rf[live]".
"""

import argparse

from streamflow import StreamFlowWrapper
from streamflow.io import open_sink, open_source


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--monitor", type=int, default=1, help="default: %(default)s")
    for name, pixels in (("left", 0), ("top", 0), ("width", 512), ("height", 512)):
        p.add_argument(f"--{name}", type=int, default=pixels, help="of the part, in pixels (default: %(default)s)")
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--strength", type=float, default=0.6, help="0 to 1 (default: %(default)s)")
    p.add_argument("--sink", default="window", help="default: %(default)s")
    p.add_argument("--seconds", type=float, help="end after so long (default: when the window is closed)")
    a = p.parse_args(argv)

    screen = open_source(f"screen:{a.monitor}", region=(a.left, a.top, a.width, a.height))
    with StreamFlowWrapper(a.model, cfg_type="none") as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps, strength=a.strength)
        with wrapper.stream.live(screen, open_sink(a.sink)) as show:
            print(show.wait(a.seconds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
