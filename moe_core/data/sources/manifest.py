"""A table of image paths and captions, Parquet or JSON lines; the images are files under a root.

- A unit is a row group of a Parquet file or some 10,000 lines; a key is the image's path as the table has it.
- A row's own columns are judged before its image is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_core.config import FieldsConfig, FiltersConfig
from moe_core.data.sources import records
from moe_core.data.sources.files import read_file, writable
from moe_core.data.sources.samples import Reject, Sample
from moe_core.data.sources.units import SAMPLES_PER_UNIT, Unit, unit_of_file
from moe_core.errors import DataError

SUFFIXES = (".parquet", ".jsonl")
MAX_LINE_BYTES = 16 * 2**20
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Manifest:
    """One table or a folder of them."""

    path: Path
    root: Path
    fields: FieldsConfig
    filters: FiltersConfig

    def units(self) -> Iterator[Unit]:
        """Row groups and ranges of lines, table by table; raises DataError for no table, or one without a column."""
        for table in list_tables(self.path):
            yield from parquet_units(table, self.fields) if table.suffix == ".parquet" else line_units(table)

    def read(self, unit: Unit) -> Iterator[Sample | Reject]:
        """The rows' images."""
        table, root = Path(unit.path), self.root.resolve()
        rows = _rows(unit, self.fields) if table.suffix == ".parquet" else read_lines(unit)
        for row in rows:
            yield row if isinstance(row, Reject) else self._read(root, table, row)

    def _read(self, root: Path, table: Path, row: dict[str, Any]) -> Sample | Reject:
        name = records.value(row, self.fields.image)
        if not isinstance(name, str) or not name:
            detail = f"{table}: a row has {type(name).__name__} in '{self.fields.image}'; the image's path is needed there"
            return Reject(f"{table.name}/", "missing_path", detail)
        if not writable(name):
            return Reject(ascii(name), "unsafe_path", f"{table}: {ascii(name)} is not UTF-8")
        found = records.judge(name, str(table), None, row, self.fields, self.filters)
        if isinstance(found, Reject):
            return found
        image = read_file(root, name, name, str(table), missing="missing_image")
        return image if isinstance(image, Reject) else Sample(name, image, *found)


def list_tables(path: Path) -> list[Path]:
    """A table, or those in a folder by name. Raises DataError where there is none."""
    if path.is_file() and path.suffix in SUFFIXES:
        return [path]
    tables = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else []
    if not tables:
        raise DataError(f"data.path is {path}; it must be a {' or '.join(SUFFIXES)} file, or a folder that holds some")
    return tables


def line_units(table: Path) -> Iterator[Unit]:
    """Ranges of bytes that end with a line."""
    with table.open("rb") as file:
        first = lines = 0
        while file.readline(MAX_LINE_BYTES):
            lines += 1
            if lines == SAMPLES_PER_UNIT:
                yield unit_of_file(table, (first, file.tell()))
                first, lines = file.tell(), 0
        if lines:
            yield unit_of_file(table, (first, file.tell()))
        elif not first:
            raise DataError(f"{table} is empty; it must have a JSON object a line")


def read_lines(unit: Unit) -> Iterator[dict[str, Any] | Reject]:
    """The JSON objects in a range of a file's lines; empty lines are left out."""
    table = Path(unit.path)
    assert unit.part is not None
    first, end = (int(byte) for byte in unit.part)
    with table.open("rb") as file:
        file.seek(first)
        while (here := file.tell()) < end and (line := file.readline(MAX_LINE_BYTES)):
            key = f"{table.name}/byte {here}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                yield Reject(key, "broken_json", f"{table}: the line at byte {here} is longer than {MAX_LINE_BYTES} bytes")
                while (more := file.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                    pass
            elif line.strip():
                yield records.parse(key, f"{table}: the line at byte {here}", line)


def parquet_units(table: Path, fields: FieldsConfig) -> Iterator[Unit]:
    """Row groups. A file that cannot be opened is a unit all the same, whose reading counts it as unreadable."""
    try:
        with pq.ParquetFile(table) as file:
            columns, groups = file.schema_arrow.names, file.num_row_groups
    except (pa.ArrowException, OSError):
        yield unit_of_file(table)
        return
    for field in (fields.image, fields.caption):
        if field not in columns and str(field).partition(".")[0] not in columns:
            raise DataError(f"{table} has no column '{field}'; its columns are {', '.join(columns)}")
    for group in range(groups):
        yield unit_of_file(table, (group, group + 1))


def _rows(unit: Unit, fields: FieldsConfig) -> Iterator[dict[str, Any] | Reject]:
    """The rows of a unit's row groups: all columns if all are kept, else those that are used."""
    table = Path(unit.path)
    used = [fields.image, fields.caption, fields.width, fields.height, fields.aesthetic_score, fields.language]
    try:
        with pq.ParquetFile(table) as file:
            names = None if fields.meta is None else _columns(file.schema_arrow.names, [*used, *fields.meta])
            groups = None if unit.part is None else list(range(*(int(group) for group in unit.part)))
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=names):
                for row in _objects(batch):
                    yield _plain(f"{table.name}/group {groups} row {number}", table, row)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        yield Reject(f"{table.name}/", "unreadable_file", f"{table} {unit.part or ''} cannot be read as Parquet: {error}")


def _columns(there: list[str], wanted: list[str | None]) -> list[str]:
    tops = {name for field in wanted if field for name in (field, field.partition(".")[0])}
    return [name for name in there if name in tops]


def _objects(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Rows one by one: Parquet does not check that its text is UTF-8, and one bad caption must not take the others along."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield error


def _plain(key: str, table: Path, row: dict[str, Any] | UnicodeDecodeError) -> dict[str, Any] | Reject:
    """A row as JSON would have it: what the shards' index can hold."""
    if isinstance(row, UnicodeDecodeError):
        return Reject(key, "caption_encoding", f"{table}: {key} has text that is not UTF-8 ({row})")
    return {name: _json(found) for name, found in row.items()}


def _json(found: Any) -> Any:
    if isinstance(found, dict):
        return {str(name): _json(inner) for name, inner in found.items()}
    if isinstance(found, list):
        return [_json(inner) for inner in found]
    return found if found is None or isinstance(found, str | int | float | bool) else str(found)
