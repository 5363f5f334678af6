"""Prompts of one's own: a text file with a prompt a line, or a JSONL file.

- A file that is not as stated is an error that says where and why; nothing is skipped.
- One text may come twice, as it may in the published sets; an id may not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_core.errors import DataError
from moe_core.metrics.scorer import Prompt

_KEYS = ("prompt", "id", "kind")


def read_text(path: Path) -> list[Prompt]:
    """A prompt a line; the ids are the lines' numbers, "00001" the first. Raises DataError for an empty line or file."""
    return [Prompt(_numbered(number), _text(path, number, line)) for number, line in _lines(path)]


def read_jsonl(path: Path) -> list[Prompt]:
    """An object a line: `prompt`, and if wanted `id` (text or a whole number; else the line's number) and `kind`.

    Raises DataError for an empty file, a line that is no such object, an empty prompt, or an id that comes twice.
    """
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for number, line in _lines(path):
        prompt = _parsed(path, number, line)
        if prompt.id in lines:
            raise DataError(
                f"{path}, line {number}: id '{prompt.id}' is that of line {lines[prompt.id]} too; ids must be unique"
            )
        lines[prompt.id] = number
        prompts.append(prompt)
    return prompts


def read_utf8(path: Path) -> str:
    """A file's text. Raises DataError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); prompts must be") from error


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered from 1. By line feeds alone: `splitlines` would also part at characters that a prompt may hold."""
    lines = read_utf8(path).removesuffix("\n").split("\n")
    if lines == [""]:
        raise DataError(f"{path} is empty; it must hold a prompt a line")
    return list(enumerate(lines, 1))


def _parsed(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON ({error}); each line must be an object with 'prompt'") from error
    if not isinstance(record, dict) or "prompt" not in record:
        raise DataError(f"{where} is {line[:80]!r}; each line must be an object with 'prompt'")
    for key in record:
        if key not in _KEYS:
            raise DataError(f"{where}: key '{key}' is unknown; there are {', '.join(_KEYS)}")
    kind = record.get("kind", "")
    if not isinstance(kind, str):
        raise DataError(f"{where}: kind is {kind!r}; it must be text")
    return Prompt(_id(where, record.get("id", _numbered(number))), _text(path, number, record["prompt"]), kind)


def _id(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{where}: id is {value!r}; it must be text or a whole number")
    return str(value)


def _text(path: Path, number: int, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}, line {number}: the prompt is {value!r}; it must be text that is not empty")
    return value


def _numbered(number: int) -> str:
    return f"{number:05d}"
