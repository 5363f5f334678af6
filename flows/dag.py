"""The DAG as `dvc.yaml` says it, and what a run asks DVC in process: must this stage run?

- DVC is asked in process because a `dvc` command takes a second to start; and for all stages at once where that will do,
  because reading dvc.yaml and dvc.lock takes DVC a quarter of a second. What runs a stage is always the command
  `dvc repro -s`, in a process group of its own.
- DVC's objects are not made for threads: what is asked here is asked one at a time, under DVC's own repository lock.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from dvc.stage import PipelineStage

_IN_PROCESS = threading.Lock()

RUNNING = "Running stage '"
"""How DVC announces that it starts a stage's command (`dvc/stage/run.py`); not said when the run cache has the outs."""


@dataclass(frozen=True)
class Stage:
    """A node: its address in DVC, the stages it reads from, and the free text and `meta:` of dvc.yaml."""

    name: str
    upstream: frozenset[str]
    title: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    unchanged: bool = False
    """`unchanged`, as it was when the DAG was read"""

    @property
    def exclusive(self) -> bool:
        """`meta: {exclusive: true}`: no stage of any run of the checkout may run beside it (it measures time)."""
        return bool(self.meta.get("exclusive", False))


def read(root: Path) -> list[Stage]:
    """The stages of the DVC repository at `root`, every one after those it reads from."""
    with _IN_PROCESS, Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        graph = repo.index.graph
        nodes = {
            # Not `addressing`: that is relative to where this process stands, which is not the worktree.
            stage.name: Stage(
                stage.name,
                # DVC's edges go from a consumer to what it consumes.
                frozenset(upstream.name for upstream in graph.successors(stage) if isinstance(upstream, PipelineStage)),
                stage.desc or "",
                dict(stage.meta or {}),
                not stage.changed(),
            )
            for stage in graph
            if isinstance(stage, PipelineStage)
        }
    ordered: list[Stage] = []
    placed: set[str] = set()
    while len(ordered) < len(nodes):
        # DVC refuses a cycle when it builds the graph, so every round places at least one stage.
        ready = [node for name, node in nodes.items() if name not in placed and node.upstream <= placed]
        ordered += ready
        placed |= {node.name for node in ready}
    return ordered


def standing(stages: Iterable[Stage], force: Collection[str]) -> set[str]:
    """Of stages in the DAG's order, those that stay unchanged: they are now, and so is all they follow from."""
    found: set[str] = set()
    for stage in stages:
        if stage.unchanged and stage.name not in force and stage.upstream <= found:
            found.add(stage.name)
    return found


def unchanged(root: Path, stage: str) -> bool:
    """Whether `dvc repro -s STAGE` would do nothing: command, deps, params and outs are as dvc.lock has them."""
    with _IN_PROCESS, Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        return not _load(repo, stage).changed()


def restorable(root: Path, stage: str) -> bool:
    """Whether DVC's run cache knows what the stage would make of the deps as they are now.

    A hint: `dvc repro` looks again, and runs the stage if the outs have been garbage-collected since.
    """
    with _IN_PROCESS, Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        target = _load(repo, stage)
        target.save_deps()
        # Private, but there is no other way to ask: `restore(dry=True)` looks at the deps in dvc.lock, not on disk.
        return repo.stage_cache._load(target) is not None


def _load(repo: Repo, stage: str) -> PipelineStage:
    return repo.stage.load_one(str(Path(repo.root_dir) / "dvc.yaml"), stage)
