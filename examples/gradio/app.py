"""A webcam restyled on a page of Gradio, by WebRTC through FastRTC; also the app of a Hugging Face Space (README.md).

    python examples/gradio/app.py
    python examples/gradio/app.py --model stabilityai/stable-diffusion-3.5-medium --steps 8 --port 8000

Needs gradio and fastrtc: pip install "gradio>=5.50,<6" "fastrtc==0.0.34". One visitor at a time.
"""

import argparse

import numpy as np

from streamflow import StreamFlowWrapper

PROMPT, STRENGTH = "a fox, 3d render", 0.75


class Restyler:
    """Restyles the frames of one visitor at a time: no visitor sees frames of the one before."""

    def __init__(self, model: str = "embedded", steps: int = 4) -> None:
        self.wrapper = StreamFlowWrapper(model, cfg_type="none", output_type="np")
        self.wrapper.prepare(PROMPT, num_inference_steps=steps, strength=STRENGTH)
        self.steps, self.settings, self.visitor = steps, (PROMPT, STRENGTH), ""

    def __call__(self, visitor: str, frame: np.ndarray, prompt: str, strength: float) -> np.ndarray:
        """A frame of this visitor, uint8 [H, W, 3] in the order blue, green, red, as one of the stream's size."""
        if (prompt, strength) != self.settings:
            self.wrapper.update(prompt=prompt, strength=strength)
            self.settings = prompt, strength
        if visitor != self.visitor:
            self.wrapper.stream.reset()  # drops the frames in flight
            self.visitor = visitor
        image = self.wrapper(np.ascontiguousarray(frame[..., ::-1]))
        return np.ascontiguousarray((image * 255).round().astype(np.uint8)[..., ::-1])


def build_page(restyler: Restyler, seconds: float, fps: float):
    """The page, as `gradio.Blocks`. seconds: how long a visit may be. fps: of the camera, at most."""
    import gradio as gr
    from fastrtc import VideoStreamHandler, WebRTC, get_cloudflare_turn_credentials, get_current_context
    from gradio.utils import get_space

    def restyle(frame, prompt, strength):
        return restyler(get_current_context().webrtc_id, frame, prompt, strength)

    camera = {"facingMode": "user", "width": {"ideal": 512}, "height": {"ideal": 512}, "frameRate": {"max": fps}}
    turn = {"rtc_configuration": get_cloudflare_turn_credentials} if get_space() else {}
    with gr.Blocks(title="StreamFlow") as page:
        gr.Markdown("# StreamFlow\nYour camera, restyled as you change the prompt and the strength.")
        video = WebRTC(label="Camera", modality="video", height=380, full_screen=False, track_constraints=camera, **turn)
        prompt = gr.Textbox(PROMPT, label="Prompt", max_length=300)
        strength = gr.Slider(1 / restyler.steps, 1, STRENGTH, step=1 / restyler.steps, label="Strength")
        handler = VideoStreamHandler(restyle, skip_frames=True)
        video.stream(handler, [video, prompt, strength], [video], concurrency_limit=1, time_limit=seconds)
    return page


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded", help="hub id, folder or file (default: %(default)s)")
    p.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    p.add_argument("--seconds", type=float, default=120, help="of a visit (default: %(default)s)")
    p.add_argument(
        "--fps", type=float, default=10, help="of the camera; not more than the model draws (default: %(default)s)"
    )
    p.add_argument("--port", type=int, help="default: from 7860 on, the first that is free")
    a = p.parse_args(argv)
    build_page(Restyler(a.model, a.steps), a.seconds, a.fps).launch(server_port=a.port)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
