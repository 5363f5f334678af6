"""Ray for one stage: the cluster that RAY_ADDRESS names, else a private one that ends with the stage."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import ray

from moe_core.config import ComputeConfig
from moe_core.errors import ConfigError, Dense2MoEError
from tasks.project import code_root

OBJECT_STORE_BYTES = 1 << 30
"""Of a private Ray: image batches pass through it, nothing else; Ray's own default is 30 % of the machine."""

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


@contextlib.contextmanager
def connect(stage: str, compute: ComputeConfig) -> Iterator[None]:
    """Inside, Ray is up, and its workers import the code that this process runs.

    Raises ConfigError where a named cluster does not answer or is too small for `compute`.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    on_termination = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    namespace = f"dense2moe-{stage}-{os.getpid()}"
    path = os.pathsep.join(p for p in (str(code_root()), os.environ.get("PYTHONPATH")) if p)
    if address:
        _check_answers(address)
        environment = {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
        try:
            ray.init(
                address=address,
                namespace=namespace,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": environment | {"PYTHONPATH": path}},
            )
        except Exception as error:  # as below; a wrong token, another version and no cluster for `auto` differ in class
            raise ConfigError(f"RAY_ADDRESS is {address}, but that Ray cannot be joined: {error}") from error
    else:
        # A private Ray's processes inherit this environment: no runtime_env, so the workers that Ray starts at once can be used.
        os.environ["PYTHONPATH"] = path
        needed = max(compute.num_workers, 1) * compute.cpus_per_worker
        _start_private(max(os.cpu_count() or 1, needed), namespace)
    # Ray's handlers would abort this process at once; ours closes the stage's run and, here, Ray.
    signal.signal(signal.SIGTERM, on_termination)
    try:
        check_size(compute)
        yield
    finally:
        ray.shutdown()


def _start_private(cpus: int, namespace: str) -> None:
    try:
        ray.init(
            address="local",
            namespace=namespace,
            num_cpus=cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # Ray raises nothing narrower when its node does not come up in its fixed 30 s
        raise Dense2MoEError(
            f"Ray did not start: {error} If the machine is busy, run the stage again; logs: /tmp/ray/session_latest/logs"
        ) from error


def _check_answers(address: str) -> None:
    """Ray itself would try for half a minute; `auto` and `ray://` it must resolve on its own."""
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address}, but no Ray answers there ({error}); start one (`make up`) or unset the variable"
        ) from error


def check_size(compute: ComputeConfig) -> None:
    """Raises ConfigError where the cluster could never place the workers: Ray itself would wait for ever."""
    there = ray.cluster_resources()
    workers = max(compute.num_workers, 1)
    for resource, each in (("CPU", compute.cpus_per_worker), ("GPU", int(compute.use_gpu))):
        if workers * each > there.get(resource, 0):
            raise ConfigError(
                f"compute asks for {workers} workers with {each} {resource} each, but the Ray cluster has"
                f" {there.get(resource, 0):g} {resource} in all"
            )
