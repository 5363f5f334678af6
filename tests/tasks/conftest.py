"""What the tests of the stages share: small training jobs, a DVC repository with MLflow in a folder, one Ray for the session."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_core.config import ComputeConfig, OptimizerConfig
from tasks import cluster
from tasks.phase import Phase

DVC = [sys.executable, "-m", "dvc"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def phase() -> Callable[..., Phase]:
    """Makes a training phase of the trivial trainee."""

    def make(name: str = "train", steps: int = 20, every: int = 5, optimizer: str = "adamw", **arguments: Any) -> Phase:
        config = OptimizerConfig(steps=steps, batch_size=8, learning_rate=0.1, warmup_steps=2, optimizer=optimizer)
        return Phase(name, "tests.tasks.trivial:build", arguments, config, 10, 2, every)

    return make


@pytest.fixture
def compute() -> Callable[..., ComputeConfig]:
    """Makes a compute section: as many workers as told, a thread each."""

    def make(workers: int, **more: Any) -> ComputeConfig:
        return ComputeConfig(num_workers=workers, cpus_per_worker=1, checkpoint_every=5, log_every=2, **more)

    return make


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private Ray of two CPUs, started once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", "")
        with cluster.connect("tests", ComputeConfig(num_workers=2, cpus_per_worker=1, checkpoint_every=5, log_every=2)):
            yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git and DVC repository with the committed parameters and a dvc.yaml of small stages; the current folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DENSE2MOE_PARENT_RUN", raising=False)
    monkeypatch.delenv("DENSE2MOE_PROGRESS", raising=False)
    folder = tmp_path / "project"
    folder.mkdir()
    for command in (["git", "init", "-q"], [*DVC, "init", "-q"], [*DVC, "config", "core.analytics", "false"]):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["compute"].update(num_workers=0, cpus_per_worker=1, checkpoint_every=5, log_every=2)
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (folder / "data").mkdir()
    (folder / "data" / "set").mkdir()
    (folder / "data" / "set" / "a").write_text("a")
    (folder / "code.py").write_text("# code\n")
    stages = {
        "first": {"cmd": "true", "deps": ["code.py", "data/set"], "params": ["seed", "moe.top_k"]},
        "level": {
            "foreach": "${mob.levels}",
            "do": {"cmd": "true", "deps": ["code.py"], "params": ["mob.levels.${key}"]},
        },
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    monkeypatch.chdir(folder)
    return folder
