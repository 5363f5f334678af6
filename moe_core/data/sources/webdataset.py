"""Reads image-text pairs from WebDataset tars, as img2dataset writes them: members of one key, `x.jpg` (png, webp),
`x.txt` and, if there is, `x.json`.

- Nothing is unpacked to disk. A name that points outside (`../x`, `/x`), a link or a device is rejected all the same.
- What is broken becomes a `Reject` with its reason, in its place in the stream; the samples around it are good.
- Sizes are checked before anything is read.
"""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from moe_core.config import FieldsConfig, FiltersConfig
from moe_core.data.sources import records
from moe_core.data.sources.files import writable
from moe_core.data.sources.samples import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, Reject, Sample
from moe_core.data.sources.units import Unit, unit_of_file
from moe_core.errors import DataError

TRUNCATED = "truncated_tar"
_BLOCK = tarfile.BLOCKSIZE
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Types of header that hold a longer name, or more, of the member after them."""
_MAX_EXTENSION_BYTES = 16 * 2**10
"""Four of the longest paths that Linux knows."""
_USED = (*IMAGE_SUFFIXES, records.TEXT_FILE, "json")


@dataclass(frozen=True)
class WebDataset:
    """A folder with .tar files, in subfolders too; a unit is a tar, a key "<tar's path without .tar>/<key in the tar>"."""

    folder: Path
    fields: FieldsConfig
    filters: FiltersConfig

    def units(self) -> Iterator[Unit]:
        """The tars, by path; raises DataError if there is no folder or no tar."""
        yield from map(unit_of_file, list_tars(self.folder))

    def read(self, unit: Unit) -> Iterator[Sample | Reject]:
        """The samples of a tar."""
        tar = Path(unit.path)
        name = tar.relative_to(self.folder.absolute()).with_suffix("").as_posix()
        yield from read_samples(tar, name, self.fields, self.filters)


@dataclass(frozen=True)
class _Member:
    """A plain file of a tar; `content` is empty where nothing of the suffix is used."""

    key: str
    suffix: str
    content: bytes


class _Header(tarfile.TarInfo):
    """A header of a tar that may be hostile: tarfile would take its word for any size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Raises tarfile.ReadError if an extension is too large."""
        header = super().frombuf(buf, encoding, errors)
        # tarfile reads one whole: terabytes are a MemoryError. And it looks in it for a pattern in quadratic time (CVE-2024-6232).
        if header.type in _EXTENSIONS and header.size > _MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(f"an extended header has {header.size} bytes; at most {_MAX_EXTENSION_BYTES} are read")
        return header


def list_tars(folder: Path) -> list[Path]:
    """The .tar files below a folder, by path. Raises DataError if there is no folder or no tar."""
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist; it must be a folder of .tar files")
    tars = sorted(path for path in folder.rglob("*.tar") if path.is_file())
    if not tars:
        raise DataError(f"data folder {folder} holds no .tar file; at least one is needed")
    return tars


def read_samples(
    tar: Path, name: str, fields: FieldsConfig, filters: FiltersConfig
) -> Iterator[Sample | Reject]:
    """The samples of a tar, in its order, and what was rejected; keys begin with `name`."""
    seen: set[str] = set()
    for key, group in itertools.groupby(_members(tar, name), key=lambda entry: entry.key):
        files: dict[str, bytes] = {}
        for entry in group:
            if isinstance(entry, Reject):
                yield entry
            else:
                files[entry.suffix] = entry.content
        if not files:
            continue
        if key in seen:
            yield Reject(
                key,
                "duplicate_key",
                f"{tar}: key '{key}' comes again; the members of a sample must stand together, once",
            )
            continue
        seen.add(key)
        yield _sample(tar, key, files, fields, filters)


def _members(tar: Path, name: str) -> Iterator[_Member | Reject]:
    """Each plain file, and Rejects for the rest and for an end that is cut off or damaged."""
    try:
        archive = tarfile.open(tar, "r:", tarinfo=_Header)  # noqa: SIM115 - closed below; an error here has its own message
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - hostile headers lead tarfile to any: RecursionError, OverflowError, IndexError
        size = tar.stat().st_size if tar.exists() else "no"
        yield Reject(f"{name}/", "unreadable_file", f"{tar} ({size} bytes) cannot be read as a tar: {error}")
        return
    with archive:
        while True:
            try:
                member = _next(archive)
                content = b"" if member is None else _content(archive, member)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - as above
                # What a RecursionError says hangs on the caller's depth.
                yield _truncated(tar, name, "nested too deep" if isinstance(error, RecursionError) else str(error))
                return
            if member is None:
                break
            # It keeps every header that it has read: hundreds of MB of a large tar.
            archive.members.clear()  # type: ignore[attr-defined]
            if member.isdir():
                continue
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            last = parts.pop() if parts else ""
            if not writable(member.name):
                detail = f"{tar}: member {ascii(member.name)} has a name that is not UTF-8"
                yield Reject(f"{name}/{ascii(last)}", "unsafe_name", detail)
            elif not member.isreg():
                yield Reject(
                    f"{name}/{last}",
                    "unsafe_name",
                    f"{tar}: member '{member.name}' is a link or device; only plain files are read",
                )
            elif member.name.startswith("/") or ".." in (*parts, last) or "\\" in member.name:
                yield Reject(
                    f"{name}/{last}",
                    "unsafe_name",
                    f"{tar}: member '{member.name}' points outside; names must be relative, without '..'",
                )
            elif content is None:
                detail = f"{tar}: member '{member.name}' has {member.size} bytes; at most {MAX_IMAGE_BYTES} are read"
                yield Reject(f"{name}/{last}", "oversized_member", detail)
            else:
                # WebDataset's rule: the key ends at the first dot of the file name.
                stem, _, suffix = last.partition(".")
                yield _Member("/".join((name, *parts, stem)), suffix.lower(), content)
        if not _ends_whole(tar, archive.offset):
            yield _truncated(tar, name, f"no end mark after byte {archive.offset}")


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member, None at the end. Raises tarfile.ReadError if it has a negative size or ends before it begins."""
    member = archive.next()
    # `offset` is where the next header is looked for. Were it not beyond this one, tarfile would read in a circle (CVE-2025-8194).
    if member is not None and (member.size < 0 or archive.offset <= member.offset):
        raise tarfile.ReadError(
            f"{ascii(member.name)} begins at byte {member.offset}, ends at {archive.offset} and has {member.size} bytes"
        )
    return member


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """A plain file's bytes; None if there are too many. Raises tarfile.ReadError if the archive ends within them."""
    if not member.isreg() or member.name.rpartition(".")[2].lower() not in _USED:
        return b""
    if member.size > MAX_IMAGE_BYTES:
        return None
    if member.issparse():
        reader = archive.extractfile(member)
        content = b"" if reader is None else reader.read()
    else:
        # As `extractfile` would, without three objects around each member.
        assert archive.fileobj is not None
        archive.fileobj.seek(member.offset_data)
        content = archive.fileobj.read(member.size)
    if len(content) != member.size:
        raise tarfile.ReadError(f"'{member.name}' has {len(content)} of {member.size} bytes")
    return content


