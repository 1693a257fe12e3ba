"""Where the speed comes from: plain diffusers, the same compiled, the denoising batch, and what acceleration adds.

    python examples/benchmark.py
    python examples/benchmark.py --model sd15 --random-weights --width 512 --height 512
    python examples/benchmark.py --variants none --sweep steps=1,2,4,8 --latency

The first measures the embedded model, the second a network of Stable Diffusion 1.5's size with random weights, on a GPU;
the third how rates go with the number of steps, and how old an image is when it is finished.
`--help` lists the rest. The last line is JSON.
"""

import sys

from streamflow.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
