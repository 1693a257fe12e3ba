"""Clips of emoji in motion: drawn on the device by affine maps, for as many frames as are wanted, with their prompts.

A scene is an image, a background, a motion and its phase, period and amplitude. A sequence shows one scene, or two of which
the second takes over at the border of a chunk. Everything is a closed form of time, so a motion has no end.
"""

import json
import math
from dataclasses import dataclass

import emoji_folder
import torch
from captions import BACKGROUNDS, STYLES, canonical, on_background, parts
from pack import SIZE, Pack, background_rgb, compose, placement, row_weights
from training import cumulated, pick

IMAGES = 9  # of a chunk
CHUNKS = 12  # of a sequence
REST = 0.66  # scale of an image at rest
FADE, TURN = IMAGES, 12  # frames in which an image and a motion give way to the next one

MOTIONS = ("", "spinning", "swaying", "bouncing", "moving", "pulsing")  # "": it rests
PERIODS = (32.0, 36.0, 30.0, 28.0, 36.0, 26.0)  # frames
SPEEDS = {"": 1.0, "slowly": 1.6, "quickly": 0.65}  # factors of the period

STYLES_NAMED = ("3d", "flat")
CONCEPTS = (  # what a prompt may name
    "fox, panda, koala, lion, tiger face, unicorn, rabbit, hedgehog, penguin, parrot, frog, dragon, whale, dolphin, "
    "octopus, crab, snail, butterfly, honeybee, lady beetle, red apple, banana, pineapple, strawberry, watermelon, "
    "carrot, mushroom, pizza, hamburger, hot dog, taco, sushi, doughnut, cookie, birthday cake, ice cream, lollipop, "
    "sunflower, tulip, rose, palm tree, rocket, airplane, sailboat, automobile, bus, bicycle, helicopter, flying saucer, "
    "house, castle, guitar, trumpet, camera, crown, gem stone, light bulb, teddy bear, soccer ball, balloon, trophy, "
    "alarm clock, red heart, star"
).split(", ")


def held_out(pack: Pack) -> Pack:
    """The concepts that training sees in no style."""
    hidden = json.loads(emoji_folder.HOLDOUT.read_text())
    labels = {label for name, some in hidden.items() if name.startswith("withheld") for label in some}
    return pack.select(lambda row: row["label"] in labels)


def training_images(pack: Pack, concepts: int = 0, others: int = 0) -> tuple[Pack, int]:
    """The images that can be named, `concepts` concepts of them or all, and after them the others; and how many can be
    named."""
    hidden = {row["label"] for row in held_out(pack).rows}
    chosen = CONCEPTS[: concepts or None]
    known = pack.select(lambda row: row["label"] in chosen and row["style"] in STYLES_NAMED)
    if len(known.rows) < len(chosen):
        raise ValueError(f"the pack has {len(known.rows)} of the images of {len(chosen)} concepts: build it with data.py")
    rest = pack.select(lambda row: row["label"] not in hidden and row["label"] not in CONCEPTS)
    rest = rest.select(lambda row: True) if not others else Pack(rest.rows[:others], rest.rgba[:others])
    return Pack(known.rows + rest.rows, torch.cat([known.rgba, rest.rgba])), len(known.rows)


# -- prompts ---------------------------------------------------------------------------------------------------------------


def motion_words(motion: int, speed: str = "") -> str:
    """`, spinning quickly`; nothing for an image at rest."""
    return f", {MOTIONS[motion]} {speed}".rstrip() if MOTIONS[motion] else ""


def names_of(row: dict) -> list[str]:
    """Ways to name an image: in full, without its article, without its style."""
    start, name = parts(row)
    return [canonical(row), f"{name}, {STYLES[row['style']]}", f"{start}{name}"]


def all_words(rows: list[dict]) -> list[str]:
    """The parts of all prompts that name these images, or none."""
    moves = [motion_words(motion, speed) for motion in range(len(MOTIONS)) for speed in SPEEDS]
    return [text for row in rows for text in names_of(row)] + [
        *(f"an emoji, {words}" for words in STYLES.values()), *map(on_background, BACKGROUNDS), *moves
    ]  # fmt: skip


def prompt_of(row: dict, motion: str, speed: str = "", background: str = "white", named: bool = True) -> str:
    """`a fox, 3d render, on a pink background, spinning quickly`"""
    name = canonical(row) if named else f"an emoji, {STYLES[row['style']]}"
    return name + on_background(background) + motion_words(MOTIONS.index(motion), speed)


NAME_SHARES = (0.8, 0.1, 0.1)  # of the ways to name an image that can be named


