"""A unit of work: as much of a source as one task reads, and how it is written in the listing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from moe_core.data.sources.samples import Reject, Sample

SAMPLES_PER_UNIT = 10_000
"""Lines of a manifest or images of a folder in a unit: as many as img2dataset puts into a tar."""


@dataclass(frozen=True)
class Unit:
    """A tar, a row group, a range of lines or of a folder's images."""

    path: str
    """absolute; relative to the listing for what stage `source` wrote itself"""
    bytes: int
    """of the file; of a folder's images, their sum"""
    changed: int | str | None
    """what differs when the content does: time of change in ns, or a hash of names, sizes and times; None: DVC hashes the file"""
    part: tuple[int, int] | tuple[str, str] | None = None
    """row group and rows, first and end byte, or first and last name; None: all of the file"""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What `as_dict` gave, also after JSON."""
        part = values["part"]
        return cls(**{**values, "part": None if part is None else tuple(part)})


class Source(Protocol):
    """The seam: a kind of data set."""

    def units(self) -> Iterator[Unit]:
        """All units, in an order that depends on the files alone.

        Raises DataError where there is nothing to read, or a table lacks a column that is asked for.
        """

    def read(self, unit: Unit) -> Iterator[Sample | Reject]:
        """The samples of a unit in its order, with the image's exact bytes, and what is broken or filtered.

        Images are not decoded. Nothing that a file holds raises.
        """


def unit_of_file(path: Path, part: tuple[int, int] | None = None) -> Unit:
    """A file, or a part of it."""
    found = path.stat()
    return Unit(str(path.absolute()), found.st_size, found.st_mtime_ns, part)
