"""The same-noise gallery (the paper's Fig. 1): a row a model, a column a prompt, a column from one initial noise."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from itertools import zip_longest

from PIL import Image, ImageDraw

from tasks.report_inputs import Inputs, Picture
from tasks.report_table import kinds

CELL, LARGEST = 96, 224
"""Side of a shown picture in pixels: small ones are enlarged by a whole factor to about CELL, large ones reduced to LARGEST."""

RIGHT, WRONG = (46, 125, 79), (190, 60, 50)


@dataclass(frozen=True)
class Cell:
    """One picture of the gallery, as PNG bytes."""

    png: bytes
    correct: bool | None

    @property
    def verdict(self) -> str:
        """In a word."""
        return {True: "right", False: "wrong", None: "not judged"}[self.correct]

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Gallery:
    """`cells[model][column]`; `prompts[column]`."""

    prompts: list[str]
    cells: dict[str, list[Cell]]
    side: int
    """of a picture as it is shown"""
    enlarged: bool


def gallery(inputs: Inputs) -> Gallery:
    """The pictures of the shown prompts, for every model."""
    shown = chosen(inputs)
    pictures = inputs.pictures
    side = inputs.params.model.resolution
    return Gallery(
        prompts=[pictures["teacher"][i].prompt for i in shown],
        cells={
            m: [Cell(_png(_shown(inputs, m, pictures[m][i])), pictures[m][i].correct) for i in shown]
            for m in inputs.models
        },
        side=max(CELL, min(side, LARGEST)),
        enlarged=side < CELL,
    )


def chosen(inputs: Inputs) -> list[int]:
    """Which prompts are shown: the first of each kind, then the second of each; never picked by how they came out.

    A prompt that comes again, with other noise, waits for those that were not shown yet.
    """
    pictures = inputs.pictures["teacher"]
    by_kind = [[i for i, picture in enumerate(pictures) if picture.tag == kind] for kind in kinds(inputs)]
    in_turn: list[int] = [i for turn in zip_longest(*by_kind) for i in turn if i is not None]
    first = {pictures[i].prompt: i for i in reversed(in_turn)}
    # A stable sort: False, a first time, before True.
    return sorted(in_turn, key=lambda i: first[pictures[i].prompt] != i)[: inputs.params.eval.gallery]


def _shown(inputs: Inputs, model: str, picture: Picture) -> Image.Image:
    with Image.open(inputs.images / model / picture.file) as image:
        rgb = image.convert("RGB")
    side = max(rgb.size)
    if side > LARGEST:
        return rgb.resize((rgb.width * LARGEST // side, rgb.height * LARGEST // side), Image.Resampling.LANCZOS)
    factor = max(1, CELL // side)
    return rgb.resize((rgb.width * factor, rgb.height * factor), Image.Resampling.NEAREST)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def sheet(shown: Gallery) -> Image.Image:
    """All as one picture, for Markdown; a line below a picture is green where the evaluator found it right, red where wrong."""
    grid = [[Image.open(io.BytesIO(cell.png)) for cell in cells] for cells in shown.cells.values()]
    step = max(image.height for row in grid for image in row) + 10
    canvas = Image.new("RGB", (step * len(shown.prompts), step * len(grid)), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (cells, row) in enumerate(zip(shown.cells.values(), grid, strict=True)):
        for x, (cell, image) in enumerate(zip(cells, row, strict=True)):
            canvas.paste(image, (x * step, y * step))
            if cell.correct is None:
                continue
            top = y * step + image.height + 1
            pen.rectangle((x * step, top, x * step + image.width - 1, top + 2), fill=RIGHT if cell.correct else WRONG)
    return canvas
