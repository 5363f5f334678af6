"""From a record (JSON object, row of a table) and a caption's bytes to caption and meta, or to a Reject.

What an image's record says is judged before the image is read or decoded.
"""

from __future__ import annotations

import json
import math
from typing import Any

from moe_core.config import FieldsConfig, FiltersConfig
from moe_core.data.sources.samples import Reject

TEXT_FILE = "txt"
"""The name of `fields.caption` that means the text beside the image."""


def parse(key: str, where: str, text: bytes | str) -> dict[str, Any] | Reject:
    """A JSON object; `where` names its file in the Reject."""
    try:
        record = json.loads(text)
        # A lone surrogate parses, and can be written nowhere.
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        return Reject(key, "broken_json", f"{where} cannot be parsed ({error}); it must be a JSON object in UTF-8")
    if not isinstance(record, dict):
        return Reject(key, "broken_json", f"{where} is a JSON {type(record).__name__}; it must be a JSON object")
    return record


def value(record: dict[str, Any], name: str | None) -> Any:
    """The value of a field, `a.b` being field b of object a; None where there is none."""
    if name is None:
        return None
    if name in record:
        return record[name]
    found: Any = record
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return found


def judge(
    key: str, where: str, text: bytes | None, record: dict[str, Any], fields: FieldsConfig, filters: FiltersConfig
) -> tuple[str, dict[str, Any]] | Reject:
    """Caption and meta of a sample, or why it is dropped; `text` is the content of its .txt, if there is one."""
    caption = _caption(key, where, text, record, fields)
    if isinstance(caption, Reject):
        return caption
    low, high = filters.caption_min_chars, filters.caption_max_chars
    if (low is not None and len(caption) < low) or (high is not None and len(caption) > high):
        detail = f"{where}: caption of '{key}' has {len(caption)} characters; it must have {low or 1} to {high or 'any'}"
        return Reject(key, "caption_length", detail)
    return _filtered(key, where, record, fields, filters) or (caption, _meta(record, fields))


def _caption(
    key: str, where: str, text: bytes | None, record: dict[str, Any], fields: FieldsConfig
) -> str | Reject:
    found: Any
    if fields.caption == TEXT_FILE:
        if text is None:
            return Reject(key, "missing_caption", f"{where}: '{key}' has no .txt; one with the caption is needed")
        try:
            found = text.decode("utf-8")
        except UnicodeDecodeError as error:
            return Reject(
                key,
                "caption_encoding",
                f"{where}: caption of '{key}' has byte 0x{error.object[error.start]:02x} at {error.start}; it must be UTF-8",
            )
    else:
        found = value(record, fields.caption)
        if not isinstance(found, str):
            detail = f"{where}: '{key}' has {type(found).__name__} in '{fields.caption}'; a caption is needed there"
            return Reject(key, "missing_caption", detail)
    caption = str(found).strip()
    if not caption:
        return Reject(key, "missing_caption", f"{where}: caption of '{key}' is empty; it must have a character")
    return caption


def _filtered(
    key: str, where: str, record: dict[str, Any], fields: FieldsConfig, filters: FiltersConfig
) -> Reject | None:
    if filters.languages is not None:
        language = value(record, fields.language)
        if language not in filters.languages:
            detail = f"{where}: '{key}' has {fields.language} {language!r}; wanted are {', '.join(filters.languages)}"
            return Reject(key, "language", detail)
    if filters.min_aesthetic_score is not None:
        score = number(value(record, fields.aesthetic_score))
        if score is None or score < filters.min_aesthetic_score:
            detail = f"{where}: '{key}' has {fields.aesthetic_score} {score}; at least {filters.min_aesthetic_score:g} is wanted"
            return Reject(key, "aesthetic_score", detail)
    width, height = number(value(record, fields.width)), number(value(record, fields.height))
    # A record without its sides is no fault: the image's own are looked at when it is opened.
    if width and height:
        return size_reject(key, width, height, filters)
    return None


def size_reject(key: str, width: float, height: float, filters: FiltersConfig) -> Reject | None:
    """Why an image of these sides, in pixels, is not wanted; None where it is."""
    short, long = sorted((width, height))
    size = f"'{key}' is {width:g} x {height:g} pixels"
    if filters.min_side is not None and short < filters.min_side:
        return Reject(key, "min_side", f"{size}; the shorter side must be at least {filters.min_side}")
    if filters.max_aspect is not None and long > filters.max_aspect * short:
        return Reject(key, "max_aspect", f"{size}; the longer side may be {filters.max_aspect:g} times the shorter")
    return None


def number(found: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(found, bool) or not isinstance(found, int | float | str):
        return None
    try:
        real = float(found)
    except (ValueError, OverflowError):
        return None
    return real if math.isfinite(real) else None


def _meta(record: dict[str, Any], fields: FieldsConfig) -> dict[str, Any]:
    if fields.meta is None:
        return record
    return {name: found for name in fields.meta if (found := value(record, name)) is not None}
