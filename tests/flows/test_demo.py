"""`make demo` on the test repository: a Prefect server of its own, the run, and its reports in the checkout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows import demo
from moe_core.errors import ConfigError
from tests.flows.repository import PATIENCE_S, PROJECT, dvc, leftovers, make_repository, run, until


def test_the_summary_is_a_table_of_the_models_numbers(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    for model, metrics in {"XS": {"accuracy": 0.9}, "L": {"accuracy": 0.98765, "flops": 123456}}.items():
        (tmp_path / "stages" / f"evaluate-{model}.json").write_text(json.dumps({"metrics": metrics}))
    assert demo.summary(tmp_path).splitlines() == [
        "model  accuracy  flops    ",
        "L      0.9877    1.235e+05",
        "XS     0.9       nan      ",
    ]


def test_no_uncommitted_change_is_lost_when_a_run_is_applied(tmp_path: Path) -> None:
    checkout = make_repository(tmp_path / "checkout")
    run("git", "update-ref", "refs/exps/00/0000/demo-x", "HEAD", cwd=checkout)
    (checkout / "notes.txt").write_text("untracked, and not the experiment's\n")
    assert demo.conflicts(checkout, "demo-x") == []
    # The experiment has the same stage.py as HEAD, and `dvc exp apply` resets it all the same.
    (checkout / "stage.py").write_text("# the user's\n")
    with pytest.raises(ConfigError, match=r"uncommitted changes of stage\.py would be overwritten; commit or stash"):
        demo.apply(checkout, "demo-x")
    assert (checkout / "stage.py").read_text() == "# the user's\n"
    # What a sealed experiment has is not lost: a second demo may follow the first.
    run("git", "commit", "-qam", "sealed", cwd=checkout)
    run("git", "update-ref", "refs/exps/00/0000/demo-y", "HEAD", cwd=checkout)
    run("git", "reset", "-q", "--soft", "HEAD~", cwd=checkout)
    assert demo.unsaved(checkout) == []
    assert demo.conflicts(checkout, "demo-x") == []


def commands(pid: int) -> set[str]:
    """Every word of the command lines of a process's descendants, of paths the last part."""
    words: set[str] = set()
    for process in psutil.Process(pid).children(recursive=True):
        try:
            words |= {Path(word).name for word in process.cmdline()}
        except psutil.NoSuchProcess:
            continue
    return words


@pytest.mark.slow
def test_a_demo_that_is_told_to_end_ends_all_that_it_started(tmp_path: Path) -> None:
    checkout = make_repository(tmp_path / "checkout")
    environment = {**os.environ, "DENSE2MOE_CHECKOUT": str(checkout), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "flows.demo"]
    with (tmp_path / "output").open("wb") as output:
        demo_run = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=output, stderr=output)
    expected = {"prefect", "flows.pipeline", "ray"}
    until(
        lambda: b"Running stage" in (tmp_path / "output").read_bytes() and expected <= commands(demo_run.pid),
        PATIENCE_S,
    )
    own = psutil.Process(demo_run.pid).children(recursive=True)
    demo_run.send_signal(signal.SIGINT)
    assert demo_run.wait(30) == 128 + signal.SIGINT
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in own), 5)
    assert not leftovers(checkout)


@pytest.mark.slow
def test_the_demo_ends_with_its_reports_in_the_checkout(tmp_path: Path) -> None:
    checkout = make_repository(tmp_path / "checkout")
    environment = {**os.environ, "DENSE2MOE_CHECKOUT": str(checkout)}
    command = [sys.executable, "-m", "flows.demo"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(checkout / "reports" / "index.html") in done.stdout
    assert "accuracy" in done.stdout
    assert (checkout / "reports" / "report.md").is_file()
    assert "up to date" in dvc("repro", cwd=checkout)
    assert not leftovers(checkout)
    assert "demo-" in run("git", "for-each-ref", "refs/exps", cwd=checkout)
