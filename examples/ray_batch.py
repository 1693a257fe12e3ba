"""Draw a file of prompts, or redraw a folder of pictures, on all GPUs or CPU cores of a machine or a cluster: Ray Data.

    pip install 'streamflow-rf[ray]'
    python examples/ray_batch.py                                             # our sixteen prompts, into outputs/ray_batch
    python examples/ray_batch.py --prompts prompts.txt --output pictures     # one prompt a line
    python examples/ray_batch.py --pictures photos --prompt "a fox, 3d render" --strength 0.75 --output redrawn

Run the same line again after a kill and it goes on: a picture that is there is not drawn again, and a file that is there is
whole, since it is written under another name first. A worker that dies is replaced by Ray, and of its batch what it had not
written is drawn again. With a cluster (`ray start --head`, ...) add `--address auto`; the output is a folder that all share.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tell nobody what runs here

import ray  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from streamflow._command_line import Parser, at_least  # noqa: E402
from streamflow.pretrained import EXAMPLE_PROMPTS, embedded  # noqa: E402

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
UNFINISHED = ".unfinished"  # the end of a name while its file is written


class Draw:
    """A worker: the embedded model on its own GPU or core. Takes a batch of jobs and writes their pictures."""

    def __init__(self, steps: int, strength: float | None):
        import torch
        from diffusers import StableDiffusion3Pipeline

        from streamflow import StreamFlow

        pipe = StableDiffusion3Pipeline.from_pretrained(embedded(), text_encoder_3=None, tokenizer_3=None)
        self.stream = StreamFlow(pipe.to("cuda" if torch.cuda.is_available() else "cpu"), cfg_type="none")
        self.settings = {"num_inference_steps": steps, "strength": strength, "max_sequence_length": 0}

    def __call__(self, batch: dict) -> dict:
        jobs = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        jobs = [job for job in jobs if not Path(job["output"]).exists()]  # a batch that a dead worker left half done
        for job in jobs:
            write(Path(job["output"]), self.draw(job["prompt"], int(job["seed"]), job["picture"]))
        return {"output": batch["output"]}

    def draw(self, prompt: str, seed: int, picture: str) -> Image.Image:
        """One picture, of nothing but these three."""
        from streamflow.image_utils import postprocess_image

        self.stream.prepare(prompt, seed=seed, **self.settings)
        image = Image.open(picture).convert("RGB") if picture else None
        (frame,) = self.stream.frames([image])
        return postprocess_image(frame.wait().image[None], "pil")[0]


def write(path: Path, picture: Image.Image) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    picture.save(unfinished, "png")
    os.replace(unfinished, path)


def arguments() -> tuple[Parser, argparse.Namespace]:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=Path, help="a text file, one prompt a line (default: sixteen of ours)")
    p.add_argument("--pictures", type=Path, help="a folder of pictures to redraw, with --prompt")
    p.add_argument("--prompt", help="what all of --pictures become")
    p.add_argument("--strength", type=float, default=0.75, help="how much of a picture is redrawn, 0 to 1 (default 0.75)")
    p.add_argument("--steps", type=at_least(1), default=4, help="Euler steps a picture (default 4)")
    p.add_argument("--seed", type=at_least(0), default=2, help="of the first picture; the others follow (default 2)")
    p.add_argument("--batch", type=at_least(1), default=8, help="how many pictures a worker takes at once (default 8)")
    p.add_argument("--workers", type=at_least(1), help="default: one a GPU, else one a CPU core")
    p.add_argument("--address", help="of a running cluster; by default one is started on this machine, and ended")
    p.add_argument("--output", type=Path, default=Path("outputs/ray_batch"), help="a folder (default: %(default)s)")
    return p, p.parse_args()


def jobs(a: argparse.Namespace) -> list[dict]:
    """What is to be drawn. A job's file name holds all that makes its picture, so other settings are other files."""
    if a.pictures:
        pictures = sorted(path for path in a.pictures.iterdir() if path.suffix.lower() in KINDS)
        asked = [(path.stem, a.prompt, str(path.resolve()), f"{a.strength} {fingerprint(path)}") for path in pictures]
    else:
        lines = a.prompts.read_text(encoding="utf-8").splitlines() if a.prompts else EXAMPLE_PROMPTS
        asked = [(f"{k:06d}", line.strip(), "", "") for k, line in enumerate(lines) if line.strip()]
    made = []
    for k, (name, prompt, picture, more) in enumerate(asked):
        seed = a.seed + k
        digest = hashlib.sha256(f"{prompt}\n{seed} {a.steps} {more}".encode()).hexdigest()[:8]
        output = str((a.output / f"{name}-{digest}.png").resolve())
        made.append({"prompt": prompt, "seed": seed, "picture": picture, "output": output})
    return made


def fingerprint(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(a: argparse.Namespace, todo: list[dict]) -> None:
    """All of these jobs, on as many workers as there are."""
    ray.init(address=a.address, include_dashboard=False, log_to_driver=False)
    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    batches = -(-len(todo) // a.batch)
    workers = min(a.workers or gpus or int(have["CPU"]), batches)
    ray.data.DataContext.get_current().enable_progress_bars = False
    done = ray.data.from_items(todo, override_num_blocks=batches).map_batches(
        Draw,
        fn_constructor_args=(a.steps, a.strength if a.pictures else None),
        batch_size=a.batch,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    for _ in tqdm(done.iter_rows(), total=len(todo), unit="picture", mininterval=1):
        pass


def main() -> int:
    """Exit code: 0, or 2 for a bad argument."""
    parser, a = arguments()
    if bool(a.pictures) != bool(a.prompt):
        parser.error("--pictures and --prompt go together")
    if a.pictures and a.prompts:
        parser.error("give --prompts or --pictures, not both")
    for path in filter(None, (a.prompts, a.pictures)):
        if not path.exists():
            parser.error(f"there is no {path}")
    a.output.mkdir(parents=True, exist_ok=True)
    for left in a.output.glob(f"*{UNFINISHED}"):  # of a run that was killed
        left.unlink()
    every = jobs(a)
    todo = [job for job in every if not Path(job["output"]).exists()]
    print(f"{len(every)} pictures, {len(every) - len(todo)} are there already", flush=True)
    start = time.perf_counter()
    try:
        if todo:
            draw(a, todo)
    finally:
        ray.shutdown()
    if todo:
        print(f"drew {len(todo)} in {time.perf_counter() - start:.0f} s, into {a.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
