"""A Ray head on loopback: the private one of a flow run, or the shared one of `make up`.

- Every port is the kernel's choice unless given, and the session folder is short (a socket path may have 107
  characters), so that heads beside each other do not meet.
- Who joins needs the head's token. It lies in a file of its own; `environment` has all that a stage needs to join.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flows import processes
from flows.workspace import RunFailed
from tasks.ray_settings import OWN_HEAD, own_head, serves

START_S = 60.0
"""Longest wait for a head; 3 to 5 s are usual, a loaded machine takes longer."""

LOOPBACK = "127.0.0.1"


class RayHead:
    """One head; its record, log and token are in `state`, by `name`."""

    def __init__(self, state: Path, name: str = "ray", code: Path | None = None) -> None:
        # The one checkout that it works for, if it does: its workers can then start before a stage asks for them.
        self._code = code
        self.record = state / "groups" / name
        self.log = state / "logs" / f"{name}.log"
        self.token = state / f"{name}.token"
        # Where the session folder is, for whoever has to remove it after a kill -9.
        self.folder = state / "temporary" / name

    def start(self, *, port: int = 0, dashboard_port: int | None = None, cpus: int = 1) -> subprocess.Popen[bytes]:
        """Starts the head and returns at once; `wait` says when it serves. No `dashboard_port`: no dashboard.

        It offers all CPUs of the machine, or `cpus`, if that is more: threads then share them, and a stage still runs.
        """
        self.token.parent.mkdir(parents=True, exist_ok=True)
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.write_text(tempfile.mkdtemp(prefix="d2m-", dir="/tmp"))
        dashboard = [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard_port}"] if dashboard_port else []
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
            f"--node-ip-address={LOOPBACK}", f"--port={port}", f"--ray-client-server-port={free_port()}",
            "--node-manager-port=0", "--object-manager-port=0", "--min-worker-port=0", "--max-worker-port=0",
            "--dashboard-agent-listen-port=0", f"--include-dashboard={bool(dashboard_port)}", *dashboard,
            f"--temp-dir={self.folder.read_text()}", f"--num-cpus={max(os.cpu_count() or 1, cpus)}",
        ]  # fmt: skip
        env = processes.inherit({**_mode(self.token), **(own_head(self._code) if self._code else {})})
        return processes.start(command, record=self.record, log=self.log, env=env)

    @property
    def address(self) -> str | None:
        """Its address once it serves, else None. Ray writes this file when the head is up."""
        if not self.folder.is_file():
            return None
        file = Path(self.folder.read_text()) / "ray_current_cluster"
        return file.read_text().strip() or None if file.is_file() else None

    def environment(self) -> dict[str, str]:
        """Variables with which a process joins this head."""
        address = self.address or ""
        own = {OWN_HEAD: serves(address, self._code)} if self._code else {}
        return {"RAY_ADDRESS": address, **_mode(self.token), **own}

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Returns when the head serves; raises RunFailed if it ends, or takes longer than START_S."""
        deadline = time.monotonic() + START_S
        while self.address is None:
            if process.poll() is not None:
                raise RunFailed(
                    f"Ray did not start (exit code {process.returncode}); its log is {self.log}:\n{tail(self.log)}"
                )
            if time.monotonic() > deadline:
                raise RunFailed(f"Ray did not start in {START_S:g} s; its log is {self.log}:\n{tail(self.log)}")
            time.sleep(processes.POLL_S)

    def stop(self) -> None:
        """Ends the head with all its workers and removes its session folder."""
        processes.stop([self.record])
        if self.folder.is_file():
            shutil.rmtree(self.folder.read_text(), ignore_errors=True)
            self.folder.unlink()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.is_file() else "(no log)"


def _mode(token: Path) -> dict[str, str]:
    # The last one keeps Ray on 127.0.0.1; without it Ray puts the host's outer address in place of a loopback one.
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
