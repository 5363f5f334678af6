"""Ray for one stage: the cluster that RAY_ADDRESS names, else a private one that ends with the stage.

Half of what a stage takes to its first step is Python's imports, once in the driver and once in a worker. So a stage asks for Ray
before it loads anything else (`Early`). Of a private Ray, and of a flow's own head, the processes that Ray starts for whoever joins stand
when the workers are asked for; on another cluster the job has an environment of its own, and they are started for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import ray

from moe_core.config import ComputeConfig
from moe_core.errors import ConfigError, Dense2MoEError
from tasks.project import code_root
from tasks.ray_settings import OWN_HEAD, SETTINGS, own_head, search_path, serves

PASSED_ON = ("RAY_TRAIN_", "NCCL_RAS_ADDR")
"""Variables that Ray Train would hand to its workers, by how they begin."""

OBJECT_STORE_BYTES = 1 << 30
"""Of a private Ray: image batches pass through it, nothing else; Ray's own default is 30 % of the machine."""


@contextlib.contextmanager
def connect(stage: str, compute: ComputeConfig) -> Iterator[None]:
    """Inside, Ray is up, and its workers import the code that this process runs.

    Raises ConfigError where a named cluster does not answer or is too small for `compute`.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    main = threading.current_thread() is threading.main_thread()
    on_termination, as_it_was = signal.getsignal(signal.SIGTERM), _disposition(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    namespace = f"dense2moe-{stage.replace('@', '-')}-{os.getpid()}"
    if address:
        _check_answers(address)
        environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        # A flow's own head has this checkout's environment already; what it started at once can be used as it is.
        own = os.environ.get(OWN_HEAD) == serves(address, code_root())
        given = {"env_vars": environment | {"PYTHONPATH": search_path(code_root())}}
        try:
            ray.init(
                address=address,
                namespace=namespace,
                log_to_driver=False,
                logging_level="error",
                runtime_env=None if own else given,
            )
        except Exception as error:  # as below; a wrong token, another version and no cluster for `auto` differ in class
            raise ConfigError(f"RAY_ADDRESS is {address}, but that Ray cannot be joined: {error}") from error
    else:
        # A private Ray's processes inherit this environment: no runtime_env, so the workers that Ray starts at once can be used.
        os.environ.update(own_head(code_root()))
        needed = max(compute.num_workers, 1) * compute.cpus_per_worker
        _start_private(max(os.cpu_count() or 1, needed), namespace)
    # Ray's handlers would abort this process at once; ours closes the stage's run and, here, Ray.
    if main:
        signal.signal(signal.SIGTERM, on_termination)
    else:
        _restore(signal.SIGTERM, as_it_was)
    try:
        check_size(compute)
        yield
    finally:
        ray.shutdown()


class Early:
    """Ray, joined in a thread from the moment this is entered; `joined` waits for it.

    The thread lives as long as Ray: the kernel ends the processes of a private one with the thread that started them.
    """

    def __init__(self, stage: str, compute: ComputeConfig) -> None:
        self._connection = connect(stage, compute)
        self._up, self._over = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._hold, name="ray")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def joined(self) -> None:
        """Returns when Ray is up; raises what `connect` raises."""
        self._up.wait()
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _hold(self) -> None:
        try:
            with self._connection:
                self._up.set()
                self._over.wait()
        except BaseException as error:  # noqa: BLE001 - raised where the stage waits for Ray
            self._error = error
            self._up.set()


def _disposition(number: int) -> ctypes.Array[ctypes.c_char]:
    """What this process does on a signal, as the C library has it: Python itself sets it from the main thread alone."""
    # Larger than `struct sigaction` is anywhere; nobody looks inside.
    kept = ctypes.create_string_buffer(512)
    ctypes.CDLL(None).sigaction(number, None, kept)
    return kept


def _restore(number: int, disposition: ctypes.Array[ctypes.c_char]) -> None:
    """From any thread."""
    ctypes.CDLL(None).sigaction(number, disposition, None)


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
    """Ray itself would try for half a minute; `auto` it must resolve on its own. Ray's client cannot run Ray Train's controller here."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS is {address}, the address of Ray's client; a stage must join the cluster itself, from one of its machines: host:port"
        )
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
