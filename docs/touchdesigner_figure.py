"""Draw the wiring of StreamFlow and TouchDesigner that the guide shows.

    python docs/touchdesigner_figure.py

Writes docs/static/touchdesigner.svg.
"""

from __future__ import annotations

from pathlib import Path

INK, PAPER = "#222222", "#f3f6fa"
BLUE, GREEN, RED = "#1f5fa8", "#2a9d6f", "#d1495b"
WIDTH, HEIGHT = 860, 500
ALT = "TouchDesigner sends OSC to streamflow live and reads its page, and takes its images by NDI, Spout or MJPEG"

# x, y, width, height, color, and lines, the first one in bold
BOXES = (
    (34, 62, 270, 92, GREEN, ("Component with StreamFlowExt", "a parameter for each OSC address;", "Send(), Refresh()")),
    (34, 212, 270, 54, RED, ("NDI In TOP",)),
    (34, 284, 270, 54, RED, ("Syphon Spout In TOP", "Windows")),
    (34, 356, 270, 54, RED, ("Script TOP", "script_top_callbacks.py")),
    (34, 428, 270, 42, BLUE, ("NDI Out TOP",)),
    (556, 62, 270, 42, GREEN, ("control.osc 127.0.0.1:9000",)),
    (556, 112, 270, 42, GREEN, ("control.page 9001",)),
    (556, 212, 270, 54, RED, ("--out ndi:StreamFlow",)),
    (556, 284, 270, 54, RED, ("--out spout:StreamFlow",)),
    (556, 356, 270, 54, RED, ("--out mjpeg:8080",)),
    (556, 428, 270, 42, BLUE, ("--in ndi:NAME",)),
)
# y, whether it leads to the right, and the text above
ARROWS = (
    (83, True, "OSC, UDP: values and texts"),
    (133, False, "HTTP: addresses, ranges, values"),
    (239, False, "NDI, over the network"),
    (311, False, "a texture of the GPU"),
    (383, False, "HTTP: JPEG images"),
    (449, True, "camera or scene, optional"),
)
FRAMES = ((16, "TouchDesigner"), (538, "streamflow live"))


def main() -> None:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="15" role="img" aria-label="{ALT}">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
    ]
    for x, title in FRAMES:
        parts.append(f'<rect x="{x}" y="16" width="306" height="{HEIGHT - 30}" rx="10" fill="none" stroke="#c3ccd8"/>')
        parts.append(f'<text x="{x + 153}" y="44" text-anchor="middle" fill="{INK}" font-weight="bold">{title}</text>')
    for x, y, width, height, color, lines in BOXES:
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" '
            f'fill="{PAPER}" stroke="{color}" stroke-width="1.2"/>'
        )
        top = y + height / 2 + 5 - 9.5 * (len(lines) - 1)
        for number, line in enumerate(lines):
            bold = ' font-weight="bold"' if not number else ""
            parts.append(
                f'<text x="{x + width // 2}" y="{top + 19 * number:g}" text-anchor="middle" fill="{INK}"{bold}>{line}</text>'
            )
    for y, right, text in ARROWS:
        begin, end = (304, 555) if right else (556, 305)
        parts.append(
            f'<path d="M{begin} {y} L{end} {y}" stroke="{INK}" stroke-width="1.4" fill="none" marker-end="url(#a)"/>'
        )
        parts.append(f'<text x="430" y="{y - 8}" text-anchor="middle" fill="{INK}" font-size="13">{text}</text>')
    target = Path(__file__).parent / "static/touchdesigner.svg"
    target.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