class Prompts:
    """Token ids of prompts, put together on the device from those of their parts. `encode` gives the ids of a text, without
    padding and end."""

    def __init__(self, rows: list[dict], named: int, encode, tokens: int, end: int, device: torch.device):
        """The first `named` rows have names; all others are any emoji."""
        names = [[encode(text) for text in names_of(row)] for row in rows[:named]]
        any_of = {style: encode(f"an emoji, {words}") for style, words in STYLES.items()}
        names += [[any_of[row["style"]]] * len(NAME_SHARES) for row in rows[named:]]
        grounds = [encode(on_background(name)) for name in BACKGROUNDS]
        moves = [[[*encode(motion_words(m, s)), end] for s in SPEEDS] for m in range(len(MOTIONS))]
        flat = [one for ways in names for one in ways], grounds, [one for some in moves for one in some]
        longest = [max(map(len, some)) for some in flat]
        if sum(longest) > tokens:
            found = " + ".join(map(str, longest))
            raise ValueError(f"a prompt has up to {found} tokens, and {tokens} are used: raise TOKENS")
        lengths = zip(flat, longest, strict=True)
        tables = [torch.tensor([one + [0] * (length - len(one)) for one in some]) for some, length in lengths]
        self.names = tables[0].view(len(rows), len(names[0]), -1).to(device)
        self.grounds = tables[1].to(device)
        self.moves = tables[2].view(len(MOTIONS), len(SPEEDS), -1).to(device)
        self.tokens = tokens

    def of(self, row, way, ground, motion, speed) -> torch.Tensor:
        """int64 [N, tokens], from indices [N]."""
        ids = torch.cat([self.names[row, way], self.grounds[ground], self.moves[motion, speed]], 1)
        place = torch.arange(ids.shape[1], device=ids.device)
        order = torch.sort(place + ids.shape[1] * (ids == 0)).indices  # padding last
        ids = ids.gather(1, order)[:, : self.tokens]
        return torch.nn.functional.pad(ids, (0, self.tokens - ids.shape[1]))


# -- motion ----------------------------------------------------------------------------------------------------------------


