"""A video restyled, frame by frame, with its times and its sound. `streamflow video` does the same with every setting.

    python examples/vid2vid/main.py --input dance.mp4 --prompt "a fox, 3d render" --output outputs/fox.mp4

Needs PyAV: pip install "streamflow-rf[video]".
"""

import argparse
from itertools import chain
from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import uint8_pixels
from streamflow.io import TimedImage, open_source
from streamflow.io.recorder import Recorder
from streamflow.samples import CLIP


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", type=Path, default=CLIP, help="a video (default: the sample clip)")
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--strength", type=float, default=0.6, help="0 to 1 (default: %(default)s)")
    p.add_argument("--feedback", type=float, default=0.2, help="of the last result, against flicker (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/vid2vid.mp4"), help="default: %(default)s")
    a = p.parse_args(argv)

    video = open_source(str(a.input))
    video.open()
    first = video.read()
    height, width = first.pixels.shape[:2]
    recorder = Recorder(a.output, video.rate, clock=False, audio=video.audio)
    recorder.open()
    options = {"like": (width, height), "stream_options": {"feedback": a.feedback}}
    with StreamFlowWrapper(a.model, cfg_type="none", warmup=0, **options) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps, strength=a.strength)
        images = chain([first], iter(video.read, None))
        for frame in wrapper.stream.frames(image.pixels for image in images):
            recorder.write(TimedImage(uint8_pixels(frame.wait().image[None])[0], 0.0))
    recorder.close()
    video.close()
    print(f"wrote {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
