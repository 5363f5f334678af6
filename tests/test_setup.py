"""`make setup` on machines that lack something: one line that says what, and no half-made environment that looks whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "setup.sh"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with the script and a lock that cannot be installed."""
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPT, folder / "scripts")
    (folder / "requirements.lock").write_text("./no-such-package\n")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def told(folder: Path, **environment: str) -> str:
    """The line with which the script ends."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHON": sys.executable} | environment
    done = subprocess.run(["/bin/sh", "scripts/setup.sh"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert not (folder / ".venv" / ".locked").exists()
    return done.stderr.splitlines()[-1]


def test_no_git(checkout: Path) -> None:
    (checkout / "bin").mkdir()
    assert told(checkout, PATH=str(checkout / "bin")).startswith("setup: git is not installed; install it")


def test_no_checkout(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    assert "is not a git checkout; DVC and the worktree of a run need one" in told(
        checkout, GIT_CEILING_DIRECTORIES=str(checkout.parent)
    )


def test_wrong_python(checkout: Path) -> None:
    old = checkout / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 || exit 1\n')
    old.chmod(0o755)
    line = told(checkout, PYTHON=str(old))
    assert line.startswith("setup: needs Python 3.11 or 3.12 with venv, found: Python 3.9.2; install one")


def test_no_space(checkout: Path) -> None:
    assert "but the environment and a demo run need 999999999 MB" in told(checkout, DENSE2MOE_NEED_MB="999999999")


def test_an_installation_that_fails(checkout: Path) -> None:
    line = told(checkout, DENSE2MOE_NEED_MB="1")
    assert line == "setup: pip could not install requirements.lock; the whole output is in .venv/install.log"
    assert "no-such-package" in (checkout / ".venv" / "install.log").read_text()
