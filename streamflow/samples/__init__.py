"""Files to try things on, drawn for this project by examples/make_samples.py: the defaults of commands and examples.

from PIL import Image
from streamflow.samples import CLIP, IMAGE

stream(Image.open(IMAGE))
"""

from pathlib import Path

__all__ = ["CLIP", "IMAGE"]

IMAGE = Path(__file__).parent / "apple.png"  # a drawing of an apple on white, 256x256
CLIP = Path(__file__).parent / "apple.mp4"  # the same apple in motion: 256x256, 48 frames, 2 s, H.264
