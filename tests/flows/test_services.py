"""The stack of `make up`: starts, is found, says what is in its way, and ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from flows import services
from flows.ray_head import free_port
from moe_core.errors import ConfigError
from tests.flows.repository import PROJECT, make_repository


def command(checkout: Path, *arguments: str, **ports: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DENSE2MOE_CHECKOUT": str(checkout), **ports}
    return subprocess.run(
        [sys.executable, "-m", "flows.services", *arguments],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_port_in_use_is_one_line_that_names_port_holder_and_variable(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        checkout = tmp_path / "checkout"
        checkout.mkdir()
        subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
        # The others free: the developer's own stack may be up.
        free = {variable: str(free_port()) for variable, _ in services.PORTS.values()}
        refused = command(checkout, "up", **free | {"DENSE2MOE_MLFLOW_PORT": str(port)})
    assert refused.returncode == 2
    assert f"port {port} (mlflow) is in use by process {os.getpid()}" in refused.stderr
    assert "DENSE2MOE_MLFLOW_PORT" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (checkout / ".services" / "groups").exists(), "something was started before the ports were looked at"


@pytest.mark.parametrize("value", ["http", "80", "70000", ""])
def test_what_is_no_port_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DENSE2MOE_RAY_PORT", value)
    with pytest.raises(ConfigError, match=r"DENSE2MOE_RAY_PORT is '.*'; it must be a port"):
        services.chosen_ports()


def test_two_services_on_one_port_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSE2MOE_MLFLOW_PORT", "4200")
    monkeypatch.delenv("DENSE2MOE_PREFECT_PORT", raising=False)
    with pytest.raises(ConfigError, match="they must differ"):
        services.chosen_ports()


@pytest.mark.slow
def test_up_status_up_again_and_down(tmp_path: Path) -> None:
    checkout = make_repository(tmp_path / "checkout")
    ports = {variable: str(free_port()) for variable, _ in services.PORTS.values()}
    try:
        up = command(checkout, "up", **ports)
        assert up.returncode == 0, up.stderr
        for variable in ("DENSE2MOE_PREFECT_PORT", "DENSE2MOE_MLFLOW_PORT", "DENSE2MOE_RAY_DASHBOARD_PORT"):
            address = f"http://127.0.0.1:{ports[variable]}"
            assert address in up.stdout
            assert httpx.get(address, timeout=30, follow_redirects=True).status_code == 200
        assert command(checkout, "status").stdout == up.stdout
        told = command(checkout, "env").stdout
        assert "export RAY_ADDRESS=127.0.0.1:" in told
        assert "export MLFLOW_TRACKING_URI=http" in told
        # Once more, without its ports: finds the running one and starts nothing.
        assert command(checkout, "up").stdout == up.stdout
        stack = services.existing(checkout)
        assert stack is not None
    finally:
        down = command(checkout, "down")
    assert down.stdout.strip() == "ended: serve, ray, mlflow, prefect"
    assert command(checkout, "status").returncode == 3
    assert not list((checkout / ".services" / "groups").iterdir())
    assert command(checkout, "down").stdout.strip() == "ended: nothing was running"
