"""The flow on a real Prefect server and a real DVC repository, triggered through the API as the UI does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.flows.repository import PATIENCE_S, Stack, dvc, leftovers, run, until

MADE = {"source", "teacher", "evaluate@L", "evaluate@M", "latency", "report"}


def test_a_run_is_sealed_applied_and_then_cached(stack: Stack) -> None:
    root = stack.checkout
    (root / "note.txt").write_text("not committed")
    before = run("git", "status", "--porcelain", cwd=root)
    first = stack.trigger(experiment="demo", overrides=["moe.top_k=3", "seed=1"], name="first")
    assert stack.wait(first)["type"] == "COMPLETED", stack.logs(first)
    assert stack.tasks(first) == dict.fromkeys(MADE | {"plan"}, "Completed")

    # The page: logs of the stages, one private Ray, progress, the table, the report, what the run did not see.
    logs = stack.logs(first)
    addresses = set(re.findall(r"ran with RAY_ADDRESS=(\S+)", logs))
    assert len(addresses) == 1, logs
    assert next(iter(addresses)).startswith("127.0.0.1:")
    shown = stack.artifacts(first)
    assert shown["evaluate-l-train"] == 100.0
    assert "note.txt" in shown["uncommitted-files"]
    assert "accuracy" in shown["results"]
    assert shown["report"].startswith("# Report")
    assert shown["plan"].startswith("# Plan of")

    # Nothing of it in the checkout, nothing alive, no worktree; then it can be had by its name.
    assert run("git", "status", "--porcelain", cwd=root) == before
    assert not leftovers(root)
    assert not (root / ".runs" / "first").exists()
    assert "first" in dvc("exp", "list", cwd=root)
    dvc("exp", "apply", "first", cwd=root)
    assert "up to date" in dvc("repro", cwd=root)
    assert (root / "reports" / "report.md").is_file()

    # Committed, the same run finds nothing to do, and starts no Ray for that.
    run("git", "add", "-A", cwd=root)
    run("git", "commit", "-q", "-m", "results", cwd=root)
    again = stack.trigger(experiment="demo", overrides=["moe.top_k=3", "seed=1"], name="again")
    assert stack.wait(again)["type"] == "COMPLETED", stack.logs(again)
    assert stack.tasks(again) == dict.fromkeys(MADE, "Cached")
    assert "RAY_ADDRESS" not in stack.logs(again)

    # Unless it is told to.
    told = stack.trigger(experiment="demo", overrides=["moe.top_k=3", "seed=1"], name="told", again=["latency"])
    assert stack.wait(told)["type"] == "COMPLETED", stack.logs(told)
    assert stack.tasks(told) == dict.fromkeys(MADE, "Cached") | {"latency": "Completed", "plan": "Completed"}


@pytest.mark.slow
def test_the_source_of_the_users_own_data_is_looked_at_every_time(stack: Stack) -> None:
    for name in ("own-data", "own-data-again"):
        looked = stack.trigger(overrides=["data=webdataset", "data.path=/somewhere"], name=name)
        assert stack.wait(looked)["type"] == "COMPLETED", stack.logs(looked)
        assert stack.tasks(looked)["source"] == "Completed"
    assert stack.tasks(looked)["report"] == "Cached"


@pytest.mark.slow
def test_two_runs_at_once(stack: Stack) -> None:
    root = stack.checkout
    before = run("git", "status", "--porcelain", cwd=root)
    pair = [stack.trigger(experiment="demo", overrides=[f"moe.top_k={k}"], name=f"pair-{k}") for k in (6, 7)]
    assert [stack.wait(flow_run)["type"] for flow_run in pair] == ["COMPLETED", "COMPLETED"], stack.logs(pair[0])
    assert run("git", "status", "--porcelain", cwd=root) == before
    for k in (6, 7):
        revision = run("git", "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/pair-{k}", cwd=root).split()[0]
        assert f"top_k: {k}" in run("git", "show", f"{revision}:params.yaml", cwd=root)
    assert not leftovers(root)


def test_bad_values_are_refused_by_the_form_or_in_the_first_seconds(stack: Stack) -> None:
    for parameters in ({"experiment": "nonesuch"}, {"overrides": ["moe.top_k"]}, {"name": "a b"}, {"again": ["a b"]}):
        answer = stack.submit(**parameters)
        assert answer.status_code in (409, 422), (parameters, answer.text)
    flow_run = stack.trigger(overrides=["moe.top_k=13"])
    state = stack.wait(flow_run)
    assert state["type"] == "FAILED"
    assert "top_k is 13, but there are 12 experts" in state["message"]
    assert not stack.tasks(flow_run), "a stage ran before the parameters were checked"
    flow_run = stack.trigger(again=["nonesuch"])
    assert "again has nonesuch; the stages are source, teacher" in stack.wait(flow_run)["message"]
    assert not stack.tasks(flow_run)


@pytest.mark.slow
def test_a_failing_stage_is_named_and_finished_work_is_kept(stack: Stack) -> None:
    broken = stack.trigger(overrides=["moe.top_k=8", "eval.latency_rounds=13"], name="broken")
    state = stack.wait(broken)
    assert state["type"] == "FAILED"
    assert "stage report failed" in state["message"]
    assert "report is broken on purpose" in state["message"]
    assert (stack.checkout / ".runs" / "broken").is_dir()
    assert not leftovers(stack.checkout)
    mended = stack.trigger(overrides=["moe.top_k=8"], name="broken")
    assert stack.wait(mended)["type"] == "COMPLETED", stack.logs(mended)
    tasks = stack.tasks(mended)
    assert [tasks.pop("plan"), tasks.pop("report")] == ["Completed", "Completed"]
    assert set(tasks.values()) == {"Cached"}


@pytest.mark.slow
def test_a_run_that_cannot_fit_its_gpus_ends_before_any_stage(stack: Stack) -> None:
    flow_run = stack.trigger(overrides=["compute.gpu_memory_gb=0.4", "moe.top_k=7"], name="too-large")
    state = stack.wait(flow_run)
    assert state["type"] == "FAILED"
    assert "`teacher` does not fit**: it needs 0.5 GB" in state["message"]
    assert set(stack.tasks(flow_run)) == {"plan"}
    assert "does not fit" in stack.artifacts(flow_run)["plan"]
    fits = stack.trigger(overrides=["compute.gpu_memory_gb=0.6", "moe.top_k=7"], name="large-enough")
    assert stack.wait(fits)["type"] == "COMPLETED", stack.logs(fits)


def two_stages_with_workers(stack: Stack, name: str) -> str:
    """A run in which both evaluations run, each with stubborn children and workers on the run's private Ray."""
    flow_run = stack.trigger(overrides=["seed=1000"], name=name)
    until(lambda: len(re.findall(r"^workers \d+ \d+$", stack.logs(flow_run), re.MULTILINE)) == 2, PATIENCE_S)
    return flow_run


