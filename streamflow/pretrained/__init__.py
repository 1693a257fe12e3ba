"""The embedded models: where their folders are, and prompts that they draw well. Imports nothing heavy; diffusers does
the loading.

    pipe = StableDiffusion3Pipeline.from_pretrained(embedded())
    pipe.vae = AutoencoderTiny.from_pretrained(embedded_tiny_vae())  # the light twin, if wanted
    video_pipe = HeliosPipeline.from_pretrained(embedded_video())
"""

from pathlib import Path

__all__ = ["EXAMPLE_PROMPTS", "EXAMPLE_VIDEO_PROMPTS", "embedded", "embedded_tiny_vae", "embedded_video"]

FOLDER = Path(__file__).parent / "emoji"
VIDEO_FOLDER = Path(__file__).parent / "video"

EXAMPLE_PROMPTS = (
    "a red apple, 3d render",
    "a fox, 3d render",
    "a rocket, 3d render, on a sky blue background",
    "a hamburger, 3d render",
    "an ice cream, glossy cartoon",
    "a soccer ball, 3d render, on a green background",
    "an octopus, flat vector",
    "a sunflower, 3d render",
    "a gem stone, soft gradient, on a lavender background",
    "a birthday cake, 3d render",
    "a ghost, bold cartoon",
    "a guitar, 3d render, on a cream background",
    "a sailboat, flat vector, on a mint background",
    "a strawberry, 3d render",
    "a red heart, glossy cartoon, on a pink background",
    "a crown, 3d render, on a purple background",
)

EXAMPLE_VIDEO_PROMPTS = (
    "a parrot, flat vector, bouncing",
    "a hamburger, 3d render, swaying",
    "a rocket, 3d render, on a sky blue background, bouncing",
    "a rose, 3d render, pulsing",
    "a house, flat vector, on a mint background, moving slowly",
    "a soccer ball, 3d render, bouncing",
)


class Absent:
    """What model_index.json names for the third text encoder and its tokenizer: it loads as None.

    `StableDiffusion3Pipeline` wants every text encoder either in the folder or passed as None; with this, a plain
    `from_pretrained(embedded())` loads a pipeline without T5. diffusers resolves the name because this module is
    imported.
    """

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> None:
        """Nothing."""
        return None


PreTrainedModel = Absent  # one of the base names by which diffusers recognises what it may load


def _folder(path: Path, weights: str, scripts: str = "train_emoji") -> str:
    if not (path / weights).is_file():
        raise FileNotFoundError(
            f"The embedded model is incomplete: {path / weights} is missing. Reinstall the package, or from a "
            f"clone run `git checkout -- streamflow/pretrained`; examples/{scripts}/README.md tells how to train it."
        )
    return str(path)


def embedded() -> str:
    """The folder of the embedded StableDiffusion3 pipeline, in diffusers' format."""
    return _folder(FOLDER, "transformer/diffusion_pytorch_model.safetensors")


def embedded_tiny_vae() -> str:
    """The folder of its AutoencoderTiny twin, which takes the same latents."""
    return _folder(FOLDER / "vae_tiny", "diffusion_pytorch_model.safetensors")


def embedded_video() -> str:
    """The folder of the embedded Helios pipeline, in diffusers' format. Its `call.json` has the arguments of the pipeline's
    call that it was trained for."""
    return _folder(VIDEO_FOLDER, "transformer/diffusion_pytorch_model.safetensors", "train_video")


MODELS = {"embedded": embedded, "embedded-video": embedded_video}  # by the names that `streamflow.models.load` takes
