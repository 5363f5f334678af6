"""Progress bars: they follow what a stage writes, and can do it no harm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from flows import artifacts
from flows.pipeline import _show


def test_a_server_that_does_not_answer_costs_a_bar_and_never_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[float] = []

    def refused(*args: Any, **kwargs: Any) -> UUID:
        raise httpx.ConnectError("refused")

    def made(progress: float, **kwargs: Any) -> UUID:
        shown.append(progress)
        return uuid4()

    file = tmp_path / "progress"
    progress, log = artifacts.Progress("moe_kd", file), logging.getLogger("test")
    _show(progress, log)  # the stage has written nothing yet
    file.write_text('{"step": 1, "steps": 4}\n')
    monkeypatch.setattr(artifacts, "create_progress_artifact", refused)
    _show(progress, log)
    assert "progress of moe_kd is not shown: refused" in caplog.text
    monkeypatch.setattr(artifacts, "create_progress_artifact", made)
    with file.open("a") as lines:
        lines.write('{"step": 2, "steps": 4}\n{"step": 3, "ste')  # the last one is half written
    _show(progress, log)
    assert shown == [50.0]
