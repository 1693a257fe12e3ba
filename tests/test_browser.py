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

from streamflow.pretrained import EXAMPLE_PROMPTS

sync_playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright").sync_playwright
pytest.importorskip("uvicorn", reason="the page needs the extra web")
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
COMMAND = "import sys; from streamflow.app.cli import main; sys.exit(main(sys.argv[1:]))"
HELIOS = "import types; from diffusers.pipelines.helios import pipeline_helios as helios; "
HELIOS += "helios.ftfy = types.SimpleNamespace(fix_text=str); "  # in the place of the package ftfy
SETTINGS = ["--num-inference-steps", "1", "--cfg-type", "none", "--server.max-viewers", "2"]
GUIDED = ["--num-inference-steps", "1", "--server.max-viewers", "1"]
OUT = "document.getElementById('output').toDataURL()"
CONTROL = "document.getElementById('control').toDataURL()"
IN = "document.getElementById('input').toDataURL()"
DESKTOP, PHONE = (1366, 768), (390, 844)
WATCH = """
window.said = [];  // [words over the image, whether the controls are disabled], in turn
document.addEventListener("DOMContentLoaded", () => {
  const note = () => {
    const now = [document.getElementById("veil-title").textContent, document.getElementById("prompt").matches(":disabled")];
    if (JSON.stringify(window.said.at(-1)) !== JSON.stringify(now)) window.said.push(now);
  };
  note();
  const everything = { subtree: true, childList: true, characterData: true, attributes: true };
  new MutationObserver(note).observe(document.body, everything);
});
"""


class Serving:
    """A server process, at the same port each time it is started."""

    def __init__(self, port, settings=SETTINGS, command=COMMAND):
        self.port, self.settings, self.command = port, settings, command

    def start(self):
        arguments = ["serve", "--port", str(self.port), "--json", "--device", "cpu", *self.settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.command, *arguments], stdout=subprocess.PIPE, text=True, env=environment
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
    """`tab()`: the page in a tab of its own. At the end no script has failed, and nothing was logged as an error but lost
    connections."""
    opened, errors = [], []

    def log(message):
        if message.type == "error" and "ERR_CONNECTION" not in message.text and "WebSocket" not in message.text:
            errors.append(message.text)

    def open_one(url=None, size=DESKTOP, before=None):
        page = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True))).new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", log)
        page.add_init_script(WATCH)
        if before:
            before(page)
        page.goto(url or serving.url)
        opened.append(page)
        return page

    yield open_one
    for page in opened:
        page.context.close()
    assert errors == []


def live(page):
    """Wait for an image."""
    page.wait_for_selector("#status[data-state=drawing]")
    page.wait_for_selector("#veil", state="hidden")


def changes(page, before):
    """The output, once it is another image than `before`."""
    page.wait_for_function(f"before => {OUT} !== before", arg=before)
    return page.evaluate(OUT)


def still(page):
    """The output, once three looks in a row find the same."""
    seen = []
    for _ in range(60):
        seen = [*seen[-2:], page.evaluate(OUT)]
        if len(seen) == 3 and len(set(seen)) == 1:
            return seen[0]
        page.wait_for_timeout(500)
    raise AssertionError("the image does not come to rest")


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
    image = still(page)
    page.fill("#prompt", "a fox, 3d render")
    changes(page, image)
    for name, value in (("seed", 11), ("steps", 3)):
        image = still(page)
        slide(page, name, value)
        changes(page, image)
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
    page.wait_for_function("() => document.getElementById('veil-title').textContent === 'Choose a source'")
    page.click("button[data-source=camera]")
    first = changes(page, page.evaluate(OUT))
    changes(page, changes(page, first))  # the camera moves
    assert page.evaluate(IN) != page.evaluate(OUT)
    page.wait_for_function("() => document.getElementById('median').textContent.endsWith('ms')")
    page.click("button[data-source=drawing]")
    blank = still(page)
    box = page.locator("#input").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] - 20, steps=4)
    page.mouse.up()
    line = changes(page, blank)
    upload(page, "a.png", "image/png", image_file())
    changes(page, line)
    still(page)
    upload(page, "a.webm", "video/webm", video_file())
    inputs = {page.evaluate(IN)}
    for _ in range(2):  # the video moves, and goes on after its end
        drawn = page.evaluate(OUT)
        page.wait_for_function(f"before => !before.includes({IN})", arg=list(inputs))
        inputs.add(page.evaluate(IN))
        changes(page, drawn)
    page.wait_for_timeout(1500)
    changes(page, page.evaluate(OUT))
    upload(page, "a.png", "image/png", b"no image")
    page.wait_for_function("() => document.getElementById('message').textContent.includes('cannot read this file')")


