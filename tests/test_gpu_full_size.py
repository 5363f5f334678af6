"""The benchmark for a GPU, small and on a CPU: every stage runs its steps, and takes what was planned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_full_size
from moe_core import references, structure
from moe_core.config import KDStageConfig, MoBConfig, MoEConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--double", "4", "--single", "1", "--heads", "1", "--image-tokens", "16", "--text-tokens", "8"]
SMALL += ["--dense-double-blocks", "1", "--conditioning-dim", "32"]
BLOCK_ORCHESTRATION = (
    "import sys; sys.modules.update(dict.fromkeys(('ray', 'prefect', 'mlflow', 'dvc', 'pydantic', 'pandas')))"
)


def test_its_models_are_the_presets() -> None:
    groups = [[first, first + 1, first + 2] for first in range(4, 19, 3)]
    moe = MoEConfig(
        shared_ratio=1.0,
        normal_ratio=0.25,
        num_experts=12,
        top_k=2,
        dense_double_blocks=(0, 1, 2),
        conditioning_dim=256,
    )
    mob = MoBConfig.model_validate({"levels": {"M": {"init": "checkpoints/moe", "double": {"blocks": groups}}}})
    large = structure.moe_config(references.FLUX1_DEV, moe)
    expected = {
        "shared_expert_kd": structure.shared_config(references.FLUX1_DEV, moe),
        "moe_kd": large,
        "mob_kd@M": structure.mob_config(large, mob.levels["M"], mob),
    }
    found = gpu_full_size.stages(dict(references.FLUX1_DEV), kept=3, conditioning_dim=256)
    for name, (config, stage) in found.items():
        assert structure.dense_part(config) == structure.dense_part(expected[name])
        for key in ("moe", "conditioning_dim", "mob"):
            assert config.get(key) == expected[name].get(key), (name, key)
        asked = {**vars(stage), "optimizer": {"steps": 5, "batch_size": 1, "learning_rate": 1e-5}, "validate_every": 5}
        assert KDStageConfig.model_validate(asked).optimizer.grad_clip == stage.optimizer.grad_clip
    assert found.keys() == expected.keys()


@pytest.mark.slow
def test_every_stage_runs_with_few_packages_and_takes_what_was_planned(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    program = f"{BLOCK_ORCHESTRATION}; from benchmarks.gpu_full_size import main; raise SystemExit(main())"
    arguments = ["--device", "cpu", *SMALL, "--to", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    stages = json.loads(out.read_text())["stages"]
    assert list(stages) == ["importance", "shared_expert_kd", "moe_kd", "mob_kd@M"]
    for stage, figures in stages.items():
        assert abs(figures["planned_over_measured"] - 1) < 0.05, (stage, figures)
