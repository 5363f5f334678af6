"""Images, tars and folders as people have them, small, and a shorthand for reading them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from moe_core.config import DataConfig, FieldsConfig, FiltersConfig, parse
from moe_core.data.sources import open_source
from moe_core.data.sources.reading import Kept, keep
from moe_core.data.sources.samples import Reject

SHARD = {"samples_per_shard": 10, "validation_samples": 2, "calibration_samples": 2}
FIELDS = FieldsConfig()
FILTERS = FiltersConfig()


def image(width: int = 16, height: int = 16, shade: int = 200, kind: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 30, 10)).save(file, kind, **more)
    return file.getvalue()


def png(rows: NDArray[Any], bits: int, colour: int) -> bytes:
    """A PNG of any depth and colour type; `rows`: [height, values of a row], big-endian."""
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    width = rows.shape[1] // {0: 1, 2: 3}[colour]
    return _chunks(struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0), lines)


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 x 60,000 pixels."""
    return _chunks(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"\0" * 1000)


def _chunks(header: bytes, lines: bytes) -> bytes:
    kinds = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in kinds
    )


def tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def lines(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines; a row of bytes stands as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def config(kind: str, path: Path | None, fields: dict[str, Any] | None = None, **more: Any) -> DataConfig:
    values = {
        "name": "x",
        "kind": kind,
        "path": path and str(path),
        "fields": fields or {},
        "filters": {},
        "shard": SHARD,
    }
    return parse(DataConfig, {**values, **more})


def read(data: DataConfig, side: int = 16) -> tuple[list[Kept], list[Reject]]:
    """All that a source keeps, and what it does not, in order."""
    source = open_source(data, Path("nowhere"))
    found = [entry for unit in source.units() for entry in keep(source, unit, data.buckets_or(side), data.filters)]
    return [e for e in found if isinstance(e, Kept)], [e for e in found if isinstance(e, Reject)]


def keys(kept: list[Kept]) -> list[str]:
    return [entry.sample.key for entry in kept]


def reasons(rejects: list[Reject]) -> list[str]:
    return [reject.reason for reject in rejects]
