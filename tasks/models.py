"""The models that are timed, by the names of the report's rows."""

from __future__ import annotations

from pathlib import Path

from moe_core.config import Params
from tasks.places import DENSE, MOB, MOE, SHARED_EXPERT, TEACHER


def transformers(params: Params) -> dict[str, Path]:
    """Name -> folder of its transformer, in the order of the report."""
    levels = {level: MOB / level for level in params.mob.levels}
    return {DENSE: TEACHER / "transformer", "shared": SHARED_EXPERT, "L": MOE, **levels}
