"""JourneyDB as it is published, its archives unpacked: `imgs/000/*.jpg` to `imgs/199/*.jpg` beside JSON lines.

A line is `{"img_path": "./000/x.jpg", "prompt": ..., "Task2": {"Caption": ...}, ...}`. `train/` comes with two lists; the one whose
name has "repath" has the paths of the published images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_core.config import FieldsConfig, FiltersConfig
from moe_core.data.sources.manifest import Manifest, line_units
from moe_core.data.sources.samples import Reject, Sample
from moe_core.data.sources.units import Unit
from moe_core.errors import DataError

IMAGES = "imgs"


@dataclass(frozen=True)
class JourneyDB:
    """The folder `train` or `valid`, or the list in it; a unit is some 10,000 lines, a key the image's path."""

    path: Path
    root: Path | None
    fields: FieldsConfig
    filters: FiltersConfig

    def units(self) -> Iterator[Unit]:
        """Ranges of the list's lines; raises DataError where the list or the folder of images is missing."""
        listed = list_of(self.path)
        if not (root := self._root(listed)).is_dir():
            raise DataError(f"{root} does not exist; JourneyDB's archives must be unpacked there, or data.root say where")
        yield from line_units(listed)

    def read(self, unit: Unit) -> Iterator[Sample | Reject]:
        """The lines' images."""
        listed = Path(unit.path)
        yield from Manifest(listed, self._root(listed), self.fields, self.filters).read(unit)

    def _root(self, listed: Path) -> Path:
        return self.root or listed.parent / IMAGES


def list_of(path: Path) -> Path:
    """The list of a split: the file itself, the only .jsonl of a folder, or the only one with "repath" in its name."""
    if path.is_file() and path.suffix == ".jsonl":
        return path
    lists = sorted(path.glob("*.jsonl")) if path.is_dir() else []
    repath = [listed for listed in lists if "repath" in listed.name]
    for found in (lists, repath):
        if len(found) == 1:
            return found[0]
    raise DataError(
        f"data.path is {path}, with the lists {', '.join(listed.name for listed in lists) or 'none'};"
        " it must be JourneyDB's train/ or valid/ with one list, or the .jsonl itself"
    )
