"""What Ray's processes are told by their environment. Without Ray: a flow starts its head with it."""

from __future__ import annotations

import os
from pathlib import Path

OWN_HEAD = "DENSE2MOE_RAY_HEAD"
"""Variable that tells a stage that the Ray it joins was started for its checkout: `serves` makes its value."""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray Train's polling, seconds: it bounds how late the end of a run is noticed.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Two helper processes of Ray Train that a stage has no use for; each takes seconds to start on two cores.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    # Its controller is in the stage's process (`tasks.ray_train`), and would write its log among the stage's lines.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
}
"""Environment of Ray, unless the user has set it otherwise."""


def search_path(code: Path) -> str:
    """PYTHONPATH with which a worker imports this checkout's code."""
    return os.pathsep.join(p for p in (str(code), os.environ.get("PYTHONPATH")) if p)


def own_head(code: Path) -> dict[str, str]:
    """Environment of a Ray that works for this checkout alone: what its processes inherit no stage has to ask for, so that a process
    that Ray started before the stage can be used."""
    return {
        **{name: os.environ.get(name, value) for name, value in SETTINGS.items()},
        "PYTHONPATH": search_path(code),
    }


def serves(address: str, code: Path) -> str:
    """Value of `OWN_HEAD` for a head that was started with `own_head(code)`."""
    return f"{address} {code}"
