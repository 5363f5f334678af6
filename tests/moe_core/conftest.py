"""What all tests of `moe_core` share."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def backends_measured_for_tests_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`auto` remembers what it measures; not in the user's own table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "DENSE2MOE_CACHE", str(tmp_path_factory.mktemp("backends")))
        yield
