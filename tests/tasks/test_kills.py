"""Kills, for real: the driver, a worker, a node, the whole group, in the middle of a checkpoint; the next run ends bit for bit the same.

What is trained is the real pipeline of few steps; it is run once without a kill, stage by stage, by DVC.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tasks import training
from tasks.params import compose
from tasks.phase import METRICS, PRODUCT, Phase
from tasks.tracking import metrics_frame

ROOT = Path(__file__).resolve().parents[2]
FEW = [
    "model.training.vae.steps=12",
    "model.training.vae.warmup_steps=2",
    "model.training.text.steps=12",
    "model.training.text.warmup_steps=2",
    "model.training.transformer.steps=12",
    "model.training.transformer.batch_size=16",
    "model.training.transformer.warmup_steps=2",
    "model.training.validate_every=6",
    "data.embedded.samples=400",
    "data.shard.samples_per_shard=100",
    "data.shard.validation_samples=32",
    "data.shard.calibration_samples=32",
    "kd.validation_samples=16",
    "eval.contrastive.steps=40",
    "eval.contrastive.scenes=300",
    "kd.importance_batch_size=8",
    "compute.checkpoint_every=3",
    "compute.log_every=1",
    "compute.cpus_per_worker=1",
    # In two steps, so that one KD stage starts from what another trained; the pipeline's test has the other recipe.
    "moe=1s12e2a",
    "mob=small",
]
for _stage in ("shared_expert", "moe", "mob"):
    FEW += [f"kd.{_stage}.optimizer.{value}" for value in ("steps=12", "batch_size=8", "warmup_steps=1")]
    FEW += [f"kd.{_stage}.validate_every=6"]

CHECKPOINT_SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from moe_core.config import OptimizerConfig
from tasks import outs, training
from tasks.phase import Phase
calls, flush = 0, outs.flush_tree
def kill_in_the_second(folder):
    global calls
    calls += 1
    if calls == 2:
        (folder / "state.safetensors").write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    flush(folder)
outs.flush_tree = kill_in_the_second
config = OptimizerConfig(steps=20, batch_size=8, learning_rate=0.1, warmup_steps=2)
phase = Phase("train", "tests.tasks.trivial:build", {}, config, 10, 2, 5)
training.run([phase], Path(sys.argv[1]), torch.device("cpu"), 1, 0)
"""


