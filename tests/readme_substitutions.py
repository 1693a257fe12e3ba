"""What is changed in the Python snippets of StreamDiffusion's README before they run here: this list, in order, and no more.

Each entry is (what, pattern, replacement, why); the pattern is a regular expression in Python's `re`, in multi-line mode.
"""

SUBSTITUTIONS = [
    (
        "the TensorRT snippet",
        r"\Afrom streamdiffusion\.acceleration\.tensorrt import[\s\S]*",
        "",
        "left out: engines run on NVIDIA GPUs",
    ),
    ("module names", r"\bstreamdiffusion\b", "streamflow", "the package"),
    ("class names", r"\bStreamDiffusion\b", "StreamFlow", "the class"),
    ("pipeline class", r"\bStableDiffusionPipeline\b", "StableDiffusion3Pipeline", "a rectified-flow pipeline"),
    (
        "model",
        r'"KBlueLeaf/kohaku-v2\.1"',
        "embedded()",
        "the embedded model in place of a diffusion model from a hub",
    ),
    ("tiny VAE", r'"madebyollin/taesd"', "embedded_tiny_vae()", "the embedded model's own twin"),
    (
        "where those two are",
        r"^import torch$",
        "import torch\nfrom streamflow.pretrained import embedded, embedded_tiny_vae",
        "the names that the two entries above use",
    ),
    ("device", r'torch\.device\("cuda"\)', 'torch.device("cpu")', "runs anywhere"),
    ("dtype", r"torch\.float16", "torch.float32", "what a CPU computes in"),
    ("size", r"\b512\b", "128", "the size that the embedded model draws"),
    (
        "input image",
        r'"assets/img2img_example\.png"',
        '"generated.png"',
        "an image that the test draws; the README's is not in the package",
    ),
    (
        "LCM-LoRA",
        r"^# If the loaded model is not LCM, merge LCM\nstream\.load_lcm_lora\(\)\nstream\.fuse_lora\(\)$",
        "",
        "removed: a rectified flow draws in few steps by itself, and load_lcm_lora says so",
    ),
    (
        "xformers",
        r"^pipe\.enable_xformers_memory_efficient_attention\(\)$",
        "",
        "removed: an optional package; torch's own attention is used",
    ),
    ("showing", r"\.show\(\)", '.save("drawn.png")', "no window: the test saves the image and looks at it"),
    ("asking", r'input\("[^"\n]*"\)', '"stop"', "the loop's question is answered with 'stop', so one image is drawn"),
    ("filter's threshold", r"similar_image_filter_threshold", "0.98", "a name that the README leaves undefined"),
    ("filter's limit", r"similar_image_filter_max_skip_frame", "10", "a name that the README leaves undefined"),
    ("guidance scale", r"=guidance_scale\b", "=1.2", "a name that the README leaves undefined"),
    ("delta", r"=delta\b", "=1.0", "a name that the README leaves undefined"),
]
