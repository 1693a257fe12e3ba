"""The page in real headless Chromium, with its fake camera, served by a real process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

sync_playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright").sync_playwright
pytest.importorskip("uvicorn", reason="the page needs the extra web")
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
COMMAND = "import sys; from streamflow.app.cli import main; sys.exit(main(sys.argv[1:]))"
SETTINGS = ["--num-inference-steps", "1", "--cfg-type", "none", "--server.max-viewers", "2"]
OUT = "document.getElementById('output').toDataURL()"


class Serving:
    """A server process, at the same port each time it is started."""

    def __init__(self, port):
        self.port = port

    def start(self):
        arguments = ["serve", "--port", str(self.port), "--json", "--device", "cpu", *SETTINGS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, text=True, env=environment
        )
        self.url = json.loads(self.process.stdout.readline())["url"]
        self.port = int(self.url.rpartition(":")[2])
        return self

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def serving():
    one = Serving(0).start()
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{one.url}/health/ready")
            break
        except urllib.error.HTTPError:
            time.sleep(0.2)
    yield one
    one.kill()


@pytest.fixture(scope="module")
def browser():
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, serving):
    """`tab()`: the page in a tab of its own, live; at the end no script has failed."""
    opened, errors = [], []

    def open_one():
        page = browser.new_context().new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(serving.url)
        opened.append(page)
        return page

    yield open_one
    for page in opened:
        page.context.close()
    assert errors == []


def live(page):
    page.wait_for_selector("#status[data-state=live]")


def changes(page, before):
    """The output, once it is another image than `before`."""
    page.wait_for_function(f"before => {OUT} !== before", arg=before)
    return page.evaluate(OUT)


def still(page):
    """The output, once it no longer changes."""
    last = None
    for _ in range(40):
        now = page.evaluate(OUT)
        if now == last:
            return now
        last = now
        page.wait_for_timeout(700)
    raise AssertionError("the picture does not come to rest")


def slide(page, name, value):
    page.evaluate(
        "([id, value]) => { const s = document.getElementById(id); s.value = value; s.dispatchEvent(new Event('input')); }",
        [name, str(value)],
    )


def test_a_prompt_and_sliders_change_the_image_and_a_reload_keeps_them(tab):
    page = tab()
    live(page)
    page.select_option("#motion", "still")
    changes(page, page.evaluate(OUT))
    picture = still(page)
    page.fill("#prompt", "a fox, 3d render")
    changes(page, picture)
    for name, value in (("seed", 11), ("steps", 3)):
        picture = still(page)
        slide(page, name, value)
        changes(page, picture)
    fox = still(page)
    assert page.locator("#ring li").count() == 3
    page.fill("#other", "a rocket, 3d render")
    slide(page, "blend", 1)
    changes(page, fox)
    with page.expect_download() as saved:
        page.click("#save-gif")
    assert open(saved.value.path(), "rb").read(6) in (b"GIF89a", b"GIF87a")
    for button, start in (("#save-image", b"\x89PNG"), ("#save-settings", b"{")):
        with page.expect_download() as saved:
            page.click(button)
        assert open(saved.value.path(), "rb").read().startswith(start)
    page.reload()
    live(page)
    assert page.input_value("#prompt") == "a fox, 3d render" and page.input_value("#seed") == "11"
    assert page.input_value("#steps") == "3" and page.input_value("#motion") == "still"


def test_images_are_restyled_from_the_camera_a_drawing_and_a_file(tab):
    page = tab()
    live(page)
    slide(page, "steps", 2)
    page.click("#tab-image")
    page.click("[data-source=camera]")
    first = changes(page, page.evaluate(OUT))
    changes(page, changes(page, first))  # the camera moves
    assert page.evaluate("document.getElementById('input').toDataURL()") != page.evaluate(OUT)
    page.wait_for_function("() => document.getElementById('median').textContent.endsWith('ms')")
    page.click("[data-source=drawing]")
    blank = still(page)
    box = page.locator("#input").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] - 20, steps=4)
    page.mouse.up()
    line = changes(page, blank)
    with page.expect_file_chooser() as chooser:
        page.click("[data-source=file]")
    chooser.value.set_files([{"name": "a.png", "mimeType": "image/png", "buffer": picture_file()}])
    changes(page, line)


def picture_file():
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(out, "PNG")
    return out.getvalue()


def test_two_tabs_draw_a_third_waits_and_all_come_back_to_a_server_that_was_killed(tab, serving):
    first, second = tab(), tab()
    for page in (first, second):
        live(page)
        changes(page, changes(page, page.evaluate(OUT)))
    third = tab()
    third.wait_for_function("() => document.getElementById('status').textContent.includes('slots are taken')")
    second.context.close()
    live(third)
    first.fill("#prompt", "an octopus, flat vector")
    serving.kill()
    first.wait_for_selector("#status[data-state=lost]")
    serving.start()
    for page in (first, third):
        live(page)
        changes(page, page.evaluate(OUT))
    assert first.input_value("#prompt") == "an octopus, flat vector"
