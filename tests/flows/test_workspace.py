"""Worktrees: apart from the checkout, with its DVC cache, and sealed as an experiment that can be applied."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows import dag, demo
from flows.workspace import RunFailed, Workspace, checkout_root, workspaces
from moe_core.errors import ConfigError
from tests.flows.repository import dvc, make_repository, run, until


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose pipeline has run once, and is committed so."""
    folder = make_repository(tmp_path_factory.mktemp("workspace"))
    dvc("repro", "-q", cwd=folder)
    run("git", "add", "-A", cwd=folder)
    run("git", "commit", "-q", "-m", "results", cwd=folder)
    return folder


@contextmanager
def opened(repository: Path, name: str) -> Iterator[Workspace]:
    workspace = Workspace(repository, name)
    with workspace.claimed("a flow run"):
        workspace.create("HEAD")
        yield workspace
        workspace.remove()


def test_a_worktree_has_the_cached_outs_as_links(repository: Path) -> None:
    with opened(repository, "links") as workspace:
        out = workspace.path / "data" / "teacher" / "file.txt"
        assert out.read_text() == (repository / "data" / "teacher" / "file.txt").read_text()
        # Hard links to the checkout's cache (a file system with clones would show one link each): no copy of its own.
        assert out.stat().st_nlink > 1 or out.is_symlink()
        assert all(dag.unchanged(workspace.path, stage.name) for stage in dag.read(workspace.path))
        assert all(stage.unchanged for stage in dag.read(workspace.path))
    assert not workspace.path.exists()
    assert not workspace.state.exists()
    assert "links" not in run("git", "worktree", "list", cwd=repository)


def test_only_what_follows_from_unchanged_stages_alone_stands() -> None:
    stages = [
        dag.Stage("a", frozenset(), unchanged=True),
        dag.Stage("b", frozenset({"a"})),
        dag.Stage("c", frozenset({"b"}), unchanged=True),
        dag.Stage("d", frozenset({"a"}), unchanged=True),
    ]
    assert dag.standing(stages, force=()) == {"a", "d"}
    assert dag.standing(stages, force={"a"}) == set()


def test_the_dag_is_dvcs_and_every_stage_comes_after_what_it_needs(repository: Path) -> None:
    stages = dag.read(repository)
    assert {stage.name: set(stage.upstream) for stage in stages} == {
        "source": set(),
        "teacher": {"source"},
        "evaluate@L": {"teacher"},
        "evaluate@M": {"teacher"},
        "latency": {"teacher"},
        "report": {"evaluate@L", "evaluate@M"},
    }
    seen: set[str] = set()
    for stage in stages:
        assert stage.upstream <= seen
        seen.add(stage.name)


def test_a_sealed_run_can_be_applied_and_is_up_to_date(repository: Path) -> None:
    with opened(repository, "sealed") as workspace:
        set_top_k(workspace.path, 5)
        assert not dag.unchanged(workspace.path, "teacher")
        assert not next(stage for stage in dag.read(workspace.path) if stage.name == "teacher").unchanged
        assert not dag.restorable(workspace.path, "teacher")
        workspace.dvc("repro")
        (workspace.path / "reports" / "new.md").write_text("a report that HEAD does not have\n")
        workspace.seal()
    assert run("git", "status", "--porcelain", cwd=repository) == ""

    demo.apply(repository, "sealed")
    assert "top_k: 5" in (repository / "params.yaml").read_text()
    assert (repository / "reports" / "new.md").is_file()
    assert "up to date" in dvc("repro", cwd=repository)
    run("git", "reset", "-q", "--hard", cwd=repository)
    run("git", "clean", "-qfd", "reports", cwd=repository)
    dvc("checkout", "-q", "--force", cwd=repository)

    # What is taken back leaves its name free and the worktree as it was.
    with opened(repository, "taken-back") as workspace:
        set_top_k(workspace.path, 6)
        workspace.seal()
        workspace.unseal()
        assert "top_k: 6" in (workspace.path / "params.yaml").read_text()
    with opened(repository, "taken-back"):
        pass

    # What was made once is in the run cache, also for a new worktree of the old commit.
    with opened(repository, "again") as workspace:
        set_top_k(workspace.path, 5)
        assert dag.restorable(workspace.path, "teacher")


