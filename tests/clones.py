"""A clone of this repository, with all that is committed, and DVC in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from flows.workspace import python_environment

ROOT = Path(__file__).parents[1]


def clone(folder: Path) -> None:
    """Makes it."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)


def dvc(folder: Path, *arguments: str) -> str:
    """Output of a DVC command; a failure shows what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=python_environment(folder),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
