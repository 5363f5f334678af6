"""MJHQ-30K's prompts (Li et al. 2024, Playground v2.5): 30,000 in ten categories, and a stated part of them.

- The prompts alone: the data set's pictures are for FID, which Dense2MoE does not tell.
- 30,000 pictures are many; `stratified` takes as many of each category, the same ones on every machine.

Source: playgroundai/MJHQ-30K, meta_data.json.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_core.errors import DataError
from moe_core.metrics.plain_prompts import read_utf8
from moe_core.metrics.scorer import Prompt

_FORM = '{"<id>": {"category": "...", "prompt": "..."}, ...}'


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of meta_data.json, in the file's order; their kind is the category, and further keys stay in the record.

    Raises DataError for a file of another form, a key that comes twice, or an empty id, category or prompt. A text may come twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise DataError(f"{path} has the key '{twice}' twice in one object; keys must be unique")
        return found

    try:
        entries = json.loads(read_utf8(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON ({error}); it must be {_FORM}") from error
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{path} is no object with prompts; it must be {_FORM}")
    return [_prompt(path, key, entry) for key, entry in entries.items()]


def stratified(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` of the prompts, of each kind equally many, in their own order.

    Within a kind the prompts are ranked by the SHA-256 of "<seed>/<id>"; the kinds take turns, in the order of the SHA-256 of
    "<seed>/kind/<kind>". So shares differ by one at most, a kind that has too few gives all it has and the others fill up, the order of the
    file does not matter, and a larger part holds every smaller one of the same seed. Raises DataError for a count below one or above the
    number of prompts, or an id that comes twice.
    """
    if not 1 <= count <= len(prompts):
        raise DataError(f"{count} prompts are asked for, but there are {len(prompts)}; it must be from 1 to that")
    places = {prompt.id: place for place, prompt in enumerate(prompts)}
    if len(places) != len(prompts):
        raise DataError(f"there are {len(prompts)} prompts but {len(places)} ids; ids must be unique")
    turns: list[tuple[int, str, str]] = []
    for kind in {prompt.kind for prompt in prompts}:
        own = sorted((_hash(f"{seed}/{prompt.id}"), prompt.id) for prompt in prompts if prompt.kind == kind)
        turns.extend((rank, _hash(f"{seed}/kind/{kind}"), key) for rank, (_, key) in enumerate(own))
    chosen = sorted(places[key] for _, _, key in sorted(turns)[:count])
    return [prompts[place] for place in chosen]


def _prompt(path: Path, key: str, entry: Any) -> Prompt:
    where = f"{path}: prompt '{key}'"
    if not key.strip():
        raise DataError(f"{path} has a prompt without an id; it must be {_FORM}")
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {entry!r}; it must be an object with 'category' and 'prompt'")
    for name in ("category", "prompt"):
        value = entry.get(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: {name} is {value!r}; it must be text that is not empty")
    rest = {name: value for name, value in entry.items() if name not in ("category", "prompt")}
    return Prompt(key, entry["prompt"], entry["category"], rest)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
