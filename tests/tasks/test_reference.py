"""The model that others are compared with, where every scorer compares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moe_core.config import ComputeConfig, Params, SuiteConfig, parse
from moe_core.errors import EvaluationError
from moe_core.metrics.scorer import Prompt
from tasks import measures, scoring
from tasks.measures import SuiteResult
from tasks.params import compose
from tasks.progress import Progress
from tasks.suites import Suite

ROOT = Path(__file__).resolve().parents[2]


def measured(folder: Path, compute: ComputeConfig, *scorers: str, is_reference: bool) -> list[SuiteResult]:
    params = parse(Params, yaml.safe_load(compose(ROOT, ["eval=flux1"])))
    suite = Suite("own", SuiteConfig(prompts="own", scorers=scorers), (Prompt("p", "a red seven"),))
    progress = Progress("evaluate")
    with scoring.judges({}, compute) as judges:
        try:
            return measures.score_suites(
                [suite],
                params,
                images=folder / "images",
                reference=None,
                rows=folder / "rows",
                assets={},
                judges=judges,
                progress=progress,
                is_reference=is_reference,
            )
        finally:
            progress.close()


def test_of_the_reference_itself_nothing_may_be_measured(tmp_path: Path, compute: Callable[..., ComputeConfig]) -> None:
    [result] = measured(tmp_path, compute(0), "similarity", is_reference=True)
    assert result.as_dict()["measures"] == {}
    assert "compares with a reference model's pictures" in result.not_measured["similarity"]


@pytest.mark.parametrize(
    ("scorer", "is_reference"), [("similarity", False), ("clip_score", True), ("clip_score", False)]
)
def test_of_any_other_it_is_an_error_and_so_is_what_cannot_be_loaded(
    tmp_path: Path, compute: Callable[..., ComputeConfig], scorer: str, is_reference: bool
) -> None:
    with pytest.raises(EvaluationError, match=f"no scorer of any suite can be loaded: {scorer} "):
        measured(tmp_path, compute(0), scorer, is_reference=is_reference)
