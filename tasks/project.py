"""Where things lie: the checkout that runs, the main checkout behind it, and what git says of both."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moe_core.config import Params, parse
from moe_core.config.given_teacher import check_given
from moe_core.errors import ConfigError


class GitState(NamedTuple):
    """The commit a run was made from; `dirty` lists uncommitted paths."""

    commit: str
    branch: str
    dirty: tuple[str, ...]


def code_root() -> Path:
    """The folder whose `tasks` and `moe_core` this process imported; workers must import the same."""
    return Path(__file__).resolve().parents[1]


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where `root` is no repository or has no commit yet."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def main_checkout(root: Path) -> Path:
    """The checkout that owns the repository: `root` itself, unless that is one of its worktrees."""
    common = _git(root, "rev-parse", "--path-format=absolute", "--git-common-dir")
    return Path(common).parent if common else root


def git_state(root: Path) -> GitState:
    """What is checked out in `root`; "unknown" where it is no git repository."""
    status = _git(root, "status", "--porcelain", "--untracked-files=no") or ""
    return GitState(
        commit=_git(root, "rev-parse", "HEAD") or "unknown",
        branch=_git(root, "rev-parse", "--abbrev-ref", "HEAD") or "unknown",
        dirty=tuple(line[2:].strip() for line in status.splitlines()),
    )


def read_params(root: Path) -> Params:
    """The `validated` `params.yaml` of `root`; raises ConfigError with a line a fault."""
    path = root / "params.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; a stage runs in the folder that holds it and dvc.yaml")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    return validated(values, "params.yaml")


def validated(values: Any, where: str) -> Params:
    """The parameters in plain `values`, checked, also against a teacher or LoRA that lies in a folder; `where` names their file in errors."""
    params = parse(Params, values, where=where)
    check_given(params)
    return params
