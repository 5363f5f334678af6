"""What a former experiment with other levels left is told before any work, and removed when asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_core.errors import ConfigError
from tasks import leftovers

MODELS = ("teacher", "shared", "L", "M")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which an experiment with the levels M and XS has run."""
    for model in (*MODELS, "XS"):
        files = [
            f"data/images/{model}/own/00000-00.png",
            f"data/evaluations/{model}.json",
            f"data/inspections/{model}.json",
        ]
        files += [f"data/evaluations/{model}/pictures.jsonl"]
        files += [f"reports/stages/evaluate-{model}.json", f"reports/stages/generate-{model}.json"]
        if model in ("M", "XS"):
            files += [f"data/checkpoints/mob/{model}/config.json"]
            files += [f"reports/stages/mob_kd-{model}.json", f"reports/curves/mob_kd-{model}.csv"]
        files += [f"data/studies/{name}/a.json" for name in ("old", "new")]
        files += [
            f"reports/{place}"
            for place in ("studies/old/study.md", "stages/study-old.json", "stages/study_runs-new.json")
        ]
        for file in [*files, "reports/stages/teacher.json", "reports/curves/teacher-vae.csv"]:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(model)
    return tmp_path


def test_outs_of_other_models_are_refused_by_name(checkout: Path) -> None:
    leftovers.check(checkout, (*MODELS, "XS"))
    with pytest.raises(
        ConfigError, match=r"data/checkpoints/mob/XS belongs to no model of this experiment \(teacher, "
    ):
        leftovers.check(checkout, MODELS)


def test_they_alone_are_removed(checkout: Path) -> None:
    before = {path for path in checkout.rglob("*") if path.is_file()}
    (checkout / "cache").mkdir()
    (checkout / "data/checkpoints/mob/XXS").symlink_to(checkout / "cache")
    removed = leftovers.remove(checkout, MODELS, ("new",))
    gone = before - {path for path in checkout.rglob("*") if path.is_file()}
    assert {path.relative_to(checkout).as_posix() for path in gone} == {
        "data/checkpoints/mob/XS/config.json",
        "data/images/XS/own/00000-00.png",
        "data/inspections/XS.json",
        "data/evaluations/XS.json",
        "data/evaluations/XS/pictures.jsonl",
        "reports/stages/generate-XS.json",
        "reports/stages/evaluate-XS.json",
        "reports/stages/mob_kd-XS.json",
        "reports/curves/mob_kd-XS.csv",
        "data/studies/old/a.json",
        "reports/studies/old/study.md",
        "reports/stages/study-old.json",
    }
    assert len(removed) == 13
    assert (checkout / "cache").is_dir()
    leftovers.check(checkout, MODELS)
    assert leftovers.remove(checkout, MODELS, ("new",)) == []