def set_top_k(root: Path, value: int) -> None:
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("top_k: 2", f"top_k: {value}"))


def test_apply_refuses_to_overwrite_what_is_not_committed(repository: Path) -> None:
    with opened(repository, "conflict") as workspace:
        set_top_k(workspace.path, 3)
        workspace.dvc("commit", "--force")
        workspace.seal()
    mine = repository / "params.yaml"
    before = mine.read_text()
    try:
        mine.write_text(before + "# mine\n")
        with pytest.raises(ConfigError, match=r"uncommitted changes of .*params\.yaml"):
            demo.apply(repository, "conflict")
        assert mine.read_text() == before + "# mine\n"
    finally:
        mine.write_text(before)


def test_names_are_taken_by_live_runs_and_by_experiments(repository: Path) -> None:
    with opened(repository, "taken") as first:
        with pytest.raises(ConfigError, match="in progress"), opened(repository, "taken"):
            pass
        assert first.in_progress()
        assert ("taken", "a flow run") in [(found.name, flow_run) for found, flow_run in workspaces(repository)]
        first.seal()
    with pytest.raises(ConfigError, match=r"dvc exp remove taken"), opened(repository, "taken"):
        pass


def test_a_failed_runs_worktree_stays_until_a_run_of_its_name_replaces_it(repository: Path) -> None:
    def fail() -> None:
        with opened(repository, "twice") as first:
            (first.path / "rubbish").write_text("left by a failure")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    kept = Workspace(repository, "twice")
    assert not kept.in_progress()
    assert (kept.path / "rubbish").is_file()
    with opened(repository, "twice") as second:
        assert not (second.path / "rubbish").exists()


def test_unknown_commits_and_bad_names_are_refused(repository: Path) -> None:
    with pytest.raises(ConfigError, match=r"name is '\.\./x'"):
        Workspace(repository, "../x")
    with pytest.raises(RunFailed, match=r"commit is 'nonesuch'.*no such commit"):
        Workspace(repository, "nocommit").create("nonesuch")


def test_the_main_checkout_is_found_from_a_worktree(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(repository, "inner") as workspace:
        monkeypatch.setenv("DENSE2MOE_CHECKOUT", str(workspace.path))
        assert checkout_root() == repository


@pytest.mark.slow
def test_an_experiment_on_the_command_line_composes_runs_and_is_compared(tmp_path: Path) -> None:
    checkout = make_repository(tmp_path / "checkout")
    dvc("repro", "-q", cwd=checkout)
    run("git", "add", "-A", cwd=checkout)
    run("git", "commit", "-q", "-m", "results", cwd=checkout)
    dvc("exp", "run", "-S", "moe.top_k=5", "-n", "five", cwd=checkout)
    assert "top_k: 5" in (checkout / "params.yaml").read_text()
    assert "evaluate-L.json" in (changes := dvc("metrics", "diff", cwd=checkout)), changes
    assert "moe.top_k" in dvc("params", "diff", "--targets", "params.yaml", cwd=checkout)
    refused = dvc("exp", "run", "-S", "moe.heads=3", cwd=checkout, check=False)
    assert "moe.heads" in refused


def test_who_must_be_alone_waits_and_is_waited_for(repository: Path) -> None:
    (repository / ".runs").mkdir(exist_ok=True)
    workspace, stopping = Workspace(repository, "place"), threading.Event()
    order: list[str] = []

    def go(name: str, alone: bool) -> threading.Thread:
        def stage() -> None:
            with workspace.place(alone, stopping):
                order.append(name)

        thread = threading.Thread(target=stage)
        thread.start()
        return thread

    with workspace.place(False, stopping):
        beside = go("beside", alone=False)
        beside.join(30)
        measures = go("alone", alone=True)
        until(lambda: gate_is_closed(repository), 30)
        late = go("late", alone=False)
        assert order == ["beside"]
    measures.join(30)
    late.join(30)
    assert order == ["beside", "alone", "late"]
    # A run that is ended does not wait.
    with workspace.place(True, stopping):
        waiting = go("ended", alone=False)
        stopping.set()
        waiting.join(30)
        assert not waiting.is_alive()


def gate_is_closed(repository: Path) -> bool:
    with (repository / ".runs" / "gate.lock").open("a") as gate:
        try:
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
