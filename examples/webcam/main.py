"""A webcam restyled in a window, at even intervals; the last good image stays where the camera is unplugged.

    python examples/webcam/main.py --prompt "a fox, 3d render"
    python examples/webcam/main.py --source camera:1 --sink virtualcam --fps 15

Needs OpenCV and pygame: pip install "streamflow-rf[live]". `streamflow live` does the same with keys, OSC and MIDI.
"""

import argparse

from streamflow import StreamFlowWrapper


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", default="camera:0", help="default: %(default)s")
    p.add_argument("--sink", default="window", help="default: %(default)s")
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--strength", type=float, default=0.6, help="0 to 1 (default: %(default)s)")
    p.add_argument("--fps", type=float, default=30, help="images a second that are shown (default: %(default)s)")
    p.add_argument("--seconds", type=float, help="end after so long (default: when the window is closed)")
    a = p.parse_args(argv)

    with StreamFlowWrapper(a.model, cfg_type="none") as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps, strength=a.strength)
        with wrapper.stream.live(a.source, a.sink, target_fps=a.fps) as show:
            print(show.wait(a.seconds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
