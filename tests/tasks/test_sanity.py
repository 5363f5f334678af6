"""Stage `sanity`: pictures made worse, scored like any others, and what is said of the steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import save_file

from moe_core.config import Params, parse
from moe_core.errors import ConfigError, EvaluationError
from moe_core.metrics import corruption, registry
from moe_core.metrics.scorer import Measure, Prompt, Row, Sample, ScorerSpec, SetMeasure
from moe_core.metrics.set_distance import frechet_distance
from tasks import sanity, scoring
from tasks.places import DENSE, IMAGES, PROMPTS, SANITY
from tasks.progress import Progress
from tasks.sanity import BLIND, Cell
from tasks.suites import Picture

ROOT = Path(__file__).resolve().parents[2]
CELLS = [(kind, level) for kind in corruption.KINDS for level in corruption.LEVELS]
COUNT = 12


class Sharpness:
    """Sees detail and the prompt: neighbours' differences, and whether the picture has the shade that its prompt asks for."""

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        rows = []
        for sample in samples:
            pixels = np.asarray(sample.image, np.float64)
            shade = int(sample.prompt.text.split()[-1])
            rows.append(
                {
                    "roughness": float(np.abs(np.diff(pixels, axis=0)).mean()),
                    "asked": bool(abs(pixels.mean() - shade) < 8),
                }
            )
        return rows


def load(assets: Mapping[str, str], device: torch.device) -> Sharpness:
    return Sharpness()


SPEC = ScorerSpec(
    "sharpness",
    "tests.tasks.test_sanity:load",
    measures=(Measure("roughness", "roughness", rising=False), Measure("asked", "asked", binary=True)),
)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    """Pictures of a shade that their prompt names, with a pattern on it, in the teacher's folder."""
    folder = tmp_path / IMAGES / DENSE / "own"
    folder.mkdir(parents=True)
    found = []
    for number in range(COUNT):
        shade = 60 + 10 * number
        picture = Picture(Prompt(f"{number:05d}", f"shade {shade}", "a" if number % 2 else "b"), number, 0, number)
        pixels = np.full((16, 16, 3), shade, np.uint8)
        pixels[::2] += 20
        pixels[1::2] -= 20
        Image.fromarray(pixels).save(folder / picture.file)
        found.append(picture)
    return found


def test_every_kind_and_level_has_its_pictures_and_prompts(pictures: list[Picture], tmp_path: Path) -> None:
    clean = tmp_path / IMAGES / DENSE / "own"
    cells = sanity.corrupted(pictures, clean, tmp_path / "cells")
    assert [(cell.kind, cell.level) for cell in cells] == CELLS
    originals = [np.asarray(scoring.read_picture(clean / picture.file), np.float64) for picture in pictures]

    def apart(cell: Cell) -> float:
        assert [picture.file for picture in cell.pictures] == [picture.file for picture in pictures]
        made = [scoring.read_picture(cell.folder / picture.file) for picture in cell.pictures]
        return float(np.mean([np.abs(np.asarray(a) - b).mean() for a, b in zip(made, originals, strict=True)]))

    texts = [picture.prompt for picture in pictures]
    for kind in corruption.KINDS:
        own = [cell for cell in cells if cell.kind == kind]
        distances = [apart(cell) for cell in own]
        others = [sum(p.prompt != text for p, text in zip(cell.pictures, texts, strict=True)) for cell in own]
        assert distances[0] == others[0] == 0
        if kind == "swap":
            assert distances == [0] * 5
            assert others == [0, 3, 6, 9, 12]
            assert all(sorted(p.prompt.id for p in cell.pictures) == [text.id for text in texts] for cell in own)
        else:
            assert distances == sorted(distances)
            assert len(set(distances)) == 5
            assert others == [0] * 5
    # A killed run makes them again, alike.
    content = {file: file.read_bytes() for file in (tmp_path / "cells").rglob("*.png")}
    assert len(content) == len(CELLS) * COUNT
    next(iter(content)).write_bytes(b"half")
    assert sanity.corrupted(pictures, clean, tmp_path / "cells") == cells
    assert {file: file.read_bytes() for file in content} == content
    (clean / pictures[4].file).unlink()
    with pytest.raises(EvaluationError, match=r"00004-00\.png is missing"):
        sanity.corrupted(pictures, clean, tmp_path / "cells")


@pytest.mark.parametrize(
    ("levels", "rising", "steps"),
    [
        ([5, 4, 3, 2, 1], True, 4),
        ([5, 4, 3, 2, 1], False, 0),
        ([1, 1, 2, 2, 3], False, 2),
        ([1, 1, 1, 1, 1], True, 0),
        ([3, 1, 2, 0, 1], True, 2),
        ([3], True, 0),
    ],
)
def test_steps_that_make_it_worse_are_counted(levels: list[float], rising: bool, steps: int) -> None:
    assert sanity.worse_steps(levels, rising) == steps


def table_of(columns: Mapping[str, Any]) -> tuple[pd.DataFrame, list[Cell]]:
    """Two prompts a cell; a column is a function of the number of the cell and of the prompt."""
    cells = [Cell(kind, level, Path("nowhere"), ()) for kind, level in CELLS]
    rows = [
        {"id": f"p{prompt}", "kind": "", "index": 0} | {name: make(cell, prompt) for name, make in columns.items()}
        for cell in range(len(cells))
        for prompt in range(2)
    ]
    return pd.DataFrame(rows), cells


