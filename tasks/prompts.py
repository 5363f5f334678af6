"""The prompts that stage `source` leaves for evaluation, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_core.errors import DataError


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The GenEval records of `data/prompts.jsonl`; raises DataError where there are none."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not records:
        raise DataError(f"{path} is empty; it must have a prompt a line")
    return records
