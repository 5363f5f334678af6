"""Stage `moe_kd`: level L, distilled with load balancing where its weight is not 0.

Routers and normal experts join the distilled shared experts; with `kd.joint` all of them come from the teacher at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_core.config import Params, parse
from tasks.distillation import distil
from tasks.places import IMPORTANCE, MOE, SHARED_EXPERT, TEACHER
from tasks.stage import Stage, execute, workers

if TYPE_CHECKING:
    import torch

    from tasks.kd_trainee import KDTrainee


def moe_kd(stage: Stage) -> None:
    """Writes data/checkpoints/moe/."""
    distil(stage, "tasks.moe_kd:build", stage.params.kd.moe, MOE, lambda folder: {})


def build(device: torch.device, root: str, params: dict[str, Any], made: str) -> KDTrainee:
    """In a worker: the shared-expert student with experts and routers added; with `kd.joint`, the teacher converted at once."""
    # Torch and diffusers load in the workers, not in the driver.
    from moe_core import noise, stream
    from tasks import kd_trainee
    from tasks.importance_files import load

    config, place = parse(Params, params), Path(root)

    def student(out: Path) -> None:
        found, teacher = load(place / IMPORTANCE, device), place / TEACHER / "transformer"
        # The same seed as in shared_expert_kd: a random split must be the same in both.
        seed = noise.derive_seed(config.seed, "conversion")
        if config.kd.joint:
            stream.to_moe_joint(teacher, out, found.scores, config.moe, found.conditioning, seed, found.tokens)
        else:
            stream.to_moe(place / SHARED_EXPERT, teacher, out, found.scores, config.moe, seed, found.tokens)

    return kd_trainee.build(device, place, config, config.kd.moe, "moe_kd", student, Path(made))


if __name__ == "__main__":
    execute("moe_kd", moe_kd, resumable=True, joins=workers)
