"""Folders that appear whole or not at all: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def flush_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Makes every file below `folder`, and its name, survive a power cut."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            flush_folder(path)
    flush_folder(folder)


def meant(place: str, root: Path) -> Path | None:
    """The folder, there or not, that `place` means as seen from `root`; None if it is a hub id.

    A hub id is `name` or `owner/name`, with no folder of that name here, nor one named as the owner: `data/llava` is a folder
    that is missing where there is a `data`.
    """
    path = root / place
    owner = Path(place).parts[:-1]
    is_id = not Path(place).is_absolute() and not place.startswith((".", "~")) and len(owner) < 2
    return None if is_id and not path.exists() and not (owner and path.parent.exists()) else path


def partial(path: Path) -> Path:
    """The folder that becomes `path`, while it is not whole."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` when the block ends without an error; an older `path` is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = partial(path)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    yield unfinished
    flush_tree(unfinished)
    if path.exists():
        shutil.rmtree(path)
    unfinished.rename(path)
    flush_folder(path.parent)
