"""The models that are evaluated and timed, by the names of the report's rows."""

from __future__ import annotations

from pathlib import Path

from moe_core.config import Params
from moe_core.errors import ConfigError
from tasks.places import MOB, MOE, SHARED_EXPERT, TEACHER

DENSE = "teacher"


def transformers(params: Params) -> dict[str, Path]:
    """Name -> folder of its transformer, in the order of the report."""
    levels = {level: MOB / level for level in params.mob.levels}
    return {DENSE: TEACHER / "transformer", "shared": SHARED_EXPERT, "L": MOE, **levels}


def transformer(params: Params, name: str) -> Path:
    """The folder of one model's transformer; raises ConfigError for a name that is none."""
    folders = transformers(params)
    if name not in folders:
        raise ConfigError(f"model is {name}; it must be one of {', '.join(folders)}")
    return folders[name]
