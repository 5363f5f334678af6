"""Reads image files by names that others have written: never outside a root, never what is no plain file.

A symbolic link is followed if its target lies under the root, too.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from moe_core.data.sources.samples import MAX_IMAGE_BYTES, Reject


def read_file(root: Path, name: str, key: str, where: str, missing: str = "missing_file") -> bytes | Reject:
    """The bytes of file `name`, relative to `root` (a resolved folder) or absolute and under it.

    `where` names in the Reject who named the file, `missing` is the reason where it does not exist.
    """
    try:
        parts = Path(name).parts
        resolved = os.path.realpath(root / name)
        if ".." in parts or os.path.commonpath((root, resolved)) != str(root):
            return Reject(key, "unsafe_path", f"{where}: '{name}' points outside; images must lie under {root}")
        # O_NONBLOCK: opening a named pipe would wait for its writer.
        descriptor = os.open(resolved, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return Reject(key, missing, f"{where}: '{name}' does not exist under {root}")
    except (OSError, ValueError) as error:
        # ValueError: a null character in the name.
        return Reject(key, missing, f"{where}: '{name}' cannot be opened under {root} ({error})")
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return Reject(key, "unsafe_path", f"{where}: '{name}' is no plain file; only those are read")
        if found.st_size > MAX_IMAGE_BYTES:
            detail = f"{where}: '{name}' has {found.st_size} bytes; at most {MAX_IMAGE_BYTES} are read"
            return Reject(key, "oversized_file", detail)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        return Reject(key, missing, f"{where}: '{name}' cannot be read ({error})")
    finally:
        os.close(descriptor)


def writable(name: str) -> bool:
    """Whether a name can be written as UTF-8: a file's or tar member's may hold any bytes."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
