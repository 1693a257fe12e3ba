"""Draw the graph of integrations/comfyui/travel_and_restyle_api.json on the page of a running ComfyUI that has the nodes.

    python docs/comfyui_graph.py http://127.0.0.1:8188

Runs the graph and writes docs/static/comfyui.webp, a screenshot, and the graph in the form in which ComfyUI's page saves it,
integrations/comfyui/example_workflows/travel_and_restyle.json.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NODES = ROOT / "integrations/comfyui"
NAME = "travel_and_restyle"
WIDTH, HEIGHT = 1500, 930

# Left, top, width and height of each node.
PLACES = {
    "1": (0, 0, 300, 300),
    "2": (0, 345, 300, 200),
    "5": (0, 590, 300, 160),
    "3": (350, 0, 290, 300),
    "6": (350, 450, 290, 300),
    "4": (690, 0, 680, 360),
    "7": (690, 405, 680, 345),
}
HIDDEN = ("Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo", "Comfy.Graph.CanvasMenu")

LOAD = """async ([graph, places, hidden]) => {
    for (const name of hidden) await app.extensionManager.setting.set(name, false);
    await app.loadApiJson(graph, "streamflow");
    for (const [id, [x, y, width, height]] of Object.entries(places)) {
        const node = app.graph.getNodeById(id);
        node.pos = [x, y];
        node.setSize([width, height]);
        for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
    }
    const saved = JSON.stringify(app.graph.serialize());
    await app.queuePrompt(0, 1);
    return saved;
}"""
BUSY = """async () => {
    const queue = await (await fetch("/queue")).json();
    return queue.queue_running.length + queue.queue_pending.length > 0;
}"""
SHOW = """() => {
    app.canvas.ds.scale = 1.0;
    app.canvas.ds.offset = [65, 118];
    app.canvas.setDirty(true, true);
}"""


def main(address: str) -> int:
    from playwright.sync_api import sync_playwright

    graph = json.loads((NODES / f"{NAME}_api.json").read_text(encoding="utf-8"))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(address)
        page.wait_for_function("() => window.app?.graph && window.app?.canvas", timeout=60_000)
        page.wait_for_timeout(3000)
        page.keyboard.press("Escape")  # the browser of templates, which opens at the first visit
        saved = json.loads(page.evaluate(LOAD, [graph, PLACES, HIDDEN]))
        page.wait_for_timeout(1000)
        while page.evaluate(BUSY):
            page.wait_for_timeout(500)
        page.evaluate(SHOW)
        page.wait_for_timeout(3000)
        screenshot = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    screenshot.convert("RGB").save(ROOT / "docs/static/comfyui.webp", quality=88)
    target = NODES / f"example_workflows/{NAME}.json"
    target.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
