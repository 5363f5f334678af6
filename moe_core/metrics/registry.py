"""Which scorers there are, by name. Importing this loads none of their models or libraries."""

from __future__ import annotations

from moe_core.errors import ConfigError
from moe_core.metrics import (
    clip_score,
    compbench,
    dpg,
    geneval_detector,
    image_reward,
    likeness,
    mps,
    scene_scorers,
)
from moe_core.metrics.scorer import ScorerSpec

SPECS: dict[str, ScorerSpec] = {
    spec.name: spec
    for spec in (
        clip_score.SPEC,
        image_reward.SPEC,
        mps.SPEC,
        geneval_detector.SPEC,
        dpg.SPEC,
        *compbench.SPECS,
        likeness.SPEC,
        *scene_scorers.SPECS,
    )
}


def spec(name: str) -> ScorerSpec:
    """Raises ConfigError for a scorer that there is not."""
    if name not in SPECS:
        raise ConfigError(f"scorer '{name}' is unknown; there are {', '.join(sorted(SPECS))}")
    return SPECS[name]