def workers(stack: Stack, flow_run: str) -> list[int]:
    found = re.findall(r"^workers (\d+) (\d+)$", stack.logs(flow_run), re.MULTILINE)
    return [int(pid) for pair in found for pid in pair]


def gone(stack: Stack, pids: list[int]) -> bool:
    return not leftovers(stack.checkout) and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_cancel_ends_every_process_and_a_later_run_goes_on(stack: Stack) -> None:
    flow_run = two_stages_with_workers(stack, "cancelled")
    pids = workers(stack, flow_run)
    assert len(pids) == 4
    stack.cancel(flow_run)
    until(lambda: gone(stack, pids), PATIENCE_S)
    assert stack.wait(flow_run)["type"] == "CANCELLED"
    assert set(stack.tasks(flow_run).values()) <= {"Completed", "Cached", "Cancelled"}
    again = stack.trigger(overrides=["seed=1"], name="cancelled")
    assert stack.wait(again)["type"] == "COMPLETED", stack.logs(again)
    assert stack.tasks(again)["teacher"] == "Cached"


@pytest.mark.slow
def test_a_killed_flow_process_leaves_nothing_alive(stack: Stack) -> None:
    flow_run = two_stages_with_workers(stack, "crashed")
    pids = workers(stack, flow_run)
    stack.kill_flow_process(flow_run)
    until(lambda: gone(stack, pids), PATIENCE_S)
    assert stack.wait(flow_run)["type"] == "CRASHED"
