"""Starts and ends what stays up between runs: Prefect, MLflow, Ray and the served deployment, all on loopback.

- `python -m flows.services up | down | status`; state and logs lie in `.services/` of the main checkout.
- A port is chosen by an environment variable (`PORTS`); one in use is said in a line, before anything is started.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows import processes
from flows.ray_head import LOOPBACK, RayHead, tail
from flows.workspace import CODE, checkout_root, python_environment, workspaces
from moe_core.errors import ConfigError, Dense2MoEError

START_S = 90.0
"""Longest wait for a service; Prefect needs 5 to 9 s, on a new database and a busy machine several times that."""

PORTS = {
    "prefect": ("DENSE2MOE_PREFECT_PORT", 4200),
    "mlflow": ("DENSE2MOE_MLFLOW_PORT", 5000),
    "ray": ("DENSE2MOE_RAY_PORT", 6379),
    "dashboard": ("DENSE2MOE_RAY_DASHBOARD_PORT", 8265),
}

DEPLOYMENT_URL = "/deployments/name/dense2moe/pipeline"


class ServiceFailed(Dense2MoEError):
    """A service does not start; its message has the end of its log."""


@dataclass(frozen=True)
class Ports:
    """Where the services listen."""

    prefect: int
    mlflow: int
    ray: int
    dashboard: int


class Services:
    """The stack of one checkout."""

    def __init__(self, checkout: Path, ports: Ports, state: Path | None = None) -> None:
        self.checkout = checkout
        self.state = state or checkout / ".services"
        self.ports = ports
        self.ray = RayHead(self.state)
        self.prefect_api = f"http://{LOOPBACK}:{ports.prefect}/api"
        self.mlflow_uri = f"http://{LOOPBACK}:{ports.mlflow}"
        self.started: list[str] = []

    def record(self, name: str) -> Path:
        """The process record of a service."""
        return self.state / "groups" / name

    def log(self, name: str) -> Path:
        """The log of a service."""
        return self.state / "logs" / f"{name}.log"

    def running(self, name: str) -> bool:
        """Whether the process of a service is alive."""
        return processes.leader(self.record(name)) is not None

    def environment(self) -> dict[str, str]:
        """Variables with which a process uses this stack."""
        return {
            "PREFECT_API_URL": self.prefect_api,
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            **self.ray.environment(),
        }

    def exports(self) -> str:
        """`environment` as lines for a shell."""
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in self.environment().items())

    def up(self) -> None:
        """Starts what is not running and waits until all answer; on a failure ends what it has started.

        Raises ConfigError for a port in use, ServiceFailed with the log of what does not start.
        """
        self._check_ports()
        try:
            for name, start in (
                ("prefect", self.start_prefect),
                ("mlflow", self.start_mlflow),
                ("ray", self._start_ray),
            ):
                if not self.running(name):
                    self.started.append(name)
                    start()
            self.wait_prefect()
            self.wait("mlflow", lambda: _answers(f"{self.mlflow_uri}/health"))
            self.wait("ray", lambda: self.ray.address is not None)
            if not self.running("serve"):
                self.started.append("serve")
                self.start_serve(self.environment())
            self.wait_serve()
        except BaseException:
            # Also on Ctrl-C: half a stack is of no use to anybody.
            processes.stop([self.record(name) for name in self.started])
            raise
        (self.state / "addresses.json").write_text(json.dumps(vars(self.ports)))

    def start_prefect(self) -> None:
        """Starts the Prefect server, with its database below the state folder."""
        environment = {
            "PREFECT_HOME": str(self.state / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # Elsewhere than on 4200 the UI would call port 4200 all the same.
            "PREFECT_SERVER_UI_API_URL": self.prefect_api,
        }
        command = ["prefect", "server", "start", "--host", LOOPBACK, "--port", str(self.ports.prefect)]
        self._start("prefect", command, environment)

    def start_mlflow(self) -> None:
        """Starts the MLflow server on the database that stages use without one."""
        command = [
            "mlflow", "server", "--host", LOOPBACK, "--port", str(self.ports.mlflow), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.checkout}/mlflow.db",
            "--default-artifact-root", (self.checkout / "mlruns").as_uri(),
        ]  # fmt: skip
        # Without job execution: two processes and 0.5 GB instead of nine and 1.3 GB (FACTS.md).
        self._start(
            "mlflow", command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        )

    def _start_ray(self) -> None:
        self.ray.start(port=self.ports.ray, dashboard_port=self.ports.dashboard)

    def start_serve(self, environment: dict[str, str]) -> None:
        """Starts the process that serves the flow, in `environment`."""
        environment = {
            **environment,
            "DENSE2MOE_CHECKOUT": str(self.checkout),
            "PREFECT_HOME": str(self.state / "prefect"),
            # A run begins, and a cancellation is seen, within this time; ten seconds are Prefect's default.
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        }
        self._start("serve", [sys.executable, "-m", "flows.serve"], environment)

    def _start(self, name: str, command: list[str], extra: dict[str, str]) -> None:
        # The code is this file's, wherever the checkout is that it works on.
        environment = {**python_environment(CODE), **extra}
        self.log(name).unlink(missing_ok=True)
        if not Path(command[0]).is_absolute():
            command = [str(Path(sys.executable).parent / command[0]), *command[1:]]
        processes.start(command, record=self.record(name), log=self.log(name), cwd=CODE, env=environment)

    def wait_prefect(self) -> None:
        """Returns when the Prefect server answers; raises ServiceFailed otherwise."""
        self.wait("prefect", lambda: _answers(f"{self.prefect_api}/health"))

    def wait_serve(self) -> None:
        """Returns when the deployment is published; raises ServiceFailed otherwise."""
        self.wait("serve", lambda: _answers(self.prefect_api + DEPLOYMENT_URL))

    def wait(self, name: str, answers: Callable[[], bool]) -> None:
        """Returns when a service answers; raises ServiceFailed if it ends, or takes longer than START_S."""
        deadline = time.monotonic() + START_S
        while not answers():
            over = processes.ended(self.record(name))
            if over or time.monotonic() > deadline:
                what = "ended while it started" if over else f"does not answer after {START_S:g} s"
                raise ServiceFailed(f"{name} {what}; its log is {self.log(name)}:\n{tail(self.log(name))}")
            time.sleep(0.2)

    def down(self) -> list[str]:
        """Ends every run and every service; returns the names of the services that were running."""
        alive = [name for name in ("serve", "ray", "mlflow", "prefect") if self.running(name)]
        # First who starts runs, then the runs, then what the runs use.
        processes.stop([self.record("serve")])
        for workspace, _ in workspaces(self.checkout):
            workspace.clear()
        processes.stop([self.record("mlflow"), self.record("prefect"), self.ray.record])
        self.ray.stop()
        (self.state / "addresses.json").unlink(missing_ok=True)
        return alive

    def _check_ports(self) -> None:
        for name, port in vars(self.ports).items():
            service = "ray" if name == "dashboard" else name
            if self.running(service):
                continue
            if (holder := _listener(port)) is not None:
                variable = PORTS[name][0]
                raise ConfigError(
                    f"port {port} ({name}) is in use by {holder}; choose another with {variable}, for example"
                    f" `{variable}={port + 1} make up`"
                )

    def describe(self) -> str:
        """The addresses, for people."""
        return "\n".join(
            [
                f"Prefect  http://{LOOPBACK}:{self.ports.prefect}",
                f"MLflow   {self.mlflow_uri}",
                f"Ray      http://{LOOPBACK}:{self.ports.dashboard}",
            ]
        )


def chosen_ports() -> Ports:
    """Ports from the environment, or the usual ones; raises ConfigError for what is no port."""
    chosen = {}
    for name, (variable, usual) in PORTS.items():
        value = os.environ.get(variable, str(usual))
        if not value.isdigit() or not 1024 <= int(value) <= 65535:
            raise ConfigError(f"{variable} is {value!r}; it must be a port from 1024 to 65535")
        chosen[name] = int(value)
    if len(set(chosen.values())) < len(chosen):
        raise ConfigError(f"the services' ports are {chosen}; they must differ")
    return Ports(**chosen)


def existing(checkout: Path) -> Services | None:
    """The stack that runs for `checkout`, on the ports with which it was started; None if none runs."""
    file = checkout / ".services" / "addresses.json"
    if not file.is_file():
        return None
    services = Services(checkout, Ports(**json.loads(file.read_text())))
    return services if all(services.running(name) for name in ("prefect", "mlflow", "ray")) else None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        # Not yet: the caller waits and says so when it has waited long enough.
        return False


def _listener(port: int) -> str | None:
    """Who listens on a loopback port, or None."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            if connection.pid is None:
                return "another user's process"
            try:
                process = psutil.Process(connection.pid)
                return f"process {process.pid} ({' '.join(process.cmdline())[:80]})"
            except psutil.NoSuchProcess:
                return f"process {connection.pid}"
    return None


def main() -> int:
    """The command line; an error is one line, without a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.services", description="Prefect, MLflow, Ray and the deployment."
    )
    parser.add_argument("action", choices=["up", "down", "status", "env"])
    action = parser.parse_args().action
    try:
        checkout = checkout_root()
        if action == "up":
            services = existing(checkout) or Services(checkout, chosen_ports())
            services.up()
            print(services.describe())
        elif action == "down":
            services = existing(checkout) or Services(checkout, chosen_ports())
            print(f"ended: {', '.join(services.down()) or 'nothing was running'}")
        else:
            found = existing(checkout)
            if found is None:
                # Not where a shell would evaluate it.
                print("down", file=sys.stderr)
                return 3
            print(found.describe() if action == "status" else found.exports())
    except Dense2MoEError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
