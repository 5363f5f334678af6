"""Stage `mob_kd@LEVEL`: blocks are grouped into Mixtures of Blocks, which are distilled against the dense teacher (levels M, S, XS)."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_core.config import Params, parse
from moe_core.errors import ConfigError
from tasks.distillation import distil
from tasks.places import IMPORTANCE, MOB
from tasks.stage import Stage, execute, workers

if TYPE_CHECKING:
    import torch

    from tasks.kd_trainee import KDTrainee


def mob_kd(level: str, stage: Stage) -> None:
    """Writes data/checkpoints/mob/<level>/."""
    if level not in stage.params.mob.levels:
        raise ConfigError(f"level is {level}; mob.levels has {', '.join(stage.params.mob.levels)}")
    distil(stage, "tasks.mob_kd:build", stage.params.kd.mob, MOB / level, _groups, level=level)


def _groups(folder: Path) -> dict[str, Any]:
    mob = json.loads((folder / "config.json").read_text())["mob"]
    return {"groups": {"double": mob["double_groups"], "single": mob["single_groups"]}}


def build(device: torch.device, root: str, params: dict[str, Any], made: str, level: str) -> KDTrainee:
    """In a worker: the level's starting model with its groups and their routers."""
    # Torch and diffusers load in the workers, not in the driver.
    from moe_core import noise, stream
    from tasks import kd_trainee
    from tasks.importance_files import load

    config, place = parse(Params, params), Path(root)
    chosen = config.mob.levels[level]

    def student(out: Path) -> None:
        start = place / "data" / chosen.init
        # A dense start is a pipeline: the teacher.
        first = start / "transformer" if (start / "transformer").is_dir() else start
        seed = noise.derive_seed(config.seed, "conversion")
        stream.to_mob(first, out, chosen, config.mob, load(place / IMPORTANCE).block_change, seed)

    return kd_trainee.build(device, place, config, config.kd.mob, f"mob_kd-{level}", student, Path(made))


if __name__ == "__main__":
    execute(f"mob_kd@{sys.argv[1]}", partial(mob_kd, sys.argv[1]), resumable=True, joins=workers)
