"""The Gradio example: a frame in and a frame out for one visitor at a time, its Space's files, and its page in a browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_examples import loaded

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples/gradio"


def frame(blue, green, red):
    return np.full((96, 128, 3), (blue, green, red), np.uint8)


@pytest.fixture(scope="module")
def restyler():
    made = loaded("gradio/app.py").Restyler(steps=2)
    yield made
    made.wrapper.close()


def test_a_visitor_sees_no_frame_of_the_one_before(restyler):
    first = restyler("one", frame(200, 30, 30), "a fox, 3d render", 0.5)
    other = restyler("two", frame(30, 30, 200), "a fox, 3d render", 0.5)
    again = restyler("three", frame(200, 30, 30), "a fox, 3d render", 0.5)
    assert first.dtype == np.uint8 and first.shape == (128, 128, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first[..., 0].mean() > first[..., 2].mean() and other[..., 2].mean() > other[..., 0].mean()


def test_settings_act_while_it_runs_and_wrong_ones_change_nothing(restyler):
    given = frame(30, 30, 200)
    drawn = [
        restyler(f"visitor {i}", given, prompt, 1.0)
        for i, prompt in enumerate(("a fox, 3d render", "a hamburger, 3d render"))
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 5
    with pytest.raises(ValueError, match="strength"):
        restyler("visitor 1", given, "a lemon, 3d render", 1.5)
    assert restyler.settings == ("a hamburger, 3d render", 1.0)
    assert np.array_equal(restyler("visitor 2", given, "a hamburger, 3d render", 1.0), drawn[1])


def test_the_files_of_the_space():
    head = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert head["sdk"] == "gradio" and (SPACE / head["app_file"]).is_file() and head["python_version"] == "3.11"
    assert len(head["short_description"]) <= 60
    needed = (ROOT / "setup.py").read_text(encoding="utf-8").split("INSTALL_REQUIRES = [")[1].split("\n]")[0]
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert lines == [*re.findall(r'"([^"]+)"', needed), "gradio>=5.50,<6", "fastrtc==0.0.34"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_restyles_the_camera_of_a_browser(tmp_path):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'gradio>=5.50,<6'")
    pytest.importorskip("fastrtc", reason="needs fastrtc: pip install fastrtc==0.0.34")
    sync_playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright").sync_playwright
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, str(SPACE / "app.py"), "--port", str(port), "--steps", "2"]
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-sandbox"]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log) as app,
        sync_playwright() as play,
    ):
        try:
            end = time.monotonic() + 90
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert app.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.2)
            page = play.chromium.launch(executable_path=shutil.which("chromium"), args=flags).new_page()
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_timeout(2000)
            if (access := page.get_by_text("Click to Access Webcam").locator("visible=true")).count():
                access.first.click()
            page.locator("text=/^\\s*Record\\s*$/").locator("visible=true").first.click(timeout=20000)
            size = "[...document.querySelectorAll('video')].some(v => v.videoWidth === 128 && v.videoHeight === 128)"
            page.wait_for_function(size, timeout=60000)
            before = colours(page)
            page.get_by_label("Prompt").fill("a hamburger, 3d render")
            page.get_by_label("number input for Strength").fill("1")
            end = time.monotonic() + 60
            while np.abs(colours(page) - before).mean() < 20:
                assert time.monotonic() < end, "the images have not changed with the prompt"
                page.wait_for_timeout(200)
        finally:
            app.terminate()


def colours(page):
    """The image that the page shows, float [n, 3]."""
    pixels = page.evaluate("""() => {
        const video = [...document.querySelectorAll('video')].find(v => v.videoWidth === 128);
        const canvas = new OffscreenCanvas(128, 128);
        canvas.getContext("2d").drawImage(video, 0, 0);
        return [...canvas.getContext("2d").getImageData(0, 0, 128, 128).data];
    }""")
    return np.array(pixels, float).reshape(-1, 4)[:, :3]
