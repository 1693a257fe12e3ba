"""Draw a file of prompts, or redraw a folder of images, on all GPUs or CPU cores of a machine or a cluster, with Ray Data.

    pip install 'streamflow-rf[ray]'
    python examples/ray_batch.py                                             # example prompts, into outputs/ray_batch
    python examples/ray_batch.py --prompts prompts.txt --output images       # one prompt per line
    python examples/ray_batch.py --images photos --prompt "a fox, 3d render" --strength 0.75 --output redrawn

After a kill, the same command continues: it does not draw an image again whose file exists, and every file is complete,
because it is written under another name first. Ray replaces a worker that ends, and the images of its batch that it had not
written are drawn again. In a cluster (`ray start --head`, ...) add `--address auto`; the machines must share the output
folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics are sent

import ray  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from streamflow._command_line import Parser, at_least  # noqa: E402
from streamflow.pretrained import EXAMPLE_PROMPTS, embedded  # noqa: E402

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
UNFINISHED = ".unfinished"  # the suffix of a file while it is written


class Draw:
    """A worker: the embedded model on its own GPU or CPU core. It takes a batch of jobs and writes their images."""

    def __init__(self, steps: int, strength: float | None):
        import torch
        from diffusers import StableDiffusion3Pipeline

        from streamflow import StreamFlow

        pipe = StableDiffusion3Pipeline.from_pretrained(embedded(), text_encoder_3=None, tokenizer_3=None)
        self.stream = StreamFlow(pipe.to("cuda" if torch.cuda.is_available() else "cpu"), cfg_type="none")
        self.settings = {"num_inference_steps": steps, "strength": strength, "max_sequence_length": 0}

    def __call__(self, batch: dict) -> dict:
        jobs = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        jobs = [job for job in jobs if not Path(job["output"]).exists()]  # a worker that ended may have drawn some
        for job in jobs:
            write(Path(job["output"]), self.draw(job["prompt"], int(job["seed"]), job["image"]))
        return {"output": batch["output"]}

    def draw(self, prompt: str, seed: int, path: str) -> Image.Image:
        """One image, which depends on the prompt, the seed and the input image at `path` ("": none) only."""
        from streamflow.image_utils import postprocess_image

        self.stream.prepare(prompt, seed=seed, **self.settings)
        image = Image.open(path).convert("RGB") if path else None
        (frame,) = self.stream.frames([image])
        return postprocess_image(frame.wait().image[None], "pil")[0]


def write(path: Path, image: Image.Image) -> None:
    """Write the complete file or none."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    image.save(unfinished, "png")
    os.replace(unfinished, path)


def arguments() -> tuple[Parser, argparse.Namespace]:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=Path, help="a text file, one prompt per line (default: sixteen example prompts)")
    p.add_argument("--images", type=Path, help="a folder of images to redraw, with --prompt")
    p.add_argument("--prompt", help="the prompt for all of --images")
    p.add_argument("--strength", type=float, default=0.75, help="how much of an image is redrawn, 0 to 1 (default 0.75)")
    p.add_argument("--steps", type=at_least(1), default=4, help="Euler steps per image (default 4)")
    p.add_argument("--seed", type=at_least(0), default=2, help="of the first image; each next one adds 1 (default 2)")
    p.add_argument("--batch", type=at_least(1), default=8, help="how many images a worker takes at once (default 8)")
    p.add_argument("--workers", type=at_least(1), help="default: one for each GPU, else one for each CPU core")
    p.add_argument("--address", help="of a running cluster; by default Ray starts on this machine, and ends")
    p.add_argument("--output", type=Path, default=Path("outputs/ray_batch"), help="a folder (default: %(default)s)")
    return p, p.parse_args()


def jobs(a: argparse.Namespace) -> list[dict]:
    """All jobs. The file name of a job has a digest of all its settings, so other settings make other files."""
    if a.images:
        paths = sorted(path for path in a.images.iterdir() if path.suffix.lower() in KINDS)
        listed = [(path.stem, a.prompt, str(path.resolve()), f"{a.strength} {fingerprint(path)}") for path in paths]
    else:
        lines = a.prompts.read_text(encoding="utf-8").splitlines() if a.prompts else EXAMPLE_PROMPTS
        listed = [(f"{k:06d}", line.strip(), "", "") for k, line in enumerate(lines) if line.strip()]
    made = []
    for k, (name, prompt, path, more) in enumerate(listed):
        seed = a.seed + k
        digest = hashlib.sha256(f"{prompt}\n{seed} {a.steps} {more}".encode()).hexdigest()[:8]
        output = str((a.output / f"{name}-{digest}.png").resolve())
        made.append({"prompt": prompt, "seed": seed, "image": path, "output": output})
    return made


def fingerprint(path: Path) -> str:
    """The SHA-256 digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(a: argparse.Namespace, todo: list[dict]) -> None:
    """Draw these jobs on the workers."""
    ray.init(address=a.address, include_dashboard=False, log_to_driver=False)
    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    batches = -(-len(todo) // a.batch)
    workers = min(a.workers or gpus or int(have["CPU"]), batches)
    ray.data.DataContext.get_current().enable_progress_bars = False
    done = ray.data.from_items(todo, override_num_blocks=batches).map_batches(
        Draw,
        fn_constructor_args=(a.steps, a.strength if a.images else None),
        batch_size=a.batch,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    for _ in tqdm(done.iter_rows(), total=len(todo), unit="image", mininterval=1):
        pass


def main() -> int:
    """Exit code: 0, or 2 for a bad argument."""
    parser, a = arguments()
    if bool(a.images) != bool(a.prompt):
        parser.error("--images and --prompt go together: pass both or none")
    if a.images and a.prompts:
        parser.error("pass --prompts or --images, not both")
    for path in filter(None, (a.prompts, a.images)):
        if not path.exists():
            parser.error(f"{path} does not exist")
    a.output.mkdir(parents=True, exist_ok=True)
    for left in a.output.glob(f"*{UNFINISHED}"):  # of a run that was killed
        left.unlink()
    every = jobs(a)
    todo = [job for job in every if not Path(job["output"]).exists()]
    print(f"{len(every)} images, {len(every) - len(todo)} exist already", flush=True)
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
