"""The whole training in one go: autoencoder, latents, flow, reflow, polish of the decoder, tiny twin. Each phase
resumes by itself when run again.

    torchrun --nproc-per-node 2 examples/train_emoji/train.py
"""

import argparse

import flow
import latents
import polish
import reflow
import tiny_vae
import vae
from training import add_step_options, options, worker


def phase(args: argparse.Namespace, seconds: float, **more) -> argparse.Namespace:
    """The options of one phase."""
    return argparse.Namespace(**{**vars(args), "seconds": seconds, "stop_after": float("inf"), **more})


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--vae-seconds", type=float, default=240)
    parser.add_argument("--flow-seconds", type=float, default=900)
    parser.add_argument("--pair-seconds", type=float, default=60)
    parser.add_argument("--reflow-seconds", type=float, default=240)
    parser.add_argument("--polish-seconds", type=float, default=60)
    parser.add_argument("--tiny-seconds", type=float, default=60)
    parser.add_argument("--batch", type=int, default=0, help="latents a worker and step (0: each phase's own)")
    add_step_options(parser)
    arguments = parser.parse_args()
    sized = {"batch": arguments.batch} if arguments.batch else {}
    with worker() as me:
        vae.train(me, phase(arguments, arguments.vae_seconds), vae.Recipe(**sized))
        if not list(arguments.work.glob(f"latents-{me.rank}.pt")):
            latents.build(me, arguments)
        flow.train(me, phase(arguments, arguments.flow_seconds), flow.Recipe(**sized))
        reflow.train(me, phase(arguments, arguments.reflow_seconds), reflow.Recipe(**sized))
        polish.train(me, phase(arguments, arguments.polish_seconds), polish.Recipe(**sized))
        tiny_vae.train(me, phase(arguments, arguments.tiny_seconds), tiny_vae.Recipe(**sized))