def test_killed_in_the_middle_of_writing_a_checkpoint(tmp_path: Path, phase: Callable[..., Phase]) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    cut.mkdir()
    whole.mkdir()
    done = subprocess.run([sys.executable, "-c", CHECKPOINT_SCRIPT, str(cut)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name.partition(".partial")[0] for p in sorted((cut / "train").glob("*step-*"))] == [
        ".step-00000010",
        "step-00000005",
    ]
    for folder in (cut, whole):
        training.run([phase()], folder, torch.device("cpu"), 1, 0)
    one, two = (load_file(folder / "train" / PRODUCT / "model.safetensors") for folder in (cut, whole))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the project in which every training stage has run to its end, never killed."""
    folder = tmp_path_factory.mktemp("kills") / "project"
    folder.mkdir()
    for name in ("tasks", "moe_core"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(compose(ROOT, FEW))
    dvc = [sys.executable, "-m", "dvc"]
    for command in (["git", "init", "-q"], [*dvc, "init", "-q"], [*dvc, "repro", "mob_kd@M"]):
        done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH")}
    bin_folder = str(Path(sys.executable).parent)
    return kept | {"PATH": f"{bin_folder}:{kept['PATH']}", "DENSE2MOE_TEST_MARK": str(folder)}


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def marked(folder: Path) -> list[tuple[int, str]]:
    """(pid, command) of every process that descends from a stage of this test, by the environment it inherited."""
    mark = f"DENSE2MOE_TEST_MARK={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:
                    found.append((int(entry.name), command))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile
    return found


def start(folder: Path, command: list[str], **more: str) -> subprocess.Popen[bytes]:
    with (folder / "stage.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment(folder) | more,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for(folder: Path, process: subprocess.Popen[bytes], done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 600
    while not done():
        told = (folder / "stage.log").read_text()[-3000:]
        assert process.poll() is None, f"the stage ended before {what}: {told}"
        assert time.monotonic() < deadline, f"no {what} in 600 s: {told}"
        time.sleep(0.02)


def step_of(folder: Path, stage: str, phase: str) -> int:
    for file in (folder / ".resume").glob(f"{stage}-*/{phase}/{METRICS}"):
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
        return max((json.loads(line)["step"] for line in lines), default=-1)
    return -1


AGENTS = "Agent"
"""The two agents of a Ray node, `ray::DashboardAgent` and `ray::RuntimeEnvAgent`, look for their parent only now and then."""


def wait_until_gone(folder: Path, seconds: float, but: str | None = None) -> None:
    """Waits until nothing is left of a killed stage but processes of that name: a private Ray must follow its driver."""
    started = time.monotonic()
    while left := [told for _, told in marked(folder) if but is None or but not in told]:
        assert time.monotonic() - started < seconds, f"still alive {seconds:g} s after the kill: {left}"
        time.sleep(0.2)


# Each stage: the driver, a worker and the whole group; at its first step and near its last; in each phase of the teacher.
STAGES = {
    "teacher": (
        ["tasks.teacher"],
        "data/teacher",
        [("vae", 4, "driver"), ("text", 5, "worker"), ("transformer", 7, "group")],
    ),
    "shared_expert_kd": (
        ["tasks.shared_expert_kd"],
        "data/checkpoints/shared_expert",
        [("train", 3, "worker"), ("train", 5, "group"), ("train", 11, "driver")],
    ),
    "moe_kd": (
        ["tasks.moe_kd"],
        "data/checkpoints/moe",
        [("train", 4, "worker"), ("train", 8, "group"), ("train", 10, "driver")],
    ),
    "mob_kd@M": (
        ["tasks.mob_kd", "M"],
        "data/checkpoints/mob/M",
        [("train", 1, "driver"), ("train", 6, "worker"), ("train", 8, "group")],
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_killed_again_and_again_ends_bit_for_bit_the_same(finished: Path, stage: str) -> None:
    _, out, _ = STAGES[stage]
    name = stage.replace("@", "-")
    curve = finished / "reports" / "curves" / f"{name}.csv"
    expected, expected_curve = hashes(finished / out), curve.read_text()
    # Later stages read it: whatever becomes of this test, it comes back.
    kept = finished / "kept"
    shutil.copytree(finished / out, kept)
    shutil.rmtree(finished / out)
    curve.unlink()
    try:
        _kill_and_resume(finished, stage, STAGES[stage][2])
        assert hashes(finished / out) == expected
        assert curve.read_text() == expected_curve
        assert not list((finished / ".resume").glob(f"{stage}-*/"))
        wait_until_gone(finished, 180)
    finally:
        shutil.rmtree(finished / out, ignore_errors=True)
        kept.rename(finished / out)
        curve.write_text(expected_curve)


def _kill_and_resume(finished: Path, stage: str, kills: list[tuple[str, int, str]]) -> None:
    command, out, _ = STAGES[stage]
    process = start(finished, command)
    for phase, step, whom in kills:

        def there(phase: str = phase, step: int = step) -> bool:
            # With its worker: a killed driver's one may have gone on for some steps, and they are still on record.
            return step_of(finished, stage, phase) >= step and bool(workers(finished))

        wait_for(finished, process, there, f"step {step} of {phase}")
        if whom == "worker":
            # Ray Train starts another: the stage itself goes on.
            worker = workers(finished)[0]
            os.kill(worker, signal.SIGKILL)
            wait_for(finished, process, lambda w=worker: workers(finished) not in ([], [w]), "another worker")
            continue
        if whom == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        wait_until_gone(finished, 30, but=AGENTS)
        assert not (finished / out).exists()
        process = start(finished, command)
    assert process.wait(600) == 0, (finished / "stage.log").read_text()[-3000:]


def workers(folder: Path) -> list[int]:
    return [pid for pid, told in marked(folder) if "RayTrainWorker" in told]


@pytest.fixture
def two_workers(finished: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The same project with two workers, for one test; what it makes of the shared experts goes with it. Its parameter is `compute.sharding`."""
    out = finished / STAGES["shared_expert_kd"][1]
    curve = finished / "reports" / "curves" / "shared_expert_kd.csv"
    params, kept, kept_curve = (finished / "params.yaml").read_text(), finished / "kept", curve.read_text()
    out.rename(kept)
    places = [f"compute.sharding={request.param}"]
    if request.param == "full":
        places.append("compute.text_encoders=sharded")
    workers = ["compute.num_workers=2", "compute.max_failures=3", *places]
    (finished / "params.yaml").write_text(compose(ROOT, [*FEW, *workers]))
    try:
        yield finished
    finally:
        (finished / "params.yaml").write_text(params)
        shutil.rmtree(out, ignore_errors=True)
        kept.rename(out)
        curve.write_text(kept_curve)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("two_workers", ["none"], indirect=True)
def test_two_workers_distil_as_one_does_and_go_on_after_a_kill_bit_for_bit(two_workers: Path) -> None:
    out, curve = (
        two_workers / STAGES["shared_expert_kd"][1],
        two_workers / "reports" / "curves" / "shared_expert_kd.csv",
    )
    by_one = pd.read_csv(curve)
    _kill_and_resume(two_workers, "shared_expert_kd", [])
    by_two, expected, expected_curve = pd.read_csv(curve), hashes(out), curve.read_text()
    assert (by_two["step"] == by_one["step"]).all()
    # Sums in another order, and a dozen steps of Muon on them.
    assert by_two["distill"].to_numpy() == pytest.approx(by_one["distill"].to_numpy(), rel=1e-2)
    shutil.rmtree(out)
    _kill_and_resume(two_workers, "shared_expert_kd", [("train", 5, "group")])
    assert hashes(out) == expected
    assert curve.read_text() == expected_curve


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
here = {"node_ip_address": "127.0.0.1"}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **here})
nodes = [cluster.add_node(num_cpus=1, **here) for _ in range(2)]
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    nodes.append(cluster.add_node(num_cpus=1, **here))
    print("replaced", flush=True)
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("two_workers", ["full"], indirect=True)
def test_sharded_workers_of_two_nodes_lose_a_worker_or_a_node_and_end_the_same(two_workers: Path) -> None:
    command, place, _ = STAGES["shared_expert_kd"]
    out, curve = two_workers / place, two_workers / "reports" / "curves" / "shared_expert_kd.csv"
    by_one = pd.read_csv(curve)
    _kill_and_resume(two_workers, "shared_expert_kd", [("train", 4, "worker")])
    by_two, expected, expected_curve = pd.read_csv(curve), hashes(out), curve.read_text()
    assert (by_two["step"] == by_one["step"]).all()
    assert by_two["distill"].to_numpy() == pytest.approx(by_one["distill"].to_numpy(), rel=1e-4)
    shutil.rmtree(out)

    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    nodes = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(two_workers) | quiet,
    )
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    try:
        process = start(two_workers, command, RAY_ADDRESS=nodes.stdout.readline().strip(), **quiet)
        wait_for(two_workers, process, lambda: step_of(two_workers, "shared_expert_kd", "train") >= 7, "step 7")
        nodes.stdin.write("lose one\n")
        nodes.stdin.flush()
        assert nodes.stdout.readline() == "replaced\n"
        assert process.wait(600) == 0, (two_workers / "stage.log").read_text()[-3000:]
    finally:
        nodes.stdin.close()
        nodes.wait(60)
        nodes.stdout.close()
    assert "train goes on from" in (two_workers / "stage.log").read_text()
    assert hashes(out) == expected
    assert curve.read_text() == expected_curve


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_importance_goes_on_with_the_units_that_are_left(finished: Path) -> None:
    expected = hashes(finished / "data" / "importance")
    shutil.rmtree(finished / "data" / "importance")
    process = start(finished, ["tasks.importance"])
    units = finished / ".resume"
    wait_for(finished, process, lambda: len(list(units.glob("importance-*/units/0*"))) >= 2, "two units")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_gone(finished, 30, but=AGENTS)
    [kept] = units.glob("importance-*/units/000000")
    before = (kept / "sums.safetensors").stat().st_mtime_ns
    process = start(finished, ["tasks.importance"])
    wait_for(finished, process, lambda: len(list(units.glob("importance-*/units/0*"))) >= 3, "a third unit")
    assert (kept / "sums.safetensors").stat().st_mtime_ns == before
    assert process.wait(300) == 0
    assert hashes(finished / "data" / "importance") == expected


