"""The loop in real Ray workers: one and two, killed and restarted; what they import; what they raise."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from moe_core.config import ComputeConfig
from moe_core.errors import ConfigError, TrainingError
from tasks import cluster, launch, ray_settings, run_training
from tasks.phase import METRICS, NOTES, PRODUCT, Phase

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::ResourceWarning")

Maker = Callable[..., Phase]
Compute = Callable[..., ComputeConfig]


def train(phases: list[Phase], folder: Path, compute: ComputeConfig) -> list[int]:
    seen: list[int] = []
    folder.mkdir()
    run_training.train(phases, folder, compute, 0, lambda job, rows: seen.extend(int(r["step"]) for r in rows))
    return seen


def product(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "train" / PRODUCT / "model.safetensors")


@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_is_restarted_and_ends_bit_for_bit_the_same(
    tmp_path: Path, phase: Maker, compute: Compute
) -> None:
    train([phase()], tmp_path / "whole", compute(0))
    mark = tmp_path / "killed"
    seen = train([phase(kill_at=100, mark=str(mark))], tmp_path / "cut", compute(1))
    assert mark.exists()
    expected, found = product(tmp_path / "whole"), product(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "train" / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 21))
    assert sorted(seen) == sorted(row["step"] for row in rows)
    assert not (tmp_path / "cut" / "ray").exists()


@pytest.mark.usefixtures("ray_session")
def test_two_workers_train_what_one_does(tmp_path: Path, phase: Maker, compute: Compute) -> None:
    train([phase()], tmp_path / "one", compute(0))
    train([phase()], tmp_path / "two", compute(2))
    one, two = product(tmp_path / "one"), product(tmp_path / "two")
    # Means of means: equal but for rounding.
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("ray_session")
def test_an_error_of_a_worker_arrives_as_itself(tmp_path: Path, phase: Maker, compute: Compute) -> None:
    with pytest.raises(TrainingError, match="train: the loss is nan at step 6"):
        train([phase(nan_at=40)], tmp_path / "nan", compute(1, max_failures=1))
    # Ray starts the group once more; it does not train its way to the same error.
    assert "goes on from" not in (tmp_path / "nan" / NOTES).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["shared head", "the worktree's own head"])
def test_workers_import_the_code_of_the_worktree_that_runs(tmp_path: Path, own: bool) -> None:
    """From a copy of the code elsewhere, private Ray and joined one: never what is installed or in the main checkout."""
    root = Path(__file__).resolve().parents[2]
    copy = tmp_path / "worktree"
    for package in ("moe_core", "tasks"):
        shutil.copytree(root / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    script = (
        "import sys, ray\n"
        "from moe_core.config import ComputeConfig\n"
        "from tasks import cluster\n"
        "with cluster.connect('where', ComputeConfig(num_workers=1, cpus_per_worker=1, checkpoint_every=1, log_every=1)):\n"
        "    @ray.remote\n"
        "    def where():\n"
        "        import moe_core, tasks\n"
        "        return moe_core.__file__, tasks.__file__\n"
        "    print('\\n'.join(ray.get(where.remote())))\n"
        "    print(ray.get_runtime_context().get_runtime_env_string(), file=sys.stderr)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    environment["RAY_AUTH_MODE"] = "disabled"
    address = f"127.0.0.1:{port}"
    told = {"RAY_ADDRESS": address}
    if own:
        # As a flow starts its head: then no stage asks for an environment of its own.
        told[ray_settings.OWN_HEAD] = ray_settings.serves(address, copy)
    ray = str(Path(sys.executable).with_name("ray"))
    head = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    head += ["--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    started = environment | (ray_settings.own_head(copy) if own else {})
    shared = subprocess.Popen(head, env=started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=root)
    try:
        for given in ({}, told):
            _until_open(port)
            done = subprocess.run(
                [sys.executable, "-c", script], cwd=copy, env=environment | given, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert all(line.startswith(str(copy)) for line in done.stdout.splitlines()), done.stdout
            assert ("PYTHONPATH" in done.stderr) == (bool(given) and not own)
    finally:
        shared.terminate()
        shared.wait(30)


def _until_open(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            probe.settimeout(0.1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")


def test_a_node_that_does_not_see_the_stages_folder_says_so_before_any_work(tmp_path: Path) -> None:
    arguments = {"entry": "tests.tasks.trivial:build", "arguments": {}, "folder": tmp_path}
    with pytest.raises(
        ConfigError, match=f"does not see {tmp_path}, where the stage's state is; .* that all nodes share"
    ):
        launch._work(arguments | {"seen": tmp_path / "the driver's mark"})
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, compute: Compute) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS is {address}, but no Ray answers there"):
        with cluster.connect("x", compute(1)):
            pass


def test_rays_client_is_refused(monkeypatch: pytest.MonkeyPatch, compute: Compute) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is ray://127\.0\.0\.1:10001, the address of Ray's client"):
        with cluster.connect("x", compute(1)):
            pass


@pytest.mark.usefixtures("ray_session")
def test_a_private_ray_listens_on_loopback_only() -> None:
    sockets = []
    for process in psutil.Process().children(recursive=True):
        try:
            name, connections = process.name(), process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue  # a worker of an earlier test, ending now
        # A training's workers meet in torch's own store, which listens everywhere.
        if not name.startswith("ray::RayTrain"):
            sockets += [(name, c.laddr.ip) for c in connections if c.status == psutil.CONN_LISTEN]
    assert {"gcs_server", "raylet"} <= {name for name, _ in sockets}
    assert not [(name, ip) for name, ip in sockets if not ip.endswith("127.0.0.1")]


@pytest.mark.usefixtures("ray_session")
def test_a_cluster_that_is_too_small_is_refused(compute: Compute) -> None:
    with pytest.raises(ConfigError, match="compute asks for 3 workers with 1 CPU each, but the Ray cluster has 2 CPU"):
        cluster.check_size(compute(3))
