"""Ray joined beside a stage's imports: it stays up, its errors arrive, and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from moe_core.config import ComputeConfig
from moe_core.errors import ConfigError, DataError
from tasks.cluster import Early

ROOT = Path(__file__).resolve().parents[2]
MARK = "DENSE2MOE_TEST_MARK"
JOINED = """
import time, psutil, ray
from moe_core.config import ComputeConfig
from tasks.cluster import Early
with Early("first@L", ComputeConfig(num_workers=1, cpus_per_worker=1, checkpoint_every=1, log_every=1)) as early:
    early.joined()
    parts = [p for p in psutil.Process().children() if p.name() in ("gcs_server", "raylet")]
    # Long past the joining: what started Ray must not have ended in the meantime.
    time.sleep(3)
    print(sorted(p.name() for p in parts if p.is_running() and p.status() != psutil.STATUS_ZOMBIE))
    print(ray.get(ray.remote(lambda: 3).remote()), ray.get_runtime_context().namespace.startswith("dense2moe-first-L-"))
print(ray.is_initialized(), [p.name() for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE])
"""
STAGE = """
import os, signal, sys, time
from moe_core.errors import DataError
from tasks.stage import execute
def body(stage):
    if sys.argv[1] == "error":
        raise DataError("data/set is empty; it must have a sample")
    if sys.argv[1] == "term":
        # Not before Ray has put a handler of its own where the stage's was.
        stage.early_ray.joined()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    with stage.ray():
        import ray
        if sys.argv[1] == "term in ray":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        stage.summary({"three": ray.get(ray.remote(lambda: 3).remote())})
execute("first", body, joins=lambda params: True)
"""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::ResourceWarning")


def run(
    script: str, *arguments: str, cwd: Path, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What a script came to, and the processes that it left."""
    mark = uuid.uuid4().hex
    told = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    told |= {"PYTHONPATH": str(ROOT), MARK: mark} | environment
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=cwd, env=told, capture_output=True, text=True)
    return done, left(mark)


def left(mark: str) -> list[str]:
    """Living processes with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_a_private_ray_stays_up_after_the_joining_and_ends_with_the_stage(tmp_path: Path) -> None:
    done, others = run(JOINED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['gcs_server', 'raylet']", "3 True", "False []"]
    assert others == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("well", 0, ""),
        ("error", 2, "first: data/set is empty; it must have a sample"),
        ("term", 128 + signal.SIGTERM, ""),
        ("term in ray", 128 + signal.SIGTERM, ""),
    ],
)
def test_a_stage_leaves_no_process_however_early_it_ends(project: Path, how: str, code: int, said: str) -> None:
    done, others = run(STAGE, how, cwd=project)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert others == []


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """RAY_ADDRESS of no Ray."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    return address


def test_an_error_of_joining_is_raised_where_the_stage_waits(
    nobody: str, compute: Callable[..., ComputeConfig]
) -> None:
    waited = False
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS is {nobody}, but no Ray answers there"):
        with Early("first", compute(1)) as early:
            early.joined()
            waited = True
    assert not waited


def test_an_error_of_joining_is_raised_at_the_end_if_nobody_waited(
    nobody: str, compute: Callable[..., ComputeConfig]
) -> None:
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS is {nobody}"), Early("first", compute(1)):
        pass


def test_an_error_of_joining_hides_no_error_of_the_stage(nobody: str, compute: Callable[..., ComputeConfig]) -> None:
    with pytest.raises(DataError, match="is empty"), Early("first", compute(1)):
        raise DataError("data/set is empty")


def test_an_error_of_joining_is_a_stages_one_line(project: Path, nobody: str) -> None:
    done, _ = run(STAGE, "well", cwd=project, RAY_ADDRESS=nobody)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"first: RAY_ADDRESS is {nobody}, but no Ray answers there")
    assert "Traceback" not in done.stderr
