"""Builds the pack of images and captions from npm packages (see PACKAGES for their licences).

    python examples/train_emoji/data.py --output .cache/emoji/pack128.tar

Needs `npm` on the path and `pip install resvg_py==0.5.0`. Writes a tar of `<style>/<codepoint>.webp` (128x128 RGBA),
`captions.jsonl` with one row an image, and `LICENSES.txt`. Left out: skin tones, nation flags, keycaps, arrows,
signs, letters, clock faces, families.
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from captions import STYLES
from PIL import Image
from tqdm import tqdm

SIZE = 128
PACKAGES = {
    "@lobehub/fluent-emoji-3d": ("1.1.0", "MIT, Copyright (c) Microsoft Corporation"),
    "@iconify-json/fluent-emoji": ("1.2.7", "MIT, Copyright (c) Microsoft Corporation"),
    "@iconify-json/fluent-emoji-flat": ("1.2.6", "MIT, Copyright (c) Microsoft Corporation"),
    "@iconify-json/noto": ("1.2.9", "Apache-2.0, Google Noto Emoji"),
    "@iconify-json/noto-v1": ("1.2.5", "Apache-2.0, Google Noto Emoji"),
    "emojibase-data": ("17.0.0", "MIT, Miles Johnson"),
    "emojilib": ("4.0.3", "MIT, Mu-An Chiou"),
    "unicode-emoji-json": ("0.9.0", "MIT, Mu-An Chiou"),
}
ICON_SETS = {"flat": "fluent-emoji-flat", "gradient": "fluent-emoji", "noto": "noto", "blob": "noto-v1"}
LEFT_OUT = re.compile(
    r": facing right|^(wo)?men with bunny ears|^(wo)?men wrestling|^family|^couple|^kiss:|"
    r"^(women|men|woman and man) holding hands|^transgender flag|^flag:|o’clock$|-thirty$"
)
GROUPS_LEFT_OUT = {"components"}
SYMBOLS_KEPT = {"geometric", "zodiac"}
NO_ARTICLE = frozenset(
    (
        "bacon, baguette bread, bowling, bread, breast-feeding, broccoli, bubble tea, butter, camping, canned food, "
        "cooked rice, cooking, curry rice, dumpling, face holding back tears, face savoring food, fire, fog, garlic, "
        "hear-no-evil monkey, heart decoration, heart exclamation, heart on fire, heart suit, heart with arrow, "
        "heart with ribbon, ice, luggage, meat on bone, money with wings, people holding hands, "
        "people with bunny ears, popcorn, ring, sake, salt, see-no-evil monkey, seedling, shaved ice, skis, soap, "
        "spaghetti, speak-no-evil monkey, speaker high volume, speaker low volume, speaker medium volume, "
        "speaking head, sushi, thermometer, thread, two-hump camel, wedding, wing, wood, yarn"
    ).split(", ")
)
SINGULAR_IN_S = ("ss", "us", "is", "rhinoceros")
HUE_NAMES = ((15, "red"), (45, "orange"), (70, "yellow"), (165, "green"), (195, "teal"), (255, "blue"), (290, "purple"),
             (345, "pink"), (361, "red"))  # fmt: skip


@dataclass(frozen=True)
class Packages:
    """The JSON files of the installed npm packages."""

    folder: Path

    def json(self, name: str):
        return json.loads((self.folder / "node_modules" / name).read_text())

    @cached_property
    def icons(self) -> dict[str, dict]:
        return {style: self.json(f"@iconify-json/{name}/icons.json") for style, name in ICON_SETS.items()}

    @property
    def images_3d(self) -> Path:
        return self.folder / "node_modules" / "@lobehub" / "fluent-emoji-3d" / "assets"


def install(folder: Path) -> Packages:
    """`npm install` of the pinned packages into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not on the path; it comes with Node.js (https://nodejs.org)")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}\n')
    wanted = [f"{name}@{version}" for name, (version, _) in PACKAGES.items()]
    subprocess.run([npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", *wanted], cwd=folder, check=True)
    return Packages(folder)


def codepoints(hexcode: str) -> str:
    """`1F1E6-FE0F` -> `1f1e6`."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("’", "").replace("'", "").replace("&", "and")).strip("-")


def concepts(packages: Packages) -> list[dict]:
    """The emoji that are kept, with label, keywords, group and the names under which icon sets may have them."""
    messages = packages.json("emojibase-data/en/messages.json")
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    subgroups = {group["order"]: group["key"] for group in messages["subgroups"]}
    shortcodes = {codepoints(k): v for k, v in packages.json("emojibase-data/en/shortcodes/emojibase.json").items()}
    names = packages.json("unicode-emoji-json/data-by-emoji.json")
    more = packages.json("emojilib/dist/emoji-en-US.json")
    kept = []
    for entry in sorted(packages.json("emojibase-data/en/data.json"), key=lambda e: e.get("order", 10**6)):
        group, subgroup = groups.get(entry.get("group")), subgroups.get(entry.get("subgroup"))
        unwanted = group is None or group in GROUPS_LEFT_OUT or (group == "symbols" and subgroup not in SYMBOLS_KEPT)
        if unwanted or LEFT_OUT.search(entry["label"]):
            continue
        codes = shortcodes.get(codepoints(entry["hexcode"]), [])
        words = entry.get("tags", []) + [w.replace("_", " ") for w in more.get(entry["emoji"], [])[:10]]
        aliases = [
            entry["label"],
            names.get(entry["emoji"], {}).get("name", ""),
            *([codes] if isinstance(codes, str) else codes),
        ]
        kept.append({
            "id": codepoints(entry["hexcode"]), "label": entry["label"].replace(": ", ", ").replace("’", "'"),
            "keywords": list(dict.fromkeys(words))[:16], "group": group, "subgroup": subgroup,
            "names": list(dict.fromkeys(slug(alias.replace("_", " ")) for alias in aliases if alias)),
        })  # fmt: skip
    return kept


def article(label: str) -> str:
    head = re.split(r" (?:with|of|in|on|and|holding|at|departure|arrival) ", label)[0]
    plural = head.endswith("s") and not head.endswith(SINGULAR_IN_S)
    if label in NO_ARTICLE or plural or label[0].isupper() or label[0].isdigit() or label[0] == "a":
        return ""
    return "an " if label[0] in "eiou" and not label.startswith(("uni", "eu")) else "a "


def caption(label: str, style: str) -> str:
    return f"{article(label)}{label.replace(', ', ' with ')}, {STYLES[style]}"


def find_icon(icons: dict, names: list[str]) -> dict | None:
    """The first of `names` in an iconify set, through its aliases (mirrored ones excepted), with body and view box."""
    for name in names:
        alias = icons.get("aliases", {}).get(name, {})
        if name not in icons["icons"] and not alias.get("hFlip"):
            name = alias.get("parent", name)
        if name in icons["icons"]:
            box = {"width": icons.get("width", 16), "height": icons.get("height", 16), "left": 0, "top": 0}
            return box | icons["icons"][name]
    return None


def render(icon: dict) -> Image.Image:
    """An iconify icon as a square RGBA image, its view box padded where it is not square."""
    import resvg_py

    width, height = icon["width"], icon["height"]
    side = max(width, height)
    left, top = icon["left"] - (side - width) / 2, icon["top"] - (side - height) / 2
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{2 * SIZE}" '
        f'height="{2 * SIZE}" viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def resize(image: Image.Image) -> Image.Image:
    """To 128x128, in premultiplied alpha, so that no colour of transparent pixels bleeds in."""
    small = image.convert("RGBA").convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return small.convert("RGBA")


def colour_of(image: Image.Image) -> dict:
    """Its main colour's name, that colour's share of the visible pixels, and how narrow its hues are (0..1)."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    seen = pixels[..., 3] > 0.5
    rgb = pixels[seen][:, :3]
    if not len(rgb):
        return {"color": "white", "color_share": 0.0, "hue_conc": 0.0}
    light, chroma = rgb.max(1), rgb.max(1) - rgb.min(1)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (rgb[:, 1] - rgb[:, 2]), 2 * rgb[:, 0] - rgb[:, 1] - rgb[:, 2])) % 360
    names = np.select([hue < edge for edge, _ in HUE_NAMES], [name for _, name in HUE_NAMES], "red").astype("U8")
    names[(names == "orange") & (light < 0.6)] = "brown"
    grey = chroma < 0.12
    names[grey] = np.select([light[grey] > 0.88, light[grey] < 0.25], ["white", "black"], "gray")
    found, counts = np.unique(names, return_counts=True)
    turns = np.exp(1j * np.radians(hue[~grey])) * chroma[~grey]
    narrow = abs(turns.sum()) / chroma[~grey].sum() if (~grey).any() else 0.0
    return {
        "color": str(found[counts.argmax()]),
        "color_share": round(counts.max() / len(rgb), 2),
        "hue_conc": round(narrow, 2),
    }


def images_of(packages: Packages, concept: dict) -> dict[str, Image.Image]:
    """style -> 128x128 RGBA image, for the styles that have the concept."""
    found = {}
    paths = {codepoints(path.stem): path for path in packages.images_3d.glob(f"{concept['id'].split('-')[0]}*.webp")}
    if concept["id"] in paths:
        found["3d"] = resize(Image.open(paths[concept["id"]]))
    for style, icons in packages.icons.items():
        icon = find_icon(icons, concept["names"])
        if icon is not None:
            found[style] = resize(render(icon))
    return found


def add(tar: tarfile.TarFile, name: str, blob: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(blob)
    tar.addfile(info, io.BytesIO(blob))


def webp(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", quality=92, alpha_quality=100, method=6)
    return out.getvalue()


def build(packages: Packages, output: Path) -> None:
    rows = []
    part = output.with_suffix(".part")
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        tar = stack.enter_context(tarfile.open(part, "w"))
        everything = concepts(packages)
        pool = stack.enter_context(ProcessPoolExecutor())
        drawn = pool.map(partial(images_of, packages), everything, chunksize=8)
        for concept, images in zip(tqdm(everything, desc="images"), drawn, strict=True):
            for style, image in images.items():
                name = f"{style}/{concept['id']}.webp"
                add(tar, name, webp(image))
                rows.append({
                    "image": name, "id": concept["id"], "label": concept["label"], "style": style,
                    "caption": caption(concept["label"], style), "keywords": concept["keywords"], **colour_of(image),
                    "group": concept["group"], "subgroup": concept["subgroup"],
                })  # fmt: skip
        add(tar, "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        notes = [f"{name} {version}: {licence}" for name, (version, licence) in PACKAGES.items()]
        add(tar, "LICENSES.txt", ("\n".join(notes) + "\n").encode())
    part.replace(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".cache/emoji/pack128.tar"))
    parser.add_argument("--npm-folder", type=Path, default=Path(".cache/emoji/npm"), help="where packages are installed")
    arguments = parser.parse_args()
    build(install(arguments.npm_folder), arguments.output)
