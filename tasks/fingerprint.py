"""The identity of a stage's result: code, data and parameters as DVC hashes them, and never where or when it ran."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage, Stage

from moe_core.errors import ConfigError, DataError


@dataclass(frozen=True)
class Identity:
    """What a stage's result follows from."""

    stage: str
    deps: dict[str, str]
    """path -> md5 of every dependency, code and data; a folder's ends in `.dir`, as in dvc.lock"""
    params: dict[str, Any]
    """dotted key -> value of every parameter that the stage lists"""

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits, the same for the same stage, deps and params."""
        text = json.dumps([self.stage, self.deps, self.params], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def data(self) -> dict[str, str]:
        """The dependencies that are data, not code: a module, or a package."""
        return {
            path: md5
            for path, md5 in self.deps.items()
            if not path.endswith(".py") and not path.startswith(("moe_core/", "tasks/"))
        }

    def difference(self, other: Identity) -> list[str]:
        """One line for each dependency or parameter in which two identities differ."""
        lines = []
        for what, ours, theirs in (("dependency", self.deps, other.deps), ("parameter", self.params, other.params)):
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    lines.append(f"{what} {key} is {ours.get(key)!r} here and {theirs.get(key)!r} there")
        return lines


def identify(root: Path, *stages: str) -> list[Identity]:
    """Hashes the dependencies of stages of `root`'s dvc.yaml, named as DVC addresses them (`mob_kd@M`).

    Raises ConfigError for an unknown stage, DataError for a dependency that does not exist.
    """
    try:
        with Repo(str(root), _wait_for_lock=True) as repo:
            # Under DVC's lock: another stage's `dvc repro`, which ends now, would be seen in the middle of writing dvc.lock.
            # All at once: reading dvc.yaml and dvc.lock takes a quarter of a second, as long as the rest of a stage or longer.
            with repo.lock:
                found = {stage.name: stage for stage in repo.stage.load_all(path=str(Path(repo.root_dir) / "dvc.yaml"))}
            return [_identity(found, name) for name in stages]
    except DvcException as error:
        raise ConfigError(f"dvc.yaml in {root}: {error}") from error


def _identity(found: Mapping[str, Stage], name: str) -> Identity:
    stage = found.get(name)
    if not isinstance(stage, PipelineStage):
        raise ConfigError(f"{name} is no stage of dvc.yaml; its stages are {', '.join(found)}")
    deps: dict[str, str] = {}
    params: dict[str, Any] = {}
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            params.update(dep.read_params())
        elif not dep.exists:
            raise DataError(
                f"{dep.def_path}, which stage {name} depends on, does not exist; `dvc repro {name}` makes it"
            )
        else:
            deps[dep.def_path] = str(dep.get_hash().value)
    return Identity(stage=name, deps=deps, params=params)
