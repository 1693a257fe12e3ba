"""A video without end, whose prompt changes while it is drawn: the embedded video model, offline, on a CPU.

    python examples/video_stream.py

Writes outputs/video_stream.webp. Each chunk of nine frames is drawn under what the chunks before it have left. `streamflow
video --model embedded-video` writes an .mp4, and `streamflow live --model embedded-video` shows the frames in a window.
"""

import argparse
from pathlib import Path

from streamflow import VideoStream, models


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded-video", help="hub id or folder of a video model (default: %(default)s)")
    p.add_argument("--prompt", default="a hamburger, 3d render, swaying", help="the first (default: %(default)s)")
    p.add_argument("--to", default="a hamburger, 3d render, on a pink background, pulsing", help="the second")
    p.add_argument("--frames", type=int, default=36, help="under each prompt (default: %(default)s)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/video_stream.webp"), help=".webp or .gif")
    a = p.parse_args(argv)

    with VideoStream(models.load(a.model)) as stream:
        stream.prepare(a.prompt, num_inference_steps=a.steps)
        frames = [frame.image for frame in stream.frames(a.frames)]
        stream.update_prompt(a.to)  # acts at the next chunk that is not begun
        frames += [frame.image for frame in stream.frames(a.frames)]
    a.output.parent.mkdir(parents=True, exist_ok=True)
    duration = round(1000 / stream.fps)
    frames[0].save(a.output, save_all=True, append_images=frames[1:], duration=duration, loop=0)
    print(f"wrote {a.output}: {len(frames)} frames from {a.prompt!r} to {a.to!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
