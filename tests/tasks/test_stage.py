"""A stage from outside: exit codes, messages, files, the MLflow run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks import tracking
from tasks.outs import folder

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, signal, sys, time
from moe_core.errors import DataError
from tasks.stage import execute
def body(stage):
    stage.progress.update("train", 3, 10, 0.5)
    if sys.argv[1] == "error":
        raise DataError("data/set is empty; it must have a sample")
    if sys.argv[1] == "term":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if sys.argv[1] == "term in ray":
        with stage.ray():
            import ray
            os.kill(os.getpid(), signal.SIGTERM)
            ray.get(ray.remote(time.sleep).remote(60))
    stage.summary({"loss": 0.5})
execute("first", body, resumable=True)
"""


@pytest.fixture
def run(project: Path):
    def go(how: str, **environment: str) -> subprocess.CompletedProcess[str]:
        told = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, how], cwd=project, env=told, capture_output=True, text=True
        )

    return go


def test_a_stage_ends_with_its_report_its_run_and_its_progress(project: Path, run) -> None:
    done = run("well", DENSE2MOE_PROGRESS=str(project / "progress"))
    assert done.returncode == 0, done.stderr
    report = json.loads((project / "reports" / "stages" / "first.json").read_text())
    assert report["metrics"] == {"loss": 0.5}
    assert report["fingerprint"]
    event = json.loads((project / "progress").read_text())
    assert event == {"stage": "first", "phase": "train", "step": 3, "steps": 10, "loss": 0.5}
    frame = tracking.metrics_frame(project)
    assert frame[["stage", "metric", "value"]].values.tolist() == [["first", "loss", 0.5]]
    tags = tracking.connect(project).get_run(frame["run_id"].iloc[0]).data.tags
    assert {"git.commit", "git.dirty", "version.torch", "version.ray", "seconds"} <= tags.keys()
    assert [p.name for p in (project / ".resume").iterdir() if p.is_dir()] == []


def test_a_stage_that_is_told_to_end_while_ray_works_closes_its_run(project: Path, run) -> None:
    done = run("term in ray")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    client = tracking.connect(project)
    [kept] = client.search_runs([tracking.experiment_id(client, project)])
    assert kept.info.status == "KILLED"


def test_an_error_of_ours_is_one_line_and_exit_code_2_and_a_kill_leaves_the_run_to_be_taken_up(
    project: Path, run
) -> None:
    done = run("error")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "first: data/set is empty; it must have a sample"
    assert "Traceback" not in done.stderr
    done = run("term")
    assert done.returncode == 128 + signal.SIGTERM
    client = tracking.connect(project)
    [kept] = client.search_runs([tracking.experiment_id(client, project)])
    assert kept.info.status == "KILLED"
    assert run("well").returncode == 0
    [kept] = client.search_runs([tracking.experiment_id(client, project)])
    assert (kept.info.status, kept.data.tags["resumed"]) == ("FINISHED", "2")


def test_bad_parameters_are_named_before_anything_is_written(project: Path, run) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["moe"]["top_k"] = 13
    params["moe"]["topk"] = 1
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    done = run("well")
    assert done.returncode == 2
    assert "params.yaml: unknown parameter moe.topk = 1; no such key is defined" in done.stderr
    assert not (project / "mlflow.db").exists()
    assert not (project / ".resume").exists()


def test_no_server_is_named_before_the_work(project: Path, run) -> None:
    done = run("well", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "no MLflow server answers there" in done.stderr
    assert not (project / "reports").exists()


def test_an_out_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError, match="in the middle"), folder(target) as partial:
        (partial / "half").touch()
        raise RuntimeError("in the middle")
    assert not target.exists()
    with folder(target) as partial:
        (partial / "whole").touch()
    assert [p.name for p in target.iterdir()] == ["whole"]
    with folder(target) as partial:
        (partial / "newer").touch()
    assert [p.name for p in target.iterdir()] == ["newer"]