def _ends_whole(tar: Path, offset: int) -> bool:
    """A whole tar ends with a block of zeros; `next` returns None both there and at a bare end of file."""
    with tar.open("rb") as file:
        file.seek(max(0, offset - _BLOCK))
        tail = file.read(2 * _BLOCK)
    return len(tail) >= _BLOCK and not any(tail[-_BLOCK:])


def _truncated(tar: Path, name: str, detail: str) -> Reject:
    return Reject(
        f"{name}/",
        TRUNCATED,
        f"{tar} ({tar.stat().st_size} bytes) is cut off or damaged: {detail}; a tar ends with two blocks of zeros",
    )


def _sample(
    tar: Path, key: str, by_suffix: dict[str, bytes], fields: FieldsConfig, filters: FiltersConfig
) -> Sample | Reject:
    """The pair that these members of one key make, or why they make none."""
    image = next((by_suffix[suffix] for suffix in IMAGE_SUFFIXES if suffix in by_suffix), None)
    if image is None:
        return Reject(
            key,
            "missing_image",
            f"{tar}: '{key}' has members {sorted(by_suffix)}; one of {', '.join(IMAGE_SUFFIXES)} is needed",
        )
    record = records.parse(key, f"{tar}: '{key}.json'", by_suffix.get("json", b"{}"))
    if isinstance(record, Reject):
        return record
    found = records.judge(key, str(tar), by_suffix.get(records.TEXT_FILE), record, fields, filters)
    return found if isinstance(found, Reject) else Sample(key, image, *found)
