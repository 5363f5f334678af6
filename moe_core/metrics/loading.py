"""What a scorer loads with transformers: whole, or an error.

- transformers leaves weights that a checkpoint lacks at random, with no more than a line in the log: the scorer's numbers would look like
  scores. `official_weights` has the same rule for official files.
- Weights that are tied to others, or that a model makes itself, transformers does not call missing.
- safetensors only: nothing is unpickled.
"""

from __future__ import annotations

import re
from typing import Any

from safetensors import SafetensorError

from moe_core.errors import DataError, Dense2MoEError

_NAMED = 5
"""Weights that an error lists."""


class Unloadable(Dense2MoEError):
    """A folder without the files, or a hub id that cannot be reached. `ScorerSpec.load`, which knows what was wanted, makes it MissingAsset."""

    def __init__(self, place: str, why: OSError) -> None:
        # Both are arguments, so that it can be pickled.
        super().__init__(place, why)
        self.place, self.why = place, why

    def __str__(self) -> str:
        return f"{self.place} cannot be loaded ({self.why})"


def load_model(kind: Any, place: str, name: str, *, unused: re.Pattern[str] | None = None, **options: Any) -> Any:
    """`kind.from_pretrained` of a folder or hub id; `name` is what an error calls the model, `options` go to transformers.

    Weights that `unused` matches may be missing: nothing that is called reads them. Raises Unloadable where the place does not give a model,
    DataError where it is no safetensors file, or lacks a weight or has it in another shape.
    """
    try:
        # A wrong shape is looked at here: transformers' own error does not say which.
        model, info = kind.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except OSError as error:
        raise Unloadable(place, error) from error
    except SafetensorError as error:
        raise DataError(f"{place}: {name}'s weights are in no safetensors file ({error}); they must be") from error
    missing = sorted(key for key in info["missing_keys"] if unused is None or not unused.fullmatch(key))
    if missing:
        raise DataError(
            f"{place} lacks {len(missing)} of {name}'s weights, as {', '.join(missing[:_NAMED])};"
            " it must have all that its config.json asks for, or they would be random"
        )
    for key, found, wanted in sorted(info["mismatched_keys"]):
        raise DataError(
            f"{place}: {name}'s {key} has shape {list(found)}; the model of its config.json has {list(wanted)}, and they must be equal"
        )
    return model


def load_part(kind: Any, place: str, **options: Any) -> Any:
    """`kind.from_pretrained` of a tokenizer or processor. Raises Unloadable where the place does not give one."""
    try:
        return kind.from_pretrained(place, **options)
    except OSError as error:
        raise Unloadable(place, error) from error
