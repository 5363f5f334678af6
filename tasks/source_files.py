"""What stage `source` leaves, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_core.errors import DataError
from tasks.places import SOURCE

LISTING = "listing.json"


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The GenEval records of `data/prompts.jsonl`; raises DataError where there are none."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not records:
        raise DataError(f"{path} is empty; it must have a prompt a line")
    return records


def tars_of(root: Path) -> list[Path]:
    """The tars that `data/source/listing.json` names, in order; raises DataError where one is gone."""
    folder = root / SOURCE
    listing = json.loads((folder / LISTING).read_text())["tars"]
    tars = [folder / tar["path"] for tar in listing]
    for tar in tars:
        if not tar.is_file():
            raise DataError(
                f"{tar}, which {folder / LISTING} names, does not exist; `dvc repro --force source` lists the data anew"
            )
    return tars
