"""A folder of images with their captions beside them: `x.jpg` (png, webp), `x.txt` and, if there is, `x.json`; in subfolders too."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_core.config import FieldsConfig, FiltersConfig
from moe_core.data.sources import records
from moe_core.data.sources.files import read_file, writable
from moe_core.data.sources.samples import IMAGE_SUFFIXES, Reject, Sample
from moe_core.data.sources.units import SAMPLES_PER_UNIT, Unit
from moe_core.errors import DataError


@dataclass(frozen=True)
class Folder:
    """A unit is up to 10,000 images of one folder, in the order of their names; a key is the image's path without suffix."""

    folder: Path
    root: Path
    fields: FieldsConfig
    filters: FiltersConfig

    def units(self) -> Iterator[Unit]:
        """Slices of each folder; raises DataError where there is no folder or no image."""
        if not self.folder.is_dir():
            raise DataError(f"data.path is {self.folder}; it must be a folder of images with their captions beside them")
        found = False
        # Links to folders are not followed: one could lead back up.
        for here, folders, names in os.walk(self.folder):
            folders.sort()
            files = sorted(names)
            images = [name for name in files if _is_image(name)]
            for first in range(0, len(images), SAMPLES_PER_UNIT):
                found = True
                yield _slice(Path(here), images[first : first + SAMPLES_PER_UNIT], set(files))
        if not found:
            raise DataError(f"data.path is {self.folder}; it holds no image ({', '.join(IMAGE_SUFFIXES)})")

    def read(self, unit: Unit) -> Iterator[Sample | Reject]:
        """The images of a slice, each with its caption."""
        here, root = Path(unit.path), self.root.resolve()
        assert unit.part is not None
        first, last = (str(name) for name in unit.part)
        names = set(os.listdir(here))
        below = here.relative_to(self.folder.absolute())
        for name in sorted(names):
            if first <= name <= last and _is_image(name):
                yield self._read(root, here, below, name, names)

    def _read(self, root: Path, here: Path, below: Path, name: str, names: set[str]) -> Sample | Reject:
        key = (below / Path(name).stem).as_posix()
        if not writable(key):
            return Reject(ascii(key), "unsafe_path", f"{here}: {ascii(name)} has a name that is not UTF-8")
        beside: dict[str, bytes] = {}
        for suffix in (records.TEXT_FILE, "json"):
            file = f"{Path(name).stem}.{suffix}"
            if file in names:
                content = read_file(root, str(here / file), key, str(here))
                if isinstance(content, Reject):
                    return content
                beside[suffix] = content
        record = records.parse(key, str(here / f"{Path(name).stem}.json"), beside.get("json", b"{}"))
        if isinstance(record, Reject):
            return record
        found = records.judge(key, str(here), beside.get(records.TEXT_FILE), record, self.fields, self.filters)
        if isinstance(found, Reject):
            return found
        image = read_file(root, str(here / name), key, str(here))
        return image if isinstance(image, Reject) else Sample(key, image, *found)


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def _slice(here: Path, images: list[str], files: set[str]) -> Unit:
    """The hash takes in the captions, too: names, sizes and times of change, not contents."""
    digest, size = hashlib.sha256(), 0
    for image in images:
        stem = Path(image).stem
        for name in (image, f"{stem}.{records.TEXT_FILE}", f"{stem}.json"):
            if name in files:
                found = (here / name).lstat()
                digest.update(os.fsencode(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0"))
                size += found.st_size
    return Unit(str(here.absolute()), size, digest.hexdigest(), (images[0], images[-1]))