STUDY = [
    *FEW,
    "studies=paper",
    "studies.paper.budgets.short=2",
    "~studies.paper.budgets.long",
    "studies.paper.seeds=[0]",
    "studies.paper.prompts=6",
    "studies.paper.batch_size=8",
    "model.num_inference_steps=2",
]
ARMS = ("shared", "moe", "pruned_2", "mob_m", "mob_s", "lite_m")


def study_params() -> str:
    """Six arms of the claims, two of which go on from others."""
    values = yaml.safe_load(compose(ROOT, STUDY))
    paper = values["studies"]["paper"]
    paper["arms"] = {name: paper["arms"][name] for name in ARMS}
    paper["claims"] = {n: c for n, c in paper["claims"].items() if {c["better"], c["than"]} <= set(ARMS)}
    return yaml.safe_dump(values, sort_keys=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_killed_in_its_middle_keeps_its_runs_and_comes_to_the_same(finished: Path) -> None:
    params = (finished / "params.yaml").read_text()
    (finished / "params.yaml").write_text(study_params())

    def stage(*command: str) -> None:
        assert start(finished, list(command)).wait(600) == 0, (finished / "stage.log").read_text()[-3000:]

    try:
        stage("dvc", "repro", "generate@teacher", "evaluator")
        runs, out = finished / ".resume" / "study_runs", finished / "data" / "studies" / "paper"
        process = start(finished, ["tasks.study_runs", "paper"])
        wait_for(finished, process, lambda: len(list(runs.glob("*/result.json"))) >= 2, "second run")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until_gone(finished, 30, but=AGENTS)
        assert not out.exists()
        kept = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
        stage("tasks.study_runs", "paper")
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        resumed = hashes(out)
        assert len(resumed) == len(ARMS)
        shutil.rmtree(runs)
        shutil.rmtree(out)
        stage("tasks.study_runs", "paper")
        assert hashes(out) == resumed
        # One MLflow run each, whatever was killed: of the resumed stage, and of the one that began anew.
        frame = metrics_frame(finished)
        children = frame[frame["stage"].str.startswith("study_runs-paper/") & (frame["metric"] == "kd_loss")]
        assert sorted(children.groupby("parent_run_id")["stage"].nunique()) == [len(ARMS), len(ARMS)]
        assert len(children) == 2 * len(ARMS)
        stage("tasks.study", "paper")
        assert "| claim | source | short |" in (finished / "reports" / "studies" / "paper" / "study.md").read_text()
    finally:
        (finished / "params.yaml").write_text(params)
