"""The words of a caption: styles, colours, backgrounds, and the ways in which one image can be asked for.

Knows nothing of tensors. An image is a row of `captions.jsonl` (see data.py): `label`, `style`, `caption`,
`keywords`, `color`, ...
"""

import random
import re

STYLES = {
    "3d": "3d render",
    "flat": "flat vector",
    "gradient": "soft gradient",
    "noto": "glossy cartoon",
    "blob": "bold cartoon",
}

BACKGROUNDS = {  # red, green, blue in 0..255
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "light gray": (211, 211, 211),
    "red": (214, 48, 49),
    "orange": (245, 150, 50),
    "yellow": (250, 215, 70),
    "green": (60, 165, 85),
    "mint": (180, 235, 205),
    "teal": (30, 150, 150),
    "sky blue": (135, 206, 235),
    "blue": (50, 100, 220),
    "navy": (25, 35, 90),
    "purple": (125, 65, 175),
    "lavender": (215, 205, 245),
    "pink": (250, 180, 205),
    "brown": (120, 80, 50),
    "beige": (240, 228, 205),
    "cream": (255, 248, 225),
    "coral": (255, 130, 110),
}

HUES = {
    "red": 0.0,
    "orange": 28.0,
    "yellow": 50.0,
    "green": 120.0,
    "teal": 175.0,
    "blue": 215.0,
    "purple": 275.0,
    "pink": 330.0,
}

COLOUR_WORDS = re.compile(
    r"\b(red|orange|yellow|green|teal|blue|purple|pink|brown|black|white|gray|grey|golden|gold)\s+", re.IGNORECASE
)


def article(words: str) -> str:
    """`a `, or `an ` before a vowel."""
    return "an " if words[0].lower() in "aeiou" else "a "


def parts(row: dict) -> tuple[str, str]:
    """The row's own caption, taken apart: its article (empty for plurals and names) and what it names."""
    words = row["caption"].removesuffix(f", {STYLES[row['style']]}")
    start = next((a for a in ("a ", "an ") if words.startswith(a)), "")
    return start, words.removeprefix(start)


def on_background(background: str) -> str:
    return "" if background == "white" else f", on {article(background)}{background} background"


def plain_name(row: dict) -> str:
    """What the image shows, without the colour word that a recolouring would contradict."""
    return COLOUR_WORDS.sub("", parts(row)[1])


def tinted(row: dict, colour: str) -> tuple[str, str]:
    """Article and name, the name in `colour` unless that is empty."""
    start, name = parts(row)
    if not colour:
        return start, name
    name = f"{colour} {plain_name(row)}"
    return start and article(name), name


def canonical(row: dict, colour: str = "", background: str = "white") -> str:
    """`a turtle, 3d render, on a sky blue background`: the form that an image is known by."""
    start, name = tinted(row, colour)
    return f"{start}{name}, {STYLES[row['style']]}{on_background(background)}"


def _usable_keywords(row: dict) -> list[str]:
    return [word for word in row["keywords"] if len(word) > 2 and word.replace(" ", "").isalpha()]


def paraphrase(rng: random.Random, row: dict, colour: str, background: str) -> str:
    """Another way to ask for the same image: no article, no style, another order, a keyword in place of the label."""
    start, name = tinted(row, colour)
    style, end = STYLES[row["style"]], on_background(background)
    keywords = _usable_keywords(row)
    forms = [
        f"{name}, {style}{end}",
        f"{style} of {start}{name}{end}",
        f"{start}{name} in {style} style{end}",
        f"{start}{name}{end}",
        f"{name}{end}",
    ]
    weights = [3, 2, 1, 3, 2]
    if keywords:
        word = rng.choice(keywords)
        forms.append(f"{article(word)}{word}, {style}{end}")
        weights.append(3)
    if not colour and row["color"] in HUES and row["color_share"] > 0.55 and row["color"] not in name:
        forms.append(f"{article(row['color']) if start else ''}{row['color']} {name}, {style}{end}")
        weights.append(3)
    return rng.choices(forms, weights)[0]


def known_share(count: int) -> int:
    """How many of `count` captions are canonical."""
    return (count * 5 + 7) // 8


def ways_to_ask(rng: random.Random, row: dict, colour: str, background: str, count: int) -> list[str]:
    """`count` captions of one image, a little over half of them canonical."""
    known = known_share(count)
    return [canonical(row, colour, background)] * known + [
        paraphrase(rng, row, colour, background) for _ in range(count - known)
    ]
