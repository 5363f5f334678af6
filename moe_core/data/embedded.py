"""Small coloured scenes made from scikit-learn's handwritten digits: the data set that needs no download.

- A scene is a square RGB picture of 1 x 1 or 2 x 2 cells; a cell is black or holds one real handwritten digit in one
  colour.
- Prompts are of GenEval's six kinds, and each comes with GenEval's own record: `{tag, include: [{class, count, color?,
  position?}], prompt}`; a position is `["left of", 0]`: this object lies left of `include[0]`.
- Sample i is a function of (seed, i) alone, so the data set does not depend on how it is cut or in what order it is
  written.
- The leading `generator_share` of the digits makes scenes; the rest, other people's hands, is the evaluator's. Neither
  sees the other's.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from moe_core.config import EmbeddedDataConfig
from moe_core.errors import DataError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "white": (1.0, 1.0, 1.0),
}
DIGIT_PIXELS = 8
"""Side of one of scikit-learn's digits; a larger cell shows it in larger pixels."""
MAX_CELLS = 4
POSITIONS = ("left of", "right of", "above", "below")
SAMPLES_PER_TAR = 5000
_PROMPT_STREAM = 1
"""Keeps evaluation prompts apart from training samples of the same seed."""


@dataclass(frozen=True)
class Scene:
    """A picture [canvas, canvas, 3] of uint8 and what GenEval needs to know of its prompt."""

    image: NDArray[np.uint8]
    record: dict[str, Any]

    @property
    def prompt(self) -> str:
        """The caption."""
        return self.record["prompt"]


@dataclass(frozen=True)
class _Plan:
    """What a scene is to show: the record, and per digit its cell, class and colour name."""

    record: dict[str, Any]
    placed: tuple[tuple[int, int, str], ...]


@cache
def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


def generator_digits(config: EmbeddedDataConfig) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Ink [N, 8, 8] in [0, 1] and classes [N] of the digits that scenes may show."""
    images, classes = _digits()
    cut = int(config.generator_share * len(images))
    return images[:cut], classes[:cut]


def evaluator_digits(config: EmbeddedDataConfig) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Ink [N, 8, 8] in [0, 1] and classes [N] of the digits that no scene shows."""
    images, classes = _digits()
    cut = int(config.generator_share * len(images))
    return images[cut:], classes[cut:]


def render(placed: list[tuple[int, NDArray[np.float32], str]], canvas: int, grid: int) -> NDArray[np.uint8]:
    """Draws (cell, ink [8, 8], colour name) triples on black; returns uint8 [canvas, canvas, 3].

    Cells are numbered row by row. Raises DataError for a canvas that the cells do not fill, an unknown colour, or two
    digits in one cell.
    """
    _check_canvas(canvas, grid)
    side = canvas // grid
    picture = np.zeros((canvas, canvas, 3), np.float32)
    taken: set[int] = set()
    for cell, ink, colour in placed:
        if colour not in COLOURS:
            raise DataError(f"colour is '{colour}'; it must be one of {', '.join(COLOURS)}")
        if cell in taken:
            raise DataError(f"cell {cell} is given two digits; a cell holds one")
        taken.add(cell)
        scale = side // DIGIT_PIXELS
        shape = ink.repeat(scale, axis=0).repeat(scale, axis=1)
        top, left = (side * place for place in divmod(cell, grid))
        picture[top : top + side, left : left + side] = shape[:, :, None] * np.array(COLOURS[colour], np.float32)
    return np.round(picture * 255).astype(np.uint8)


def make_scene(
    config: EmbeddedDataConfig, seed: int, index: int, digits: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None
) -> Scene:
    """Sample `index` of the data set with this seed; made of the generator's digits, or of these (ink [N, 8, 8] and classes [N])."""
    rng = np.random.default_rng([seed, index])
    plan = _plan(config, rng, config.kinds[int(rng.integers(len(config.kinds)))])
    images, classes = generator_digits(config) if digits is None else digits
    placed = [
        (cell, images[rng.choice(np.flatnonzero(classes == digit))], colour) for cell, digit, colour in plan.placed
    ]
    return Scene(render(placed, config.canvas, config.grid), plan.record)


def make_prompts(config: EmbeddedDataConfig, seed: int, count: int) -> list[dict[str, Any]]:
    """`count` GenEval records, the kinds in turn, so that each has as many prompts as the others (give or take one).

    A kind that is listed twice, to be trained on twice as often, is not asked for more often.
    """
    kinds = tuple(dict.fromkeys(config.kinds))
    return [
        _plan(config, np.random.default_rng([seed, i, _PROMPT_STREAM]), kinds[i % len(kinds)]).record
        for i in range(count)
    ]


def captions_vocabulary() -> list[str]:
    """Captions that together hold every word a scene's prompt may use: what the small tokenizers are made from."""
    numbers = DIGIT_NAMES[2 : MAX_CELLS + 1]
    return [
        *(with_article(name) for name in DIGIT_NAMES),
        *(f"{number} {plural}" for number in numbers for plural in PLURALS),
        *(f"a {colour} {DIGIT_NAMES[0]} and a {colour} {DIGIT_NAMES[0]}" for colour in COLOURS),
        *(f"a {DIGIT_NAMES[0]} {position} a {DIGIT_NAMES[1]}" for position in POSITIONS),
    ]


