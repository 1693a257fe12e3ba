"""Trains the video model and writes it as a Helios folder of diffusers.

    python examples/train_video/train.py --data .cache/emoji/pack128.tar --output .cache/video/model

Three phases, each of so many seconds. `vae` learns chunks of 9 images. `flow` learns the rectified flow of a chunk's
latents, x = (1 - sigma) x0 + sigma noise, v = noise - x0, after latents of the chunks before with some noise on them. `own`
goes on with chunks that the flow has drawn itself as the last chunk before, and from where its own steps get to: from there
it learns to lead back to the clip, so that errors do not grow from chunk to chunk, and four steps are enough.

A run that is stopped goes on from --work when it is started again. --begin takes the weights of a folder that an earlier run
has written; with `--vae 0` its VAE stays as it is.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import emoji_folder  # noqa: F401
import torch
from clips import Clips, Prompts, all_words, training_images
from diffusers import AutoencoderKLWan, HeliosPipeline
from pack import read_pack
from torch import nn
from training import Phase, Worker, half_type, in_half, load_average, worker
from transformers import PreTrainedTokenizerFast
from video_flow import Losses, Recipe, Store, VaeLoss
from video_model import (
    SHIPPED,
    TINY,
    TOKENS,
    Codec,
    VideoFlow,
    build_vae,
    flat_convolutions,
    measure_latents,
    pipeline,
    train_tokenizer,
    write,
)

PHASES = {"vae": 190.0, "flow": 200.0, "own": 380.0}  # seconds


def is_matrix(name: str) -> bool:
    """Matrices of the flow that Muon trains: those of the blocks."""
    return "blocks." in name and name.endswith("weight")


def is_convolution(name: str) -> bool:
    """Matrices of the VAE that Muon trains: all but those of the convolutions at the latents."""
    return name.endswith("weight") and "quant_conv" not in name


class Run:
    """One run of the script: its data, its networks and its clock."""

    def __init__(self, args, me: Worker):
        self.args, self.me, self.began, self.device = args, me, time.monotonic(), me.device
        torch.manual_seed(args.seed * me.count + me.rank)
        sizes = {name: getattr(args, name) for name in ("clips", "batch", "fresh", "stored") if getattr(args, name)}
        self.recipe, self.shape = Recipe(**sizes), TINY if args.tiny else SHIPPED
        self.running = torch.zeros((), device=self.device)  # the loss, averaged over about 50 steps
        self.begin = args.begin and HeliosPipeline.from_pretrained(args.begin)
        pack, named = training_images(read_pack(args.data), args.concepts, args.others)
        self.tokenizer = self._tokenizer(all_words(pack.rows[:named]))
        prompts = Prompts(pack.rows, named, self._encode, TOKENS, self.tokenizer.eos_token_id, self.device)
        self.source = Clips(pack, named, prompts)
        self.say(f"{len(pack.rows)} images, {named} of them with names, {len(self.tokenizer)} words")

    def say(self, text: str) -> None:
        if self.me.leads:
            print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _tokenizer(self, texts: list[str]) -> PreTrainedTokenizerFast:
        folder = self.args.work / "tokenizer"
        if self.me.leads and not folder.exists():
            tokenizer = self.begin.tokenizer if self.begin else train_tokenizer(texts, self.shape.words)
            tokenizer.save_pretrained(folder)
        self.me.barrier()
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def path(self, name: str) -> Path:
        return self.args.work / f"{name}.pt"

    def train(self, name: str, module: nn.Module, lr: float, loss_of, matrices=lambda name: False, begin=None) -> None:
        """A phase, or what is left of it, in pieces that each end with a checkpoint."""
        options = argparse.Namespace(seconds=getattr(self.args, name), no_graph=self.args.no_graph)
        if options.seconds <= 0:
            return
        phase = Phase.start(self.me, self.path(name), module, options, lr, matrices, begin=begin)
        phase.clock.every = 20 if self.device.type == "cuda" else 1

        def averaged():
            loss, shown = loss_of()
            self.running.copy_(torch.where(self.running == 0, loss, torch.lerp(self.running, loss, 0.02)).detach())
            return loss, {"averaged": self.running, **shown}

        self.running.zero_()
        while self.me.agreed(phase.clock.spent < phase.clock.seconds):
            phase.run(averaged, self.args.checkpoint)
            self.say(f"{name}: step {phase.step}, {phase.clock.spent:.0f} of {phase.clock.seconds:.0f} s, {phase.note()}")

    # -- the VAE -----------------------------------------------------------------------------------------------------------

    def vae(self) -> None:
        recipe = self.recipe
        vae = flat_convolutions(copy.deepcopy(self.begin.vae) if self.begin else build_vae(self.shape))
        loss = VaeLoss(vae, recipe)

        def loss_of():
            value, error = in_half(self.me, loss, self.source.some_chunks(recipe.clips))
            return value, {"error": error}

        self.train("vae", vae, recipe.vae_lr, loss_of, is_convolution)

    def finished_vae(self) -> AutoencoderKLWan:
        """The trained VAE with the statistics of its latents."""
        if self.begin and not self.path("vae").exists():
            return copy.deepcopy(self.begin.vae).to(self.device).eval().requires_grad_(False)
        vae, path = load_average(self.path("vae"), build_vae(self.shape)).to(self.device), self.args.work / "latents.json"
        if self.me.leads and not path.exists():
            count = 64 if self.device.type == "cuda" else 2
            measure_latents(vae, (self.source.some_chunks(16) for _ in range(count)))
            path.write_text(json.dumps({name: vae.config[name] for name in ("latents_mean", "latents_std")}))
        self.me.barrier()
        vae.register_to_config(**json.loads(path.read_text()))
        return vae.eval().requires_grad_(False)

    # -- the flow ----------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """The network, and the store of encoded sequences."""
        self.network = VideoFlow(self.shape, len(self.tokenizer)).to(self.device)
        if self.begin:
            self.network.load(self.begin)
        if not self.args.no_compile:
            for block in self.network.transformer.blocks:
                block.compile(dynamic=False)
        vae = flat_convolutions(self.finished_vae()).to(half_type(self.me))
        store = Store(self.source, Codec.of(vae), self.recipe.stored)
        store.fill(min(self.recipe.stored, 16 if self.device.type == "cuda" else 1))
        self.losses = Losses(self.me, self.network, store, self.recipe)
        self.say(f"{self.recipe.stored} sequences encoded, deviation {store.latents[:, 1:].float().std():.3f}")

    def flow(self) -> None:
        self.train("flow", self.network, self.recipe.flow_lr, self.losses.flow, is_matrix)

    def own(self) -> None:
        begin = self.path("flow") if self.path("flow").exists() else None
        self.train("own", self.network, self.recipe.own_lr, self.losses.own, is_matrix, begin=begin)

    def write(self) -> None:
        name = next((name for name in ("own", "flow") if self.path(name).exists()), None)
        if name is None:
            raise FileNotFoundError(f"{self.args.work} holds neither own.pt nor flow.pt: train one of these phases")
        flow = load_average(self.path(name), VideoFlow(self.shape, len(self.tokenizer)))
        vae = self.finished_vae().cpu()
        size = write(pipeline(flow, self.tokenizer, vae), self.args.output)
        self.say(f"{self.args.output}: weights of {name}, {size:.2f} MiB")


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".cache/emoji/pack128.tar"), help="what train_emoji/data.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the pipeline")
    parser.add_argument("--work", type=Path, default=Path(".cache/video/work"), help="checkpoints")
    for name, seconds in PHASES.items():
        parser.add_argument(f"--{name}", type=float, default=seconds, help=f"seconds of this phase ({seconds:.0f}; 0: none)")
    parser.add_argument("--checkpoint", type=float, default=120, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    for name, what in (("clips", "chunks of a step of the VAE"), ("batch", "chunks of a step of the flow"),
                       ("fresh", "sequences encoded anew in each step"), ("stored", "encoded sequences")):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=0, help=f"{what}, in a worker (0: {getattr(Recipe, name)})")
    parser.add_argument("--concepts", type=int, default=0, help="name only so many concepts (0: all)")
    parser.add_argument("--others", type=int, default=0, help="use only so many images without names (0: all)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the scripts")
    parser.add_argument("--no-compile", action="store_true", help="do not torch.compile the transformer's blocks")
    parser.add_argument("--no-graph", action="store_true", help="do not record the training step as a CUDA graph")
    parser.add_argument("--begin", type=Path, help="the --output of an earlier run, whose weights to go on from")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    with worker() as me:
        run = Run(parsed(given), me)
        run.vae()
        run.prepare()
        run.flow()
        run.own()
        if me.leads:
            run.write()
        me.barrier()


if __name__ == "__main__":
    main()
