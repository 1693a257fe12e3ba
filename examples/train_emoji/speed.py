"""Times an exported folder on this machine in float32: four plain steps and a decode, against one batch-4 call and a
decode.

    python examples/train_emoji/speed.py --model streamflow/pretrained/emoji

The batch-4 call is what a stream of four stages does for each image. The two are timed in turn.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

STEPS = 4


def timings(jobs: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each job, `rounds` times in turn, after two rounds of warming up."""
    seconds = {name: [] for name in jobs}
    for index in range(rounds + 2):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if index >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


@torch.inference_mode()
def measure(model: Path, rounds: int) -> dict:
    pipe = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red apple, 3d render"
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=0
    )
    x, at = torch.randn(STEPS, 16, 16, 16), torch.tensor([1000.0, 667.0, 334.0, 1.0])
    latent = torch.randn(1, 16, 16, 16)

    def plain():
        pipe(prompt, num_inference_steps=STEPS, guidance_scale=0, max_sequence_length=0)

    def streamed():
        pipe.transformer(x, embeds.expand(STEPS, -1, -1), pooled.expand(STEPS, -1), at)
        pipe.vae.decode(latent)

    seconds = timings({"plain": plain, "streamed": streamed, "decode": lambda: pipe.vae.decode(latent)}, rounds)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["streamed"], strict=True)]
    report = {name: {"median_s": round(statistics.median(s), 4), "p95_s": round(sorted(s)[int(0.95 * len(s))], 4)}
              for name, s in seconds.items()}  # fmt: skip
    quartiles = [round(q, 3) for q in statistics.quantiles(ratios, n=4)]
    return report | {"ratio_quartiles": quartiles, "threads": torch.get_num_threads(), "rounds": rounds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model, arguments.rounds), indent=1))
