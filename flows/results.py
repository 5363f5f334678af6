"""What a run came to, for people: the models' metrics, one row a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PREFIX = "evaluate-"


def models(reports: Path) -> list[dict[str, Any]]:
    """{model, its metrics} of every model that was evaluated (`stages/evaluate-*.json`), the largest first."""
    rows = []
    for file in sorted((reports / "stages").glob(f"{PREFIX}*.json")):
        metrics = json.loads(file.read_text())["metrics"]
        rows.append({"model": file.stem.removeprefix(PREFIX), **metrics})
    return sorted(rows, key=lambda row: -row.get("flops", 0))


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """Every metric that one of the rows has, in their order."""
    return list(dict.fromkeys(key for row in rows for key in row))
