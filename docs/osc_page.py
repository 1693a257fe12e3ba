"""Take the screenshot of the page of controls that the guide shows, with the knobs of a stage and a stream that keeps still.

    python docs/osc_page.py

Writes docs/static/osc-page.webp. Needs playwright and Chromium.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from streamflow.live.remote.knobs import Knobs
from streamflow.live.remote.page import ControlPage
from streamflow.live.remote.settings import Control, Mapping

ADDRESS = "127.0.0.1", 9000
PRESENT = {
    "prompt": "a fox, 3d render",
    "prompt_weights.1": 0.3,
    "guidance_scale": 3.1,
    "seed": 42,
    "strength": 0.6,
    "feedback": 0.25,
}
MAPPINGS: tuple[dict[str, Any], ...] = (
    {"address": "osc:/prompt", "field": "prompt"},
    {"address": "osc:/guidance", "field": "guidance_scale", "range": (1, 8), "smoothing": 0.2},
    {"address": "osc:/seed", "field": "seed", "range": (0, 100), "source": (0, 100)},
    {"address": "osc:/strength", "field": "strength", "range": (0.2, 1)},
    {"address": "midi:cc:1:74", "field": "feedback", "range": (0, 0.5)},
    {"address": "audio:beat", "field": "prompt_weights.1", "range": (1, 0)},
)


def main() -> None:
    from playwright.sync_api import sync_playwright

    mappings = tuple(Mapping(**one) for one in MAPPINGS)
    settings = Control(page=0, osc="9000", midi="nanoKONTROL2", sound=("audio:default",), mappings=mappings)
    page = ControlPage(settings, ADDRESS, Knobs(mappings), lambda: PRESENT, {})
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"))
        tab = browser.new_page(viewport={"width": 1180, "height": 800})
        tab.goto(f"http://127.0.0.1:{page.port}/")
        tab.wait_for_selector("#status:text('connected')")
        shot = Image.open(io.BytesIO(tab.screenshot(full_page=True)))
        browser.close()
    page.close()
    shot.convert("RGB").save(Path(__file__).parent / "static/osc-page.webp", quality=88)


if __name__ == "__main__":
    main()