def write_source(folder: Path, config: EmbeddedDataConfig, seed: int) -> list[Path]:
    """Writes the data set as a WebDataset folder (.png, .txt, .json a sample); returns the tars.

    The same parameters give the same bytes: fixed time stamps, owners and compression.
    """
    _check_canvas(config.canvas, config.grid)
    unknown = [colour for colour in config.colours if colour not in COLOURS]
    if unknown:
        raise DataError(f"data.embedded.colours has {unknown}; the known colours are {', '.join(COLOURS)}")
    folder.mkdir(parents=True, exist_ok=True)
    tars = []
    for shard in range(math.ceil(config.samples / SAMPLES_PER_TAR)):
        path = folder / f"embedded-{shard:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(shard * SAMPLES_PER_TAR, min((shard + 1) * SAMPLES_PER_TAR, config.samples)):
                scene = make_scene(config, seed, index)
                png = io.BytesIO()
                Image.fromarray(scene.image).save(png, "PNG", compress_level=6)
                meta = json.dumps(scene.record, sort_keys=True)
                for suffix, content in (
                    ("png", png.getvalue()),
                    ("txt", scene.prompt.encode()),
                    ("json", meta.encode()),
                ):
                    member = tarfile.TarInfo(f"{index:08d}.{suffix}")
                    member.size = len(content)
                    member.mode = 0o644
                    tar.addfile(member, io.BytesIO(content))
        tars.append(path)
    return tars


def _plan(config: EmbeddedDataConfig, rng: np.random.Generator, kind: str) -> _Plan:
    """Draws what a scene of this kind shows. Whatever the prompt leaves open (cells, colours) is drawn evenly."""
    first, second = (int(d) for d in rng.choice(10, size=2, replace=False))
    names = DIGIT_NAMES[first], DIGIT_NAMES[second]
    cells = [int(c) for c in rng.permutation(config.grid**2)]
    colours = [str(c) for c in rng.choice(config.colours, size=MAX_CELLS)]
    needed = {"single_object": 1, "colors": 1}.get(kind, 2)
    room = min(config.max_digits, config.grid**2)
    if room < needed:
        raise DataError(
            f"data.embedded.max_digits is {config.max_digits} and grid {config.grid}, but kind '{kind}' shows {needed}"
            " digits; drop the kind, or raise max_digits or grid"
        )
    if kind == "single_object":
        return _Plan(_record(kind, with_article(names[0]), [_object(first)]), ((cells[0], first, colours[0]),))
    if kind == "colors":
        include = [_object(first, color=colours[0])]
        return _Plan(_record(kind, f"a {colours[0]} {names[0]}", include), ((cells[0], first, colours[0]),))
    if kind == "counting":
        count = int(rng.integers(2, room + 1))
        placed = tuple((cells[i], first, colours[i]) for i in range(count))
        return _Plan(_record(kind, f"{DIGIT_NAMES[count]} {PLURALS[first]}", [_object(first, count)]), placed)
    if kind == "two_object":
        prompt = f"{with_article(names[0])} and {with_article(names[1])}"
        placed = ((cells[0], first, colours[0]), (cells[1], second, colours[1]))
        return _Plan(_record(kind, prompt, [_object(first), _object(second)]), placed)
    if kind == "color_attr":
        one, other = (str(c) for c in rng.choice(config.colours, size=2, replace=False))
        include = [_object(first, color=one), _object(second, color=other)]
        prompt = f"a {one} {names[0]} and a {other} {names[1]}"
        return _Plan(_record(kind, prompt, include), ((cells[0], first, one), (cells[1], second, other)))
    if kind != "position":
        raise DataError(f"kind is '{kind}'; it must be one of GenEval's six")
    relation = POSITIONS[int(rng.integers(len(POSITIONS)))]
    line = int(rng.integers(2))
    lesser, greater = (2 * line, 2 * line + 1) if relation in ("left of", "right of") else (line, line + 2)
    here, there = (lesser, greater) if relation in ("left of", "above") else (greater, lesser)
    include = [_object(second), _object(first, position=[relation, 0])]
    prompt = f"{with_article(names[0])} {relation} {with_article(names[1])}"
    return _Plan(_record(kind, prompt, include), ((here, first, colours[0]), (there, second, colours[1])))


def _object(digit: int, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": DIGIT_NAMES[digit], "count": count, **more}


def _check_canvas(canvas: int, grid: int) -> None:
    if canvas <= 0 or canvas % (grid * DIGIT_PIXELS):
        raise DataError(
            f"data.embedded.canvas is {canvas}; for a grid of {grid} it must be a positive multiple of"
            f" {grid * DIGIT_PIXELS}"
        )


def with_article(name: str) -> str:
    """By sound: "a one", "an eight"."""
    return f"an {name}" if name == "eight" else f"a {name}"


def _record(tag: str, prompt: str, include: list[dict[str, Any]]) -> dict[str, Any]:
    return {"tag": tag, "include": include, "prompt": prompt}
