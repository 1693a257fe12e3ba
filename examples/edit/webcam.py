"""A webcam redrawn by an edit model, which sees every camera frame as a reference; a style image beside it is optional.

    python examples/edit/webcam.py --prompt "the same scene as an oil painting"
    python examples/edit/webcam.py --style style.png --prompt "the first image in the style of the second"

Needs a GPU, OpenCV and pygame: pip install "streamflow-rf[live]". Offline: `--model outputs/klein` of random_klein.py.
`streamflow live --in camera:0 --model ... --reference style.png` does the same with keys, OSC and MIDI.
"""

import argparse

from PIL import Image

from streamflow import StreamFlowWrapper


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", default="camera:0", help="default: %(default)s")
    p.add_argument("--sink", default="window", help="default: %(default)s")
    p.add_argument("--model", default="black-forest-labs/FLUX.2-klein-4B", help="hub id or folder (default: %(default)s)")
    p.add_argument("--prompt", default="the same scene as an oil painting", help="default: %(default)s")
    p.add_argument("--style", help="an image that every frame has as a second reference")
    p.add_argument("--size", type=int, nargs=2, default=(512, 512), help="width and height (default: 512 512)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--acceleration", default="auto", help="none, compile, ... (default: %(default)s)")
    p.add_argument("--fps", type=float, default=8, help="images a second that are shown (default: %(default)s)")
    p.add_argument("--seconds", type=float, help="end after so long (default: when the window is closed)")
    a = p.parse_args(argv)

    width, height = a.size
    options = {"acceleration": a.acceleration, "use_tiny_vae": False}
    with StreamFlowWrapper(a.model, cfg_type="none", width=width, height=height, **options) as wrapper:
        if a.style:
            wrapper.stream.set_reference("style", Image.open(a.style).resize((width, height)))
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        with wrapper.stream.live(a.source, a.sink, target_fps=a.fps) as show:
            print(show.wait(a.seconds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