def upload(page, name, kind, data):
    with page.expect_file_chooser() as chooser:
        page.click("button[data-source=file]")
    chooser.value.set_files([{"name": name, "mimeType": kind, "buffer": data}])


def video_file():
    """One second of a bar that moves."""
    import io

    import av
    import numpy as np

    out = io.BytesIO()
    with av.open(out, "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=8, width=64, height=64, pix_fmt="yuv420p")
        for k in range(8):
            frame = np.zeros((64, 64, 3), np.uint8)
            frame[:, 8 * k : 8 * k + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def image_file():
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(out, "PNG")
    return out.getvalue()


def png(width, height, colour="white"):
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def editing(tmp_path_factory):
    """A server of a model that takes several references."""
    from random_pipelines import random_pipeline

    folder = tmp_path_factory.mktemp("edit")
    random_pipeline("flux2-klein", is_distilled=True).save_pretrained(folder)
    one = Serving(0, [*SETTINGS, "--model", str(folder), "--width", "64", "--height", "64"]).start()
    yield one
    one.kill()


def test_a_style_image_is_chosen_dropped_refused_and_taken_away(tab, editing):
    def choose(name, data):
        with page.expect_file_chooser() as chooser:
            page.click("#style-choose")
        chooser.value.set_files([{"name": name, "mimeType": "image/png", "buffer": data}])

    def comes_back_to(image):
        page.wait_for_function(f"before => {OUT} === before", arg=image)

    page, thumbnail = tab(editing.url), "#style-thumbnail"
    live(page)
    page.select_option("#motion", "still")
    text = still(page)
    page.click("#tab-image")
    page.click("button[data-source=drawing]")
    changes(page, text)
    plain = still(page)
    assert page.is_visible("#style-panel") and page.is_hidden(thumbnail) and page.is_hidden("#style-remove")
    choose("red.png", png(300, 200, "red"))
    page.wait_for_selector(thumbnail)
    page.wait_for_function("document.getElementById('style-thumbnail').naturalWidth === 64")
    changes(page, plain)
    red = still(page)
    choose("long.png", png(640, 64))
    page.wait_for_selector("#message[data-kind=error]")
    assert "reference of 640x64 pixels" in page.text_content("#message") and page.is_visible(thumbnail)
    choose("text.png", b"no image")
    page.wait_for_function("() => document.getElementById('message').textContent.includes('cannot read this file')")
    assert still(page) == red
    page.evaluate(
        """async (data) => {
            const dataTransfer = new DataTransfer(), bytes = Uint8Array.from(data);
            dataTransfer.items.add(new File([bytes], "blue.png", { type: "image/png" }));
            document.getElementById("style-choose").dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
        }""",
        list(png(64, 64, "blue")),
    )
    page.wait_for_selector("#message", state="hidden")
    changes(page, red)
    blue = still(page)
    assert blue != plain
    page.click("#tab-text")
    changes(page, blue)
    page.click("#tab-image")
    page.click("button[data-source=drawing]")
    comes_back_to(blue)
    editing.kill()
    page.wait_for_selector("#status[data-state='no connection']")
    editing.start()
    live(page)
    comes_back_to(blue)
    page.click("#style-remove")
    page.wait_for_selector(thumbnail, state="hidden")
    comes_back_to(plain)


def test_two_tabs_draw_a_third_waits_and_all_come_back_to_a_server_that_was_killed(tab, serving):
    first, second = tab(), tab()
    for page in (first, second):
        live(page)
        changes(page, changes(page, page.evaluate(OUT)))
    third = tab()
    third.wait_for_function("() => document.getElementById('veil-detail').textContent.includes('slots are taken')")
    assert third.text_content("#veil-title") == "Waiting for a free slot" and third.is_disabled("#prompt")
    second.context.close()
    live(third)
    first.fill("#prompt", "an octopus, flat vector")
    serving.kill()
    first.wait_for_selector("#status[data-state='no connection']")
    serving.start()
    for page in (first, third):
        live(page)
        changes(page, page.evaluate(OUT))
    assert first.input_value("#prompt") == "an octopus, flat vector"


def test_while_the_model_loads_the_page_says_so_and_a_negative_prompt_is_used(tab):
    one = Serving(0, GUIDED).start()
    try:
        page = tab(one.url, PHONE)
        said = []
        while ["", False] not in said:
            page.wait_for_timeout(200)
            said = page.evaluate("said")
        titles = [title for title, _ in said]
        first = titles.index("Drawing the first image")
        assert titles[0] == "Connecting to the server" and "Loading the model" in titles[:first]
        assert "Warming up" not in titles[first:], "it comes before, where it takes long enough to be seen"
        before = said[: max(k for k in range(first) if titles[k] in ("Loading the model", "Warming up")) + 1]
        assert all(disabled for title, disabled in before), "nothing can be set before its value is known"
        page.select_option("#motion", "still")
        slide(page, "guidance", 3)
        before = still(page)
        page.fill("#negative", "a red apple, 3d render, on a sky blue background")
        changes(page, before)
        page.fill("#negative", "")
        page.wait_for_function(f"before => {OUT} === before", arg=before)
    finally:
        one.kill()


def test_chips_and_notes_say_what_the_model_draws(tab):
    page = tab()
    live(page)
    assert page.is_hidden("#negative") and page.is_hidden("#guidance"), "this server draws without guidance"
    assert page.is_hidden("#style-panel"), "this model takes no references"
    assert "emoji only" in page.text_content("#prompt-note") and page.locator("#chips button").count() == len(
        EXAMPLE_PROMPTS
    )
    page.select_option("#motion", "still")
    before = still(page)
    page.click(f"#chips button:text-is('{EXAMPLE_PROMPTS[1]}')")
    assert page.input_value("#prompt") == EXAMPLE_PROMPTS[1]
    changes(page, before)


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_prompt_is_seen_at_once_and_nothing_scrolls_sideways(tab, size):
    page = tab(size=size)
    live(page)
    for mode in ("text", "image"):
        page.click(f"#tab-{mode}")
        if mode == "image":
            page.click("button[data-source=drawing]")
            live(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        image, prompt = (page.locator(one).bounding_box() for one in ("#output", "#prompt"))
        assert prompt["y"] + prompt["height"] < size[1] and image["y"] + image["height"] < size[1]
        assert size == DESKTOP or prompt["y"] > image["y"] + image["height"]
    page.evaluate("scrollTo(0, 10000)")
    slide(page, "seed", -1)
    page.wait_for_selector("#message")
    message = page.locator("#message").bounding_box()
    assert "seed" in page.text_content("#message").lower() and 0 < message["y"] < size[1] - message["height"]
    slide(page, "seed", 1)
    page.wait_for_selector("#message", state="hidden")


def test_a_link_carries_the_settings_and_the_server_checks_them(tab):
    page = tab()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    live(page)
    page.fill("#prompt", "a fox & a #1 rocket, 100 % 3d render")
    page.select_option("#motion", "fresh")
    for name, value in (("seed", 77), ("steps", 5)):
        slide(page, name, value)
    page.click("#copy-link")
    page.wait_for_selector("#message[data-kind=note]")
    link = page.evaluate("navigator.clipboard.readText()")
    page.context.close()
    page = tab(link + "&unknown=1&running=false&blend=x")
    live(page)
    values = [page.input_value(f"#{name}") for name in ("prompt", "motion", "seed", "steps", "blend")]
    assert values == ["a fox & a #1 rocket, 100 % 3d render", "fresh", "77", "5", "0"] and "#" not in page.url
    page.reload()
    live(page)
    assert page.input_value("#seed") == "77"
    page.evaluate("location.hash = 'seed=-5&mode=image'")
    page.wait_for_function("() => document.getElementById('message').textContent.startsWith('Seed')")
    assert page.get_attribute("#tab-image", "aria-selected") == "true"


def test_the_output_is_recorded_paused_and_shown_on_the_full_screen(tab):
    import av

    page = tab()
    live(page)
    page.click("#record")
    page.wait_for_selector("#record[aria-pressed=true]")
    changes(page, changes(page, page.evaluate(OUT)))
    page.wait_for_timeout(1200)
    with page.expect_download() as saved:
        page.click("#record")
    assert saved.value.suggested_filename == "streamflow.webm"
    with av.open(str(saved.value.path())) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) > 2 and frames[0].shape[:2] == (128, 128) and frames[-1].std() > 10
    page.click("#full-screen")
    page.wait_for_function("() => document.fullscreenElement?.id === 'output-figure'")
    page.click("#full-screen")
    page.wait_for_function("() => !document.fullscreenElement")
    page.click("#pause")
    page.wait_for_selector("#status[data-state=paused]")
    assert page.text_content("#output-figure figcaption") == "paused"
    still(page)


@pytest.mark.parametrize(
    "fails", ["constructor() { throw new Error('no encoder'); }", "start() { throw new Error('no encoder'); }"]
)
def test_a_recorder_that_fails_says_so_and_leaves_nothing_running(tab, fails):
    page = tab()
    live(page)
    page.evaluate(
        """fails => {
            window.started = new Set();
            const [start, end] = [window.setInterval, window.clearInterval];
            window.setInterval = (...given) => { const id = start(...given); started.add(id); return id; };
            window.clearInterval = (id) => { started.delete(id); end(id); };
            window.MediaRecorder = eval(`(class { static isTypeSupported() { return true; } ${fails} })`);
        }""",
        fails,
    )
    page.click("#record")
    page.wait_for_selector("#message[data-kind=error]")
    assert page.text_content("#message") == "The browser cannot record this: no encoder."
    assert page.evaluate("started.size") == 0 and page.text_content("#record") == "Record video"
    changes(page, page.evaluate(OUT))


def test_without_a_clipboard_the_link_is_in_the_address_bar_until_a_setting_changes(tab):
    page = tab(before=lambda page: page.add_init_script("delete Navigator.prototype.clipboard"))
    live(page)
    bare = page.url
    slide(page, "seed", 12)
    page.click("#copy-link")
    page.wait_for_selector("#message[data-kind=note]")
    assert "in the address bar" in page.text_content("#message") and "seed=12" in page.url
    slide(page, "seed", 13)
    assert page.url == bare
    page.reload()
    live(page)
    assert page.input_value("#seed") == "13"


@pytest.mark.parametrize(
    "state, words",
    [
        ("the model cannot be opened", "The model cannot be opened"),
        ("the model's thread has ended", "The model has stopped after an error"),
        ("token required", "This server asks for a token"),
    ],
)
def test_errors_are_said_in_words(tab, state, words):
    answer = {"status": 200, "json": {"state": state, "message": state}}
    page = tab(before=lambda page: page.route("**/session?page=true", lambda route: route.fulfill(**answer)))
    page.wait_for_function("words => document.getElementById('veil-title').textContent === words", arg=words)
    assert page.is_disabled("#prompt") and page.is_disabled("#tab-image")


def test_control_images_of_the_camera_are_shown_beside_it_where_they_are_wanted(tab, tmp_path_factory):
    pytest.importorskip("cv2", reason="needs OpenCV")
    from random_pipelines.control import random_control

    from streamflow.models import load

    folder = tmp_path_factory.mktemp("net")
    random_control(load("embedded").transformer).save_pretrained(folder)
    net = ["--control-net", str(folder), "--control-maker", "canny", "--controlnet.scale", "0.1"]
    one = Serving(0, ["--num-inference-steps", "2", "--cfg-type", "none", "--server.max-viewers", "1", *net]).start()
    try:
        page = tab(one.url)
        page.wait_for_selector("#status[data-state=waiting]")
        assert page.is_hidden("#tab-text") and page.is_hidden("#control-figure")
        page.click("button[data-source=camera]")
        live(page)
        control = page.evaluate(CONTROL)
        page.check("#show-control")
        page.wait_for_function(f"before => {CONTROL} !== before", arg=control)
        share = """() => {  // of white pixels
            const { data } = document.getElementById("control").getContext("2d").getImageData(0, 0, 128, 128);
            return data.filter((value, k) => k % 4 === 0 && value > 200).length / data.length * 4;
        }"""
        assert page.is_visible("#control-figure") and 0.001 < page.evaluate(share) < 0.3
        page.uncheck("#show-control")
        page.wait_for_selector("#control-figure", state="hidden")
        for _ in range(2):  # what was on its way has come
            changes(page, page.evaluate(OUT))
        last = page.evaluate(CONTROL)
        for _ in range(2):
            changes(page, page.evaluate(OUT))
        assert page.evaluate(CONTROL) == last, "no control image is sent that is not wanted"
    finally:
        one.kill()


def test_a_video_is_one_for_all_tabs_and_each_changes_its_prompt(tab, tmp_path_factory):
    from random_pipelines import random_pipeline

    folder = tmp_path_factory.mktemp("video")
    random_pipeline("helios").save_pretrained(folder)
    size = ["--width", "32", "--height", "32", "--prompt", "a fox", "--steps", "1"]
    settings = ["--model", str(folder), *size, "--video.arguments", "{num_latent_frames_per_chunk: 3}"]
    one = Serving(0, settings, HELIOS + COMMAND).start()
    try:
        pages = [tab(one.url), tab(one.url, PHONE)]
        for page in pages:
            live(page)
            assert page.input_value("#prompt") == "a fox" and page.is_visible("#guidance")
            for hidden in ("#tab-image", "#motion", "#steps", "#other", "#blend", "#ring"):
                assert page.is_hidden(hidden)
            changes(page, page.evaluate(OUT))
        pages[0].fill("#prompt", "a lighthouse")
        pages[1].wait_for_function("() => document.getElementById('prompt').value === 'a lighthouse'")
        pages[1].reload()
        live(pages[1])
        assert pages[1].input_value("#prompt") == "a lighthouse"
    finally:
        one.kill()
