"""As fast as one GPU draws: a tiny VAE, compilation and CUDA graphs, one image a tick, shown in a window.

    python examples/optimal-performance/single.py --model stabilityai/stable-diffusion-3.5-medium --steps 4
    python examples/optimal-performance/single.py --sink null --seconds 10

The first prompt takes as long as the compiler does; from then on every call is a replay.
"""

import argparse

from streamflow import StreamFlowWrapper


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--prompt", default="a red apple, 3d render", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--acceleration", default="auto", help="auto: compile with CUDA graphs on a GPU (default: %(default)s)")
    p.add_argument("--sink", default="window", help="default: %(default)s")
    p.add_argument("--fps", type=float, default=120, help="images a second at most (default: %(default)s)")
    p.add_argument("--seconds", type=float, help="end after so long (default: when the window is closed)")
    a = p.parse_args(argv)

    fast = {"use_tiny_vae": True, "acceleration": a.acceleration, "cfg_type": "none"}
    with StreamFlowWrapper(a.model, mode="txt2img", **fast) as wrapper:
        wrapper.prepare(a.prompt, num_inference_steps=a.steps)
        with wrapper.stream.live(None, a.sink, target_fps=a.fps) as show:
            found = show.wait(a.seconds)
    print(f"{found.drawn_per_second:.1f} images a second drawn, {found.shown} shown")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
