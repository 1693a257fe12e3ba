"""One picture turns into another: the prompts' blend moves from the first to the second while the noise stays.

    python examples/morph.py

Writes outputs/morph.gif, which goes there and back. `streamflow morph PROMPT PROMPT ...` does it for any number of prompts,
any model, as a GIF or a video.
"""

from pathlib import Path

from streamflow import StreamFlowWrapper
from streamflow.image_utils import postprocess_image

PROMPTS = "a red apple, 3d render", "a tangerine, 3d render"
FRAMES, STEPS = 30, 4

with StreamFlowWrapper("embedded", range(STEPS), mode="txt2img", cfg_type="none", warmup=0) as wrapper:
    wrapper.prepare([(PROMPTS[0], 1.0), (PROMPTS[1], 0.0)], num_inference_steps=STEPS, blend="slerp")
    stream = wrapper.stream
    noise = stream.frame_noise(0)
    latents = []
    for k in range(FRAMES):
        share = k / (FRAMES - 1)
        stream.update(prompt_weights=[1 - share, share], scope="frame")  # each frame keeps its own blend at every step
        latents.append(stream.predict_x0_batch(noise))  # None while the ring fills
    finished = [x for x in latents if x is not None] + stream.flush()
    frames = [postprocess_image(stream.decode_image(x))[0] for x in finished]

there_and_back = frames + frames[-2:0:-1]
output = Path("outputs/morph.gif")
output.parent.mkdir(exist_ok=True)
there_and_back[0].save(output, save_all=True, append_images=there_and_back[1:], duration=60, loop=0)
print(f"wrote {output}: {len(frames)} frames from {PROMPTS[0]!r} to {PROMPTS[1]!r}")
