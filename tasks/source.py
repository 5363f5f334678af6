"""Stage `source`: a listing of the image-text pairs, and the prompts that every model is evaluated on.

- Embedded presets: the scenes are drawn here, as a WebDataset folder, a form in which a user's own data comes.
- A user's data stays where it is: `listing.jsonl` names each unit of work with its size and time of change, and later stages depend on
  that, so that terabytes are not hashed. The flow forces this stage for such data, since DVC cannot see whether they changed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_core import noise
from moe_core.config import Params
from moe_core.data import embedded
from moe_core.data.sources import open_source
from moe_core.data.sources.reading import Kept, keep
from moe_core.data.sources.units import Unit
from moe_core.errors import DataError
from tasks import outs, suite_prompts
from tasks.places import PROMPTS, SOURCE
from tasks.source_files import LISTING, source_of, units_of
from tasks.stage import Stage, execute

TRIED = ((64, 64),)
"""Pixels to which the pictures of the first captions are cut: a prompt is taken only where the picture can be decoded."""


def source(stage: Stage) -> None:
    """Writes data/source/, data/prompts.jsonl and data/suites/."""
    data, root = stage.params.data, stage.root
    files: dict[str, int] = {}
    count = 0
    with outs.folder(root / SOURCE) as folder:
        if data.embedded is not None and data.kind == "embedded":
            embedded.write_source(folder, data.embedded, noise.derive_seed(stage.params.seed, "source"))
        with (folder / LISTING).open("w", encoding="utf-8") as listing:
            for unit in _units(stage.params, folder):
                # Parts of one file each have its size.
                files[unit.path] = unit.bytes if _whole(unit) else files.get(unit.path, 0) + unit.bytes
                listing.write(json.dumps(unit.as_dict(), sort_keys=True) + "\n")
                count += 1
                stage.progress.update("list", count, count)
    prompts = _prompts(stage.params, root)
    outs.write_text(root / PROMPTS, "".join(json.dumps(prompt, sort_keys=True) + "\n" for prompt in prompts))
    counts = suite_prompts.collect(root, stage.params)
    stage.summary(
        {"files": len(files), "units": count, "bytes": sum(files.values()), "prompts": len(prompts)}
        | {f"prompts_{name}": number for name, number in counts.items()}
    )


def _units(params: Params, folder: Path) -> Iterator[Unit]:
    """What the listing says: of tars that were made here neither place nor time, so that it is the same wherever it is made."""
    for unit in open_source(params.data, folder).units():
        yield replace(unit, path=Path(unit.path).name, changed=None) if params.data.kind == "embedded" else unit


def _whole(unit: Unit) -> bool:
    return unit.part is None or isinstance(unit.part[0], int)


def _prompts(params: Params, root: Path) -> list[dict[str, Any]]:
    """GenEval records: made for embedded data; else the first captions of the data, which ask for no known object."""
    count, data = params.eval.prompts, params.data
    if data.embedded is not None and data.kind == "embedded":
        return embedded.make_prompts(data.embedded, noise.derive_seed(params.seed, "prompts"), count)
    opened = source_of(root, data)
    samples = (
        entry.sample
        for unit in units_of(root)
        for entry in keep(opened, unit, TRIED, data.filters)
        if isinstance(entry, Kept)
    )
    found = [{"tag": "caption", "include": [], "prompt": sample.caption} for sample in itertools.islice(samples, count)]
    if not found:
        raise DataError(f"{data.path} holds no sample with an image and a caption that the filters let through")
    return found


if __name__ == "__main__":
    execute("source", source)
