"""Stage `shared_expert_kd`: every FFN cut down to its shared expert, AdaLN compressed, and both distilled (Sec. 3.2, enhanced MoE initialization)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_core.config import Params, parse
from tasks.distillation import distil
from tasks.places import IMPORTANCE, SHARED_EXPERT, TEACHER
from tasks.stage import Stage, execute, workers

if TYPE_CHECKING:
    import torch

    from tasks.kd_trainee import KDTrainee


START = "conditioning.json"
"""In the resume folder: how near to the teacher's the modulations were before training (`adaln.Start`)."""


def shared_expert_kd(stage: Stage) -> None:
    """Writes data/checkpoints/shared_expert/."""
    distil(stage, "tasks.shared_expert_kd:build", stage.params.kd.shared_expert, SHARED_EXPERT, lambda _: _start(stage))


def _start(stage: Stage) -> dict[str, Any]:
    assert stage.resume is not None
    file = stage.resume.path / START
    # None where the conditioning is not compressed.
    return {"modulation_error_before_training": json.loads(file.read_text())} if file.exists() else {}


def build(device: torch.device, root: str, params: dict[str, Any], made: str) -> KDTrainee:
    """In a worker: the teacher, converted."""
    # Torch and diffusers load in the workers, not in the driver.
    from moe_core import noise, stream
    from tasks import kd_trainee, outs
    from tasks.importance_files import load

    config, place = parse(Params, params), Path(root)

    def student(out: Path) -> None:
        dense, found, moe = place / TEACHER / "transformer", load(place / IMPORTANCE, device), config.moe
        seed = noise.derive_seed(config.seed, "conversion")
        if moe.conditioning_dim is not None:
            errors = stream.start_errors(dense, found.conditioning, moe, seed)
            # Six digits: the last ones depend on the number of threads.
            outs.write_json(
                out.with_name(START), {name: float(f"{value:.6g}") for name, value in errors._asdict().items()}
            )
        stream.to_shared(dense, out, found.scores, moe, found.conditioning, seed, found.tokens)

    return kd_trainee.build(device, place, config, config.kd.shared_expert, "shared_expert_kd", student, Path(made))


if __name__ == "__main__":
    execute("shared_expert_kd", shared_expert_kd, resumable=True, joins=workers)
