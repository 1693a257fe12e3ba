"""Ten doodles drawn with ImageDraw, each with the concept it shows: what a person might draw in a minute."""

from collections.abc import Callable

from PIL import Image, ImageDraw

SIZE, LARGE = 128, 512
BLACK, RED, GREEN, BLUE, YELLOW = "#141414", "#ed1c24", "#22b14c", "#3f76e4", "#ffd91a"
ORANGE, BROWN, PINK, GRAY, SKY = "#ff7f27", "#a0522d", "#ffaec9", "#9a9a9a", "#99d9ea"
Pen = ImageDraw.ImageDraw


def line(pen: Pen, *points: tuple[float, float], colour: str = BLACK, width: int = 16) -> None:
    pen.line(points, fill=colour, width=width, joint="curve")
    for x, y in points:
        pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=colour)


def area(pen: Pen, *points: tuple[float, float], colour: str, width: int = 16) -> None:
    pen.polygon(points, fill=colour)
    line(pen, *points, points[0], width=width)


def ball(pen: Pen, x: float, y: float, rx: float, ry: float, colour: str, width: int = 16) -> None:
    pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour, outline=BLACK if width else None, width=width)


def apple(pen: Pen) -> None:
    ball(pen, 190, 300, 120, 140, RED, 0)
    ball(pen, 310, 305, 125, 135, RED, 0)
    line(pen, (252, 190), (262, 130), (290, 90), colour=BROWN, width=24)
    area(pen, (280, 140), (350, 90), (390, 110), (330, 160), colour=GREEN, width=8)


def fish(pen: Pen) -> None:
    area(pen, (350, 260), (470, 170), (455, 260), (470, 350), colour=ORANGE)
    ball(pen, 220, 258, 170, 110, ORANGE)
    ball(pen, 135, 230, 14, 14, BLACK, 0)
    line(pen, (90, 300), (130, 310), width=10)


def house(pen: Pen) -> None:
    area(pen, (110, 230), (405, 235), (400, 440), (105, 435), colour=YELLOW)
    area(pen, (70, 240), (255, 90), (445, 245), colour=RED)
    area(pen, (215, 310), (300, 312), (298, 440), (214, 438), colour=BROWN, width=12)


def tree(pen: Pen) -> None:
    area(pen, (225, 300), (290, 300), (300, 465), (215, 462), colour=BROWN)
    for x, y, r in ((170, 220, 95), (340, 225, 95), (255, 140, 105), (255, 240, 100)):
        ball(pen, x, y, r, r * 0.95, GREEN, 0)


def sun(pen: Pen) -> None:
    ends = ((256, 40), (410, 105), (475, 256), (405, 410), (256, 472), (100, 405), (38, 256), (105, 100))
    for x, y in ends:
        line(pen, (256 + 0.62 * (x - 256), 256 + 0.62 * (y - 256)), (x, y), colour=ORANGE, width=22)
    ball(pen, 256, 256, 115, 112, YELLOW, 14)


def mushroom(pen: Pen) -> None:
    area(pen, (205, 270), (305, 272), (325, 440), (190, 442), colour="#efe4b0")
    pen.pieslice((70, 80, 440, 460), 180, 360, fill=RED, outline=BLACK, width=16)
    for x, y, r in ((170, 200, 32), (275, 150, 36), (360, 215, 26)):
        ball(pen, x, y, r, r, "white", 0)


def cat(pen: Pen) -> None:
    for points in (((130, 200), (125, 75), (230, 140)), ((385, 205), (390, 75), (285, 140))):
        area(pen, *points, colour="white")
    ball(pen, 257, 275, 165, 150, "white")
    for x in (195, 320):
        ball(pen, x, 250, 20, 26, BLACK, 0)
    area(pen, (240, 305), (275, 305), (257, 325), colour=PINK, width=6)
    for x, end in ((160, 50), (355, 465)):
        line(pen, (x, 310), (end, 295), width=8)
        line(pen, (x, 330), (end, 345), width=8)


def car(pen: Pen) -> None:
    area(pen, (45, 300), (130, 290), (185, 190), (340, 190), (395, 290), (470, 305), (465, 380), (48, 378), colour=BLUE)
    area(pen, (195, 285), (215, 215), (325, 215), (350, 285), colour=SKY, width=10)
    for x in (140, 370):
        ball(pen, x, 385, 52, 52, BLACK, 0)
        ball(pen, x, 385, 20, 20, GRAY, 0)


def balloon(pen: Pen) -> None:
    line(pen, (256, 330), (240, 390), (268, 430), (250, 490), width=10)
    ball(pen, 256, 190, 125, 150, PINK)


def flower(pen: Pen) -> None:
    line(pen, (256, 260), (262, 380), (250, 490), colour=GREEN, width=26)
    for x, y in ((256, 110), (370, 180), (330, 310), (185, 310), (140, 185)):
        ball(pen, x, y, 72, 70, "#a349a4", 10)
    ball(pen, 256, 215, 55, 55, YELLOW, 10)


DOODLES: dict[str, Callable[[Pen], None]] = {
    "a red apple": apple,
    "a fish": fish,
    "a house": house,
    "a tree": tree,
    "a sun": sun,
    "a mushroom": mushroom,
    "a cat face": cat,
    "a car": car,
    "a balloon": balloon,
    "a flower": flower,
}


def draw(name: str) -> Image.Image:
    """A doodle of DOODLES, 128x128 RGB."""
    large = Image.new("RGB", (LARGE, LARGE), "white")
    DOODLES[name](ImageDraw.Draw(large))
    return large.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
