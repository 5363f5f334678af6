"""The session's test repository and the real Prefect stack that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.ray_head import free_port
from flows.services import Ports, Services
from tests.flows.repository import Stack, make_repository


def pytest_configure(config: pytest.Config) -> None:
    # Raised inside DVC, by the trie library that it builds its index with.
    config.addinivalue_line("filterwarnings", "ignore:_NoneStep.value will soon:DeprecationWarning")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test repository of the session; tests use names of their own for their runs."""
    return make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="session")
def stack(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Prefect server and serving process, as `flows.services` starts them; no MLflow server and no shared Ray."""
    state = tmp_path_factory.mktemp("services")
    services = Services(checkout, Ports(prefect=free_port(), mlflow=0, ray=0, dashboard=0), state=state)
    try:
        services.start_prefect()
        services.wait_prefect()
        services.start_serve({"PREFECT_API_URL": services.prefect_api})
        services.wait_serve()
        yield Stack(checkout, state, services.prefect_api)
    finally:
        services.down()
