"""Two models on the same prompts from the same noise: differences of their measures, with paired intervals.

Read from the rows that `evaluate` left, so that any two evaluations can be compared at any time without their pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from moe_core import noise
from moe_core.errors import DataError
from moe_core.metrics import aggregate, registry
from moe_core.metrics.aggregate import Estimated
from tasks import measures
from tasks.scoring import KEYS


def differences(
    suite: str, scorers: Sequence[str], ours: Path, theirs: Path, assets: Mapping[str, str], seed: int
) -> dict[str, Estimated]:
    """Measure -> ours less theirs, of what both folders have rows of, but of what is a comparison itself; `seed` is the run's.

    Raises DataError where a folder has no rows of the suite, or other prompts.
    """
    tables = [rows(folder, suite) for folder in (ours, theirs)]
    texts = [
        pd.read_parquet(folder / f"{suite}.prompts.parquet", columns=["id", "prompt"]) for folder in (ours, theirs)
    ]
    if not texts[0].equals(texts[1]):
        # Ids alone do not tell: in a text file they are the lines' numbers.
        raise DataError(
            f"{ours} and {theirs} are of other prompts in suite {suite}; a paired difference needs the same ones"
        )
    draws = noise.derive_seed(seed, aggregate.DRAWS)
    found: dict[str, Estimated] = {}
    for name in scorers:
        if registry.spec(name).needs_reference:
            # It compares with `theirs` already: of that model there is no value to take off.
            continue
        pair = [of_scorer(table, name) for table in tables]
        if any(table.empty for table in pair):
            continue
        for measure in measures.applicable(registry.spec(name), pair[0]):
            one, other = (measures.prompt_table(table, measure) for table in pair)
            found[measure.name] = aggregate.difference(one, other, measure, draws)
        for distance in registry.spec(name).set_measures:
            if list(pair[0]["id"]) != list(pair[1]["id"]):
                raise DataError(f"{ours} and {theirs} have rows of other prompts in suite {suite}")
            real = measures.reference_features(distance, assets)
            ours_of, theirs_of = (measures.features(table, distance.column) for table in pair)
            found[distance.name] = aggregate.set_difference(ours_of, theirs_of, list(pair[0]["id"]), real, distance)
    return found


def rows(folder: Path, suite: str) -> pd.DataFrame:
    """A row a picture, of all scorers; raises DataError where there are none."""
    file = folder / f"{suite}.pictures.parquet"
    if not file.is_file():
        raise DataError(f"{file} is missing; `evaluate` of {folder.name} makes it")
    return pd.read_parquet(file)


def of_scorer(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """One scorer's columns under their own names, of the pictures that it scored; empty if it scored none."""
    own = [column for column in table.columns if column.startswith(f"{name}.")]
    if not own:
        return pd.DataFrame()
    part = table[[*KEYS, *own]].rename(columns={column: column.removeprefix(f"{name}.") for column in own})
    scored = part.dropna(how="all", subset=[column.removeprefix(f"{name}.") for column in own])
    # Right and wrong, beside pictures that were not scored, are read as objects.
    return scored.infer_objects()