def test_values_are_of_their_own_kind_and_level() -> None:
    spec = ScorerSpec("s", "m:f", measures=(Measure("up", "v", scale=100), Measure("down", "w", rising=False)))
    table, cells = table_of({"v": lambda cell, prompt: cell + prompt / 2, "w": lambda cell, prompt: -cell})
    found = sanity.values(spec, table, cells, {}, 0)
    assert found["up"]["blur"] == pytest.approx([25, 125, 225, 325, 425])
    assert found["up"]["noise"] == pytest.approx([525, 625, 725, 825, 925])
    assert found["up"]["swap"] == pytest.approx([1025, 1125, 1225, 1325, 1425])
    assert found["down"]["swap"] == pytest.approx([-10, -11, -12, -13, -14])
    assert (found["up"]["rising"], found["down"]["rising"]) == (True, False)
    assert found["up"]["blind_to_swap"] is None
    needs = ScorerSpec("s", "m:f", measures=(Measure("up", "v"),), needs_reference=True)
    assert sanity.values(needs, table, cells, {}, 0)["up"]["blind_to_swap"] == BLIND


def test_values_of_sets_of_features(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(20, 3))
    save_file({"features": real}, tmp_path / "real.safetensors")
    drawn = rng.normal(size=(len(CELLS), 6, 3)) + np.arange(len(CELLS))[:, None, None]
    cells = [Cell(kind, level, Path("nowhere"), ()) for kind, level in CELLS]
    table = pd.DataFrame(
        {"id": f"p{i}", "kind": "", "index": 0, "f": list(drawn[cell, i])}
        for cell in range(len(CELLS))
        for i in range(6)
    )
    spec = ScorerSpec("s", "m:f", set_measures=(SetMeasure("fid", "f", "fid", "real", "real.safetensors"),))
    found = sanity.values(spec, table, cells, {"real": str(tmp_path)}, 0)["fid"]
    assert found["noise"] == pytest.approx([frechet_distance(real, drawn[cell]) for cell in range(5, 10)])
    assert found["rising"] is False
    assert found["blind_to_swap"] == BLIND


@pytest.fixture
def stage(pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the stage is given, without DVC and MLflow around it: real parameters, folders and progress."""
    monkeypatch.setitem(registry.SPECS, "sharpness", SPEC)
    records = [{"tag": p.prompt.kind, "include": [], "prompt": p.prompt.text} for p in pictures]
    (tmp_path / PROMPTS).write_text("".join(json.dumps(record) + "\n" for record in records))
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["compute"].update(num_workers=0, cpus_per_worker=1)
    values["eval"] |= {"sanity": COUNT, "scoring_batch_size": 5, "models": {}}
    values["eval"]["suites"] = {"own": {"prompts": "own", "scorers": ["sharpness", "similarity", "clip_score"]}}
    told: list[dict[str, Any]] = []
    return SimpleNamespace(
        root=tmp_path,
        params=parse(Params, values),
        resume=SimpleNamespace(path=tmp_path / "resume"),
        progress=Progress("sanity"),
        ray=nullcontext,
        summary=told.append,
        told=told,
    )


def test_the_stage_tells_what_each_measure_sees(stage: Any) -> None:
    sanity.sanity(stage)
    report = json.loads((stage.root / SANITY).read_text())
    assert report["pictures"] == COUNT
    assert set(report["levels"]) == set(corruption.KINDS)
    found = report["measures"]
    [(scorer, why)] = report["not_measured"].items()
    assert scorer == "clip_score"
    assert "eval.models.clip" in why
    assert set(found) == {"roughness", "asked", "psnr", "ssim", "rmse"}
    [summary] = stage.told
    assert summary["asked_swap_steps"] == summary["psnr_blur_steps"] == summary["psnr_noise_steps"] == 4
    # Noise makes a picture rougher; blur does the contrary, and swapped prompts are not seen.
    assert summary["roughness_noise_steps"] >= 3
    assert summary["roughness_blur_steps"] == summary["roughness_swap_steps"] == 0
    assert found["asked"]["swap"][0] == 1
    assert found["asked"]["swap"][4] < 0.2
    # Each corrupted picture is compared with its own clean one.
    assert found["psnr"]["swap"] == [found["psnr"]["blur"][0]] * 5
    assert found["ssim"]["blind_to_swap"] == BLIND
    assert found["asked"]["blind_to_swap"] is None
    # Again from what a kill has left, and from nothing.
    first = (stage.root / SANITY).read_text()
    rows = sorted((stage.root / "resume" / "rows").rglob("*.parquet"))
    assert len(rows) == 2 * len(CELLS) * 3
    times = {file: file.stat().st_mtime_ns for file in rows}
    for file in rows[::2]:
        file.unlink()
    sanity.sanity(stage)
    assert (stage.root / SANITY).read_text() == first
    assert all(file.stat().st_mtime_ns == times[file] for file in rows[1::2])
    stage.resume.path = stage.root / "anew"
    sanity.sanity(stage)
    assert (stage.root / SANITY).read_text() == first


def test_it_is_left_out_or_refused(stage: Any) -> None:
    stage.params = stage.params.model_copy(update={"eval": stage.params.eval.model_copy(update={"sanity": COUNT + 1})})
    with pytest.raises(ConfigError, match=r"eval\.sanity is 13, but there are 12 pictures of eval\.prompts"):
        sanity.sanity(stage)
    stage.params = stage.params.model_copy(update={"eval": stage.params.eval.model_copy(update={"sanity": None})})
    sanity.sanity(stage)
    assert json.loads((stage.root / SANITY).read_text()) == {"pictures": 0, "measures": {}, "not_measured": {}}
    assert stage.told == [{}]