def poses(motion: torch.Tensor, angle: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
    """Right, down (pixels), turn (radians) and scale, [..., 4], of motions at phase `angle` (radians, any number)."""
    sine, zero, rest = torch.sin(angle), torch.zeros_like(angle), torch.full_like(angle, REST)
    of_each = [
        [zero, zero, zero, rest],
        [zero, zero, -angle, rest],
        [6 * amplitude * sine, zero, -0.45 * amplitude * sine, rest],
        [zero, -20 * amplitude * torch.sin(angle / 2).abs(), zero, rest],
        [20 * amplitude * sine, 8 * amplitude * torch.sin(2 * angle), zero, rest],
        [zero, zero, zero, rest * (1 + 0.25 * amplitude * sine)],
    ]
    every = torch.stack([torch.stack(one, -1) for one in of_each], -2)
    index = motion[..., None, None].expand(*every.shape[:-2], 1, 4)
    return every.gather(-2, index)[..., 0, :]


@dataclass(frozen=True)
class Scenes:
    """N sequences of up to two scenes: image, ground, motion, speed (indices), phase, period, amplitude, each [N, 2]; switch
    [N], the frame where the second begins."""

    image: torch.Tensor
    ground: torch.Tensor
    motion: torch.Tensor
    speed: torch.Tensor
    phase: torch.Tensor
    period: torch.Tensor
    amplitude: torch.Tensor
    switch: torch.Tensor

    def poses(self, time: torch.Tensor) -> torch.Tensor:
        """[N, T, 4] at frames `time` [N, T]."""
        since = (time - self.switch[:, None]).clamp(min=0)
        clock = torch.stack([time, since], -1)
        angle = self.phase[:, None] + 2 * math.pi * clock / self.period[:, None]
        turns = torch.round((self.phase[:, 0] + 2 * math.pi * self.switch / self.period[:, 0]) / (2 * math.pi))
        both = poses(self.motion[:, None].expand_as(angle), angle, self.amplitude[:, None].expand_as(angle))
        first, second = both.unbind(2)
        whole = (self.motion[:, :1] == MOTIONS.index("spinning")) * turns[:, None] * 2 * math.pi * (since > 0)
        first = torch.stack([first[..., 0], first[..., 1], first[..., 2] + whole, first[..., 3]], -1)
        goes_on = (self.motion[:, 0] == self.motion[:, 1]) & (self.speed[:, 0] == self.speed[:, 1])
        second = torch.where(goes_on[:, None, None], first, second)
        part = (since / TURN).clamp(max=1)
        return torch.lerp(first, second, (part * part * (3 - 2 * part))[..., None])


def render(rgba: torch.Tensor, grounds: torch.Tensor, scenes: Scenes, time: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, T, 128, 128] in [-1, 1] of frames `time` [N, T], from the images and backgrounds that there are."""
    count, frames = time.shape
    right, down, turn, scale = scenes.poses(time).flatten(0, 1).unbind(-1)
    place = placement(scale, torch.stack([right, down], -1), turn)
    image, ground = scenes.image.repeat_interleave(frames, 0), scenes.ground.repeat_interleave(frames, 0)
    drawn = [compose(rgba[image[:, k]], grounds[ground[:, k]], place) for k in range(2)]
    part = ((time - scenes.switch[:, None] + 1) / FADE).clamp(0, 1).flatten()[:, None, None, None]
    return torch.lerp(drawn[0], drawn[1], part).unflatten(0, (count, frames)).transpose(1, 2)


class Clips:
    """The images on the device, and sequences drawn of them without the host, so that a CUDA graph can hold it."""

    def __init__(self, pack: Pack, named: int, prompts: Prompts, share: float = 0.7, jitter: float = 0.06):
        device = prompts.names.device
        self.rgba, self.prompts, self.named, self.share, self.jitter = pack.rgba.to(device), prompts, named, share, jitter
        others = row_weights(pack.rows[named:]) if len(pack.rows) > named else torch.zeros(0)
        weights = torch.cat([torch.full((named,), share / named), (1 - share) * others])
        self.shares = cumulated(weights).to(device)
        self.grounds = background_rgb(list(BACKGROUNDS), device)
        self.periods = torch.tensor(PERIODS, device=device)
        self.factors = torch.tensor(list(SPEEDS.values()), device=device)
        self.ways = cumulated(torch.tensor(NAME_SHARES)).to(device)

    def _some(self, shape: tuple[int, ...], most: int) -> torch.Tensor:
        return torch.randint(most, shape, device=self.rgba.device)

    def _uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, device=self.rgba.device)

    def scenes(self, count: int, started: float = 0.65, switched: float = 0.3) -> tuple[Scenes, torch.Tensor]:
        """Sequences, and which of them [N] begin at rest. The share `switched` has a second scene, with another motion,
        another image or both."""
        image = pick(self.shares, 2 * count).view(count, 2)
        ground = torch.where(self._uniform(count, 2) < 0.5, 0, self._some((count, 2), len(BACKGROUNDS)))
        motion = self._some((count, 2), len(MOTIONS) - 1) + 1
        motion = torch.where(self._uniform(count, 2) < 0.1, 0, motion)
        kind = self._uniform(count, 1)
        second = torch.arange(2, device=image.device) == 1
        image = torch.where((kind < 0.5) & second, image[:, :1], image)
        ground = torch.where((kind < 0.75) & second, ground[:, :1], ground)
        speed = torch.where(self._uniform(count, 2) < 0.5, 0, self._some((count, 2), len(SPEEDS)))
        goes_on = (kind > 0.5) & (kind < 0.75) & second
        motion, speed = (torch.where(goes_on, one[:, :1], one) for one in (motion, speed))
        begins = self._uniform(count) < started
        free = torch.where(begins, 0.0, 1.0)[:, None] * torch.where(second, 0.0, 1.0)
        phase = 4 * math.pi * self._uniform(count, 2) * free
        jitter = 1 + self.jitter * (2 * self._uniform(2, count, 2) - 1)
        period = self.periods[motion] * self.factors[speed] * jitter[0]
        chunk = torch.where(self._uniform(count) < switched, self._some((count,), CHUNKS - 2) + 1, 10**6)
        return Scenes(image, ground, motion, speed, phase, period, jitter[1], chunk * IMAGES), begins

    def render(self, scenes: Scenes, time: torch.Tensor) -> torch.Tensor:
        return render(self.rgba, self.grounds, scenes, time)

    def prompt_ids(self, scenes: Scenes) -> torch.Tensor:
        """int64 [N, 2, tokens]: what the two scenes are called."""
        image, ground, motion, speed = (one.flatten() for one in (scenes.image, scenes.ground, scenes.motion, scenes.speed))
        ids = self.prompts.of(image, pick(self.ways, len(image)), ground, motion, speed)
        return ids.view(*scenes.image.shape, -1)

    def some_chunks(self, count: int) -> torch.Tensor:
        """Single chunks [count, 3, 9, 128, 128] from anywhere in a sequence."""
        scenes, _ = self.scenes(count)
        return self.render(scenes, self._some((count, 1), CHUNKS * IMAGES - IMAGES) + frames_of(IMAGES, self.rgba.device))


def frames_of(count: int, device) -> torch.Tensor:
    """0 to count - 1, [1, count]."""
    return torch.arange(count, device=device)[None]


def still(scenes: Scenes) -> Scenes:
    """One sequence for each scene that begins at rest, which it never leaves."""
    return Scenes(**{**vars(scenes), "motion": torch.zeros_like(scenes.motion), "switch": scenes.switch + 10**6})


assert SIZE == 128 and len(PERIODS) == len(MOTIONS)
