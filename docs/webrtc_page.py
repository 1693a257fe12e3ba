"""Take the screenshot of the page with a webcam by WebRTC that the guide shows; a clip takes the place of the webcam.

    python docs/webrtc_page.py

Writes docs/static/webrtc.webp. Needs playwright, Chromium, and the extras web, webrtc and video.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import av
from PIL import Image

from streamflow.samples import CLIP

COMMAND = [sys.executable, "-c", "from streamflow.app.cli import main; main()", "serve", "--port", "0", "--json"]
COMMAND += ["--cfg-type", "none"]
FLAGS = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-sandbox"]
SETTINGS = "mode=image&prompt=a+hamburger,+3d+render&strength=0.8"


def webcam(file: Path) -> None:
    """The clip as Chromium's fake webcam reads it: JPEGs one after another."""
    with av.open(str(CLIP)) as clip, file.open("wb") as out:
        for frame in clip.decode(video=0):
            frame.to_image().save(out, "JPEG", quality=95)


def shoot(url: str, file: Path) -> Image.Image:
    """The page, once images come by WebRTC and the figures are those of some seconds."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        flags = [*FLAGS, f"--use-file-for-fake-video-capture={file}"]
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        tab = browser.new_page(viewport={"width": 1280, "height": 720})
        tab.goto(f"{url}/#{SETTINGS}")
        tab.click("button[data-source=camera]", timeout=120_000)  # once the model is there
        tab.wait_for_selector("#transport:text-is('WebRTC')")
        tab.wait_for_timeout(12_000)
        shot = Image.open(io.BytesIO(tab.screenshot(full_page=True)))
        browser.close()
    return shot


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        webcam(file := Path(folder) / "webcam.mjpeg")
        process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            shot = shoot(json.loads(process.stdout.readline())["url"], file)
        finally:
            process.terminate()
            process.wait()
    shot.convert("RGB").save(Path(__file__).parent / "static/webrtc.webp", quality=88)


if __name__ == "__main__":
    main()
