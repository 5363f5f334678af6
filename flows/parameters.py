"""What the run form asks for, and the composition of `params.yaml` from it.

- A form refuses what does not look like a parameter; only the run itself can tell what the parameters of *its* commit
  mean. So composing and checking is the run's first act, before any stage, and takes a second.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from flows.workspace import NAME, checkout_root, python_environment
from moe_core.errors import ConfigError

OVERRIDE = r"^\+{0,2}[A-Za-z_][\w/-]*(\.[\w-]+)*=.*$"
"""A Hydra override that sets one thing: `moe.top_k=4`, `kd=scenes`, `+mob.levels.M.single.groups=2`."""


def presets(root: Path) -> list[str]:
    """Names of the experiment presets of the checkout at `root`."""
    return sorted(file.stem for file in (root / "params" / "experiment").glob("*.yaml"))


PRESETS = presets(checkout_root())


def _is_preset(value: str) -> str:
    if value not in PRESETS:
        raise ValueError(f"experiment is {value!r}; it must be one of {', '.join(PRESETS)}")
    return value


# `enum` is written into the schema by hand: of a Literal with one value pydantic makes a `const`, for which Prefect's
# form falls back to a JSON field (FACTS.md), and the presets are only known when the checkout is looked at.
Experiment = Annotated[str, Field(json_schema_extra={"enum": list(PRESETS)}), AfterValidator(_is_preset)]
Override = Annotated[str, Field(pattern=OVERRIDE)]
RunName = Annotated[str, Field(pattern=f"^$|{NAME}", max_length=80)]
StageName = Annotated[str, Field(pattern=r"^\w+(@\w+)?$")]
Commit = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w./~^@{}-]*$", max_length=200)]


def compose(root: Path, experiment: str, overrides: list[str]) -> None:
    """Writes `params.yaml` of the worktree at `root` from its `params/`, the preset and the overrides.

    Raises ConfigError that names the override or the parameter, its value and the rule.
    """
    chosen = [f"experiment={experiment}", *overrides]
    # By the commit's own code, not the checkout's: the commit may be an older one.
    command = [sys.executable, "-m", "tasks.params", *chosen]
    done = subprocess.run(command, cwd=root, env=python_environment(root), capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"parameters {', '.join(chosen)} are refused:\n{done.stderr.strip()}")
