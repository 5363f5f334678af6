"""What a run shows on its page: progress bars, the result table, the report, pictures, and what it did not see.

- Everything is read from files that the stages leave.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows import results

MAX_PICTURE_BYTES = 300_000
"""A picture goes into Prefect's database whole; larger ones stay in the report and in MLflow."""

MAX_PICTURES = 8


class Progress:
    """A stage's progress bar, fed from the lines that the stage appends to its DENSE2MOE_PROGRESS file.

    A line is `{"stage", "step", "steps", "loss", "phase"}` in JSON, only `step` and `steps` are needed. Each phase
    gets a bar of its own.
    """

    def __init__(self, stage: str, file: Path) -> None:
        self.stage = stage
        self.file = file
        self._read = 0
        self._bars: dict[str, UUID] = {}

    def update(self) -> None:
        """Reads what is new and moves the bars."""
        if not self.file.is_file():
            return
        with self.file.open("rb") as lines:
            lines.seek(self._read)
            new = lines.read()
        # A line may be half written; its rest comes with the next look.
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        latest: dict[str, dict[str, Any]] = {}
        for line in whole.splitlines():
            event = json.loads(line)
            latest[str(event.get("phase") or self.stage)] = event
        for phase, event in latest.items():
            self._show(phase, event)

    def _show(self, phase: str, event: dict[str, Any]) -> None:
        percent = min(100.0, 100.0 * event["step"] / max(1, event["steps"]))
        loss = f", loss {event['loss']:.4g}" if isinstance(event.get("loss"), float) else ""
        text = f"{self.stage} {phase}: step {event['step']} of {event['steps']}{loss}"
        if phase in self._bars:
            update_progress_artifact(self._bars[phase], progress=percent, description=text)
        else:
            identifier = create_progress_artifact(percent, key=_key(f"{self.stage}-{phase}"), description=text)
            assert isinstance(identifier, UUID)  # an awaitable only where the caller is async
            self._bars[phase] = identifier


def show_uncommitted(changes: list[str]) -> None:
    """Lists the checkout's uncommitted files, which the run does not see."""
    listing = "\n".join(changes)
    create_markdown_artifact(
        f"This run sees the commit alone. Not in it:\n\n```\n{listing}\n```", key="uncommitted-files",
        description=f"{len(changes)} uncommitted files of the checkout",
    )  # fmt: skip


def show_results(reports: Path) -> None:
    """The result table, the report and its pictures, as far as the run made them."""
    if rows := results.models(reports):
        columns = results.columns(rows)
        table = [{column: _short(row.get(column, "")) for column in columns} for row in rows]
        create_table_artifact(
            table, key="results", description="Every model's metrics (reports/stages/evaluate-*.json)"
        )
    report = reports / "report.md"
    if report.is_file():
        create_markdown_artifact(report.read_text(), key="report", description="reports/report.md")
    for study in sorted(reports.glob("studies/*/study.md")):
        create_markdown_artifact(
            study.read_text(),
            key=_key(f"study-{study.parent.name}"),
            description=str(study.relative_to(reports.parent)),
        )
    pictures = [p for p in sorted(reports.rglob("*.png")) if p.stat().st_size <= MAX_PICTURE_BYTES]
    for picture in pictures[:MAX_PICTURES]:
        data = base64.b64encode(picture.read_bytes()).decode()
        key = _key(str(picture.relative_to(reports).with_suffix("")))
        create_image_artifact(
            f"data:image/png;base64,{data}", key=key, description=str(picture.relative_to(reports.parent))
        )


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _key(text: str) -> str:
    """Prefect's artifact keys are lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
