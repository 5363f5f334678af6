"""Stage `shared_expert_kd`: every FFN cut down to its shared expert, AdaLN compressed, and both distilled (Sec. 3.2, enhanced MoE initialization)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_core.config import Params, parse
from tasks.distillation import distil
from tasks.places import IMPORTANCE, SHARED_EXPERT, TEACHER
from tasks.stage import Stage, execute

if TYPE_CHECKING:
    import torch

    from tasks.kd_trainee import KDTrainee


def shared_expert_kd(stage: Stage) -> None:
    """Writes data/checkpoints/shared_expert/."""
    distil(stage, "tasks.shared_expert_kd:build", stage.params.kd.shared_expert, SHARED_EXPERT, lambda folder: {})


def build(device: torch.device, root: str, params: dict[str, Any], made: str) -> KDTrainee:
    """In a worker: the teacher, converted."""
    # Torch and diffusers load in the workers, not in the driver.
    from moe_core import noise, stream
    from tasks import kd_trainee
    from tasks.importance_files import load

    config, place = parse(Params, params), Path(root)

    def student(out: Path) -> None:
        found = load(place / IMPORTANCE)
        seed = noise.derive_seed(config.seed, "conversion")
        stream.to_shared(place / TEACHER / "transformer", out, found.scores, config.moe, found.conditioning, seed)

    return kd_trainee.build(device, place, config, config.kd.shared_expert, "shared_expert_kd", student, Path(made))


if __name__ == "__main__":
    execute("shared_expert_kd", shared_expert_kd, resumable=True)
