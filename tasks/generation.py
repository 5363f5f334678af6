"""Pictures of one pipeline, made in Ray actors from fixed units of work and written as they come.

- A unit is a fixed run of pictures, made in one batch with a fixed number of threads: which actor makes it changes nothing.
- A picture's file appears whole or not at all. What is there already is not made again, so a killed run goes on where it was.
- Nothing here knows what kind of model it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from moe_core.config import ComputeConfig
from moe_core.pipeline_source import PipelineSource
from tasks.actors import actors
from tasks.progress import Told
from tasks.suites import Picture


@dataclass(frozen=True)
class Unit:
    """Some pictures of a suite, and the folder that they go to."""

    folder: Path
    pictures: tuple[Picture, ...]

    @property
    def is_done(self) -> bool:
        """Whether every picture is there."""
        return all((self.folder / picture.file).exists() for picture in self.pictures)


class Painter:
    """One pipeline in one process."""

    def __init__(self, source: PipelineSource, compute: ComputeConfig) -> None:
        # diffusers loads in the actors, not in the driver, where it would cost seconds for nothing.
        from moe_core import pipelines

        torch.set_num_threads(compute.cpus_per_worker)
        self.source = source
        self.pipeline = pipelines.load(source, torch.device("cuda" if compute.use_gpu else "cpu"))

    def paint(self, unit: Unit) -> float:
        """Makes a unit's pictures; returns the seconds that it took."""
        from moe_core import pipelines

        began = time.monotonic()
        images = pipelines.paint(
            self.pipeline,
            [picture.prompt.text for picture in unit.pictures],
            [picture.seed for picture in unit.pictures],
            self.source.arguments or {},
        )
        for picture, image in zip(unit.pictures, images, strict=True):
            _write(unit.folder / picture.file, Image.fromarray(image))
        return time.monotonic() - began


def make(source: PipelineSource, units: Sequence[Unit], compute: ComputeConfig, told: Told) -> float:
    """Deals the units that are not there yet to `compute.num_workers` actors; returns seconds of work, without loading."""
    for unit in units:
        unit.folder.mkdir(parents=True, exist_ok=True)
    todo, seconds = [unit for unit in units if not unit.is_done], 0.0
    count = sum(len(unit.pictures) for unit in units)
    there = count - sum(len(unit.pictures) for unit in todo)
    began = time.monotonic()
    if not todo:
        return seconds
    with actors(Painter, (source, compute), compute, len(todo)) as painters:
        made = 0
        for unit, taken in painters.each("paint", todo):
            made, seconds = made + len(unit.pictures), seconds + taken
            told(there + made, count, made / (time.monotonic() - began))
    return seconds


def units(folder: Path, pictures: Sequence[Picture], size: int) -> list[Unit]:
    """A suite's pictures cut into units of `size`."""
    return [Unit(folder, tuple(pictures[first : first + size])) for first in range(0, len(pictures), size)]


def _write(path: Path, image: Image.Image) -> None:
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format="PNG")
    partial.replace(path)
