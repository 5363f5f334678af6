"""Sharding killed for real, driver, worker and group: the next run does no finished unit again, and ends byte for byte the same."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.params import compose
from tests.moe_core.tiny_pipeline import tiny_pipeline
from tests.tasks.test_kills import AGENTS, ROOT, environment, hashes, marked, start, wait_for, wait_until_gone

TARS, PICTURES = 10, 250


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A copy of the project with a tiny teacher and a listing of ten tars, in which `shard` has not run."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("tasks", "moe_core"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "own").mkdir()
    for tar in range(TARS):
        with tarfile.open(folder / "own" / f"{tar:02d}.tar", "w") as archive:
            for number in range(PICTURES):
                rng = np.random.default_rng([tar, number])
                file = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (96, 96 + 64 * (number % 2), 3), dtype=np.uint8)).save(file, "PNG")
                for suffix, content in (("png", file.getvalue()), ("txt", f"noise {number}".encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    own = [
        "data=webdataset",
        f"data.path={folder / 'own'}",
        "data.buckets=[[16,16],[24,16]]",
        "data.shard.samples_per_shard=300",
        "data.shard.validation_samples=32",
        "data.shard.calibration_samples=32",
        "kd.validation_samples=16",
        "compute.cpus_per_worker=1",
    ]
    (folder / "params.yaml").write_text(compose(ROOT, own))
    tiny_pipeline().save_pretrained(folder / "data" / "teacher")
    dvc = [sys.executable, "-m", "dvc"]
    source = [sys.executable, "-m", "tasks.source"]
    for command in (["git", "init", "-q"], [*dvc, "init", "-q"], source):
        done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def finished(folder: Path) -> dict[str, int]:
    """The units that need no more work, and when they were finished."""
    found = folder.glob(".resume/shard-*/parts/*/unit.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


def encoders(folder: Path) -> list[int]:
    return [pid for pid, told in marked(folder) if "MapWorker" in told]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_shard_stage_goes_on_and_ends_byte_for_byte_the_same(ready: Path) -> None:
    assert start(ready, ["tasks.shard"]).wait(300) == 0, (ready / "stage.log").read_text()[-3000:]
    shards = ready / "data" / "shards"
    expected, report = hashes(shards), (ready / "reports" / "stages" / "shard.json").read_text()
    shutil.rmtree(shards)
    assert not finished(ready)

    process = start(ready, ["tasks.shard"])
    for units, whom in ((2, "driver"), (5, "group")):
        wait_for(ready, process, lambda units=units: len(finished(ready)) >= units, f"{units} units")
        process.kill() if whom == "driver" else os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until_gone(ready, 60, but=AGENTS)
        before = finished(ready)
        assert units <= len(before) < TARS
        assert not shards.exists()
        process = start(ready, ["tasks.shard"])
        wait_for(ready, process, lambda before=before: len(finished(ready)) > len(before), "another unit")
        assert before.items() <= finished(ready).items()
    os.kill(encoders(ready)[0], signal.SIGKILL)
    assert process.wait(300) == 0, (ready / "stage.log").read_text()[-3000:]
    assert hashes(shards) == expected
    assert (ready / "reports" / "stages" / "shard.json").read_text() == report
    assert not list((ready / ".resume").glob("shard-*/"))
