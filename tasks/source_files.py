"""The listing that stage `source` leaves, read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from moe_core.config import DataConfig
from moe_core.data.sources import open_source
from moe_core.data.sources.units import Source, Unit
from moe_core.errors import DataError
from tasks.places import SOURCE

LISTING = "listing.jsonl"
"""A unit a line; paths are absolute, or relative to the listing for what the stage itself wrote."""


def source_of(root: Path, data: DataConfig) -> Source:
    """The source as its units are read."""
    return open_source(data, (root / SOURCE).absolute())


def units_of(root: Path) -> list[Unit]:
    """The units that the listing names, in order; raises DataError where a file is gone."""
    folder = (root / SOURCE).absolute()
    with (folder / LISTING).open(encoding="utf-8") as lines:
        units = [Unit.from_dict(json.loads(line)) for line in lines]
    units = [replace(unit, path=str(folder / unit.path)) for unit in units]
    for path in dict.fromkeys(unit.path for unit in units):
        if not Path(path).exists():
            raise DataError(
                f"{path}, which {folder / LISTING} names, does not exist; `dvc repro --force source` lists the data anew"
            )
    return units
