"""Stage `baseline@NAME`: a dense model of a sparse one's active size, made by another paper's rule and distilled like ours."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_core.config import BaselineConfig, Params, parse
from moe_core.errors import ConfigError
from tasks.distillation import distil
from tasks.places import BASELINES, IMPORTANCE
from tasks.stage import Stage, execute, workers

if TYPE_CHECKING:
    import torch

    from tasks.importance_files import Importance
    from tasks.kd_trainee import KDTrainee


def baseline(name: str, stage: Stage) -> None:
    """Writes data/checkpoints/baselines/<name>/."""
    if name not in stage.params.baselines:
        raise ConfigError(f"baseline is {name}; baselines has {', '.join(stage.params.baselines) or 'none'}")
    distil(stage, "tasks.baseline:build", stage.params.baselines[name].kd, BASELINES / name, _dropped, name=name)


def _dropped(folder: Path) -> dict[str, Any]:
    dropped = json.loads((folder / "config.json").read_text())["dropped_blocks"]
    return {} if dropped is None else {"dropped_blocks": dropped}


def build(device: torch.device, root: str, params: dict[str, Any], made: str, name: str) -> KDTrainee:
    """In a worker: the model it starts from, pruned."""
    # Torch and diffusers load in the workers, not in the driver.
    from moe_core import noise, stream
    from tasks import kd_trainee
    from tasks.importance_files import load

    config, place = parse(Params, params), Path(root)
    chosen = config.baselines[name]

    def student(out: Path) -> None:
        start, found = place / "data" / chosen.init, load(place / IMPORTANCE, device)
        # The teacher is a pipeline.
        first = start / "transformer" if (start / "transformer").is_dir() else start
        if chosen.method == "diff_pruning":
            seed = noise.derive_seed(config.seed, "conversion")
            stream.to_shared(first, out, found.scores, chosen.cut(config.moe), found.conditioning, seed, found.tokens)
        else:
            stream.to_depth(first, out, _drop(chosen, first, found))

    return kd_trainee.build(device, place, config, chosen.kd, f"baseline-{name}", student, Path(made))


def _drop(chosen: BaselineConfig, start: Path, found: Importance) -> dict[str, list[int]]:
    """Kind -> the numbers, in the model at `start`, of the blocks that go."""
    from moe_core import baselines, checkpoint, structure

    config = checkpoint.read_config(start)
    before = config.get("dropped_blocks") or {"double": [], "single": []}
    drop: dict[str, list[int]] = {}
    for kind, left in (("double", chosen.double_blocks), ("single", chosen.single_blocks)):
        count = int(config[structure.COUNTS[kind]])
        there = [n for n in range(count + len(before[kind])) if n not in before[kind]]
        if left is None:
            drop[kind] = []
        elif chosen.method == "lite":
            change = [found.block_error[f"{structure.KINDS[kind]}.{number}"] for number in there]
            drop[kind] = baselines.least_change(change, left)
        else:
            drop[kind] = baselines.evenly(count, left)
    return drop


if __name__ == "__main__":
    execute(f"baseline@{sys.argv[1]}", partial(baseline, sys.argv[1]), resumable=True, joins=workers)
