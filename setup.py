"""Packaging of StreamFlow. Ranges are what the code needs; the tested versions are in env/requirements.txt.

streamdiffusion, whose class StreamFlow extends, is not among the requirements: 0.1.1 pins diffusers 0.24, which has no flow
pipeline, so it is installed beside StreamFlow with --no-deps (env/install.py does it, `import streamflow` says it).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

INSTALL_REQUIRES = [
    "torch>=2.6,<3",  # the floor of diffusers' and transformers' own torch extra
    "diffusers>=0.33,<0.50",  # env/requirements.oldest.txt; a family may need a newer one
    "transformers>=4.51,<6",
    "accelerate>=1.1,<2",
    "peft>=0.17,<1",  # diffusers loads LoRAs through it
    "safetensors>=0.8,<1",
    "huggingface_hub>=0.30,<3",
    "numpy>=1.26,<3",
    "pillow>=10.3,<14",
    "packaging>=24",
    "tqdm>=4.66,<5",
    "filelock>=3.12",
    "ftfy>=6.1,<7",  # diffusers' video pipelines clean prompts with it
    "psutil>=5.9",
    "pydantic>=2.10,<3",
    "pyyaml>=6",
]

ONNX = ["onnx>=1.18,<2", "onnxscript>=0.5,<1", "onnxruntime>=1.22,<2"]

EXTRAS_REQUIRE = {
    # Wheels for Linux (x86-64; arm64 with glibc 2.35 or newer) and Windows, libraries included.
    "tensorrt-rtx": [
        "tensorrt-rtx-cu13-bindings>=1.7.1,<1.8",
        "onnxruntime-ep-nv-tensorrt-rtx-cu13>=0.5,<0.6",
        "polygraphy>=0.53,<0.54",
        "onnx-graphsurgeon>=0.6,<0.7",
        *ONNX,
    ],
    # A metapackage: its build fetches the libraries from NVIDIA, so it needs to reach NVIDIA's servers.
    "tensorrt": [
        "tensorrt-cu13>=10.13,<12",
        "polygraphy>=0.53,<0.54",
        "onnx-graphsurgeon>=0.6,<0.7",
        *ONNX,
    ],
    "onnxruntime": ONNX,
    "openvino": [*ONNX[:2], "openvino>=2025.0,<2027"],
    "web": ["fastapi>=0.115,<1", "uvicorn>=0.54,<1", "websockets>=13", "prometheus-client>=0.20,<1"],
    "webrtc": ["aiortc>=1.13,<2"],  # beside web
    "video": ["av>=14"],
    # Cameras, screens, NDI, ... (SpoutGL on Windows and syphon-python on macOS are named when they are asked for).
    "live": ["av>=14", "opencv-python-headless>=4.10", "mss>=10.2", "pyvirtualcam>=0.12", "cyndilib>=0.1", "pygame-ce>=2.5"],
    # Control images by OpenCV (controlnet-aux, which detects poses and soft edges, is named when it is asked for).
    "control-images": ["opencv-python-headless>=4.10"],
    "control": ["python-osc>=1.8,<2", "mido>=1.3,<2", "python-rtmidi>=1.5,<2"],
    # Ableton Link (aalink, under the GPL) is named when it is asked for.
    "audio": ["sounddevice>=0.5,<1", "soundfile>=0.13,<1"],
    "bench": ["matplotlib>=3.8,<4"],
    "ray": ["ray[serve,data]>=2.60,<3"],
    "quantize": ["torchao>=0.18,<0.19"],  # needs torch 2.11
    # FlashAttention for Hopper (fa3: Linux on x86-64, CUDA 13, torch 2.10 or newer), and for Blackwell too (fa4).
    "fa3": ["fa3-fwd>=0.0.3,<0.1"],
    "fa4": ["flash-attn-4[cu13]>=4.0.0b36,<5"],
    "docs": ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.29,<2"],
    "dev": [
        *("pytest>=8,<10", "pytest-xdist>=3.6,<4", "ruff>=0.17,<0.18", "uv>=0.13,<0.14", "scipy>=1.14,<2"),
        *("nbclient>=0.10,<1", "ipykernel>=6.29,<8"),
        *("httpx>=0.28,<1", "hypothesis>=6.100,<7", "playwright>=1.50,<2", "pyright[nodejs]>=1.1.400,<2"),
    ],
}


def version() -> str:
    """The version in streamflow/_version.py, read without importing the package."""
    text = (ROOT / "streamflow" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


def description() -> str:
    """The README, or one line where there is none yet."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else "Streams rectified-flow pipelines in real time."


setup(
    name="streamflow-rf",
    version=version(),
    description="Streams rectified-flow diffusers pipelines in real time: StreamDiffusion for SD3, Flux and their kin.",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="The StreamFlow authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["streamflow", "streamflow.*"]),
    package_data={
        "streamflow": [
            "py.typed",
            "pretrained/emoji/**",
            "pretrained/video/**",
            "samples/*.png",
            "samples/*.mp4",
            *(f"app/server/*.{kind}" for kind in ("html", "css", "js")),
            *(f"live/remote/*.{kind}" for kind in ("html", "js")),
        ]
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["streamflow = streamflow.app.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
