"""The benchmark for a GPU, small and on a CPU: every stage runs its steps, and takes what was planned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--double", "4", "--single", "1", "--heads", "1", "--image-tokens", "16", "--text-tokens", "8"]
SMALL += ["--dense-double-blocks", "1", "--conditioning-dim", "32"]
BLOCK_ORCHESTRATION = "import sys; sys.modules.update(dict.fromkeys(('ray', 'prefect', 'mlflow', 'dvc')))"


@pytest.mark.slow
def test_every_stage_runs_without_ray_and_takes_what_was_planned(tmp_path: Path) -> None:
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
