"""Rows of pictures: named faults, batches that do not fit, kills, any number of workers, and what the rows come to in `measures`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from moe_core.config import ComputeConfig, Params, SuiteConfig, parse
from moe_core.errors import DataError, EvaluationError
from moe_core.metrics import registry
from moe_core.metrics.scorer import Asset, Measure, MissingAsset, Prompt, Row, Sample, ScorerSpec, SetMeasure
from tasks import comparison, measures, scoring, suites
from tasks.progress import Progress
from tasks.suites import Picture, Suite

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::ResourceWarning")

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("light", "dark", "dark")
Drawn = tuple[Suite, list[Picture]]
Compute = Callable[..., ComputeConfig]


class Brightness:
    """A scorer that anybody can check: mean level, whether that is over half, and three features."""

    def __init__(self, most: int | None = None) -> None:
        self.most, self.batches = most, []

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        self.batches.append(len(samples))
        if self.most is not None and len(samples) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        levels = [np.asarray(sample.image, np.float64) for sample in samples]
        return [
            {
                "level": float(level.mean()),
                "bright": bool(level.mean() > 127),
                "channels": level.mean((0, 1)).tolist(),
                "note": sample.prompt.text,
            }
            for level, sample in zip(levels, samples, strict=True)
        ]


def load(assets: Mapping[str, str], device: torch.device) -> Brightness:
    return Brightness()


def load_nothing(assets: Mapping[str, str], device: torch.device) -> Brightness:
    """What a hub id comes to that cannot be reached."""
    raise MissingAsset("gone needs The Model, some/model; it cannot be fetched here")


class Faulty:
    """Gives one value that is no number."""

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        return [{"level": float("nan") if (sample.prompt.id, sample.index) == ("p4", 1) else 1.0} for sample in samples]


def load_faulty(assets: Mapping[str, str], device: torch.device) -> Faulty:
    return Faulty()


HERE = "tests.tasks.test_scoring"
LEVEL = Measure("level", "level", by_kind=True)
BRIGHT = ScorerSpec("bright", f"{HERE}:load", measures=(LEVEL, Measure("bright", "bright", binary=True)))
DARK = ScorerSpec("dark", f"{HERE}:load", measures=(Measure("dark_level", "level", kinds=("dark",)),))
GONE = ScorerSpec("gone", f"{HERE}:load_nothing", measures=(Measure("gone", "level"),))
NAN = ScorerSpec("nan", f"{HERE}:load_faulty", measures=(Measure("nan", "level"),))
ASKS = ScorerSpec(
    "asks",
    f"{HERE}:load",
    measures=(Measure("asks", "level"),),
    assets=(Asset("big", "Big Model, some/big", ("a.bin",)),),
)
CHANNELS = ScorerSpec(
    "channels",
    f"{HERE}:load",
    set_measures=(SetMeasure("channels_fid", "channels", "fid", "real", "real.safetensors"),),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorers above, beside the real ones."""
    for spec in (BRIGHT, DARK, GONE, NAN, ASKS, CHANNELS):
        monkeypatch.setitem(registry.SPECS, spec.name, spec)


def suite_of(*scorers: str, each: int = 2, prompts: int = 6, name: str = "mine") -> Suite:
    config = SuiteConfig(prompts="text", path=Path("prompts.txt"), images_per_prompt=each, scorers=scorers)
    return Suite(name, config, tuple(Prompt(f"p{i}", f"prompt {i}", KINDS[i % len(KINDS)]) for i in range(prompts)))


def params_of() -> Params:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["compute"].update(num_workers=0, cpus_per_worker=1)
    values["eval"]["scoring_batch_size"] = 5
    return parse(Params, values)


def draw(folder: Path, pictures: Sequence[Picture], brighter: int = 0) -> None:
    """A picture each, of one level."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        level = (picture.number * 40 + picture.index * 7 + brighter) % 256
        Image.new("RGB", (8, 8), (level, 255 - level, 30 * picture.number)).save(folder / picture.file)


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Suite, list[Picture]]:
    """A suite whose pictures are there."""
    suite = suite_of("bright")
    pictures = suites.pictures(suite, 0)
    draw(tmp_path / "images" / "mine", pictures)
    return suite, pictures


def units_of(
    folder: Path, pictures: Sequence[Picture], spec: ScorerSpec = BRIGHT, rows: str = "rows"
) -> list[scoring.Unit]:
    return scoring.units(spec, pictures, folder / "images" / "mine", None, folder / rows, 5)


def run(units: Sequence[scoring.Unit], compute: ComputeConfig) -> pd.DataFrame:
    with scoring.judges({}, compute) as group:
        return scoring.run(units, group, lambda *told: None)[0]


def measured(
    folder: Path, found: Sequence[Suite], compute: ComputeConfig, assets: Mapping[str, str] = {}, model: str = ""
) -> list[measures.SuiteResult]:
    with scoring.judges(assets, compute) as group:
        return measures.score_suites(
            found,
            params_of(),
            images=folder / f"images{model}",
            reference=None,
            rows=folder / f"rows{model}",
            assets=assets,
            judges=group,
            progress=Progress("evaluate"),
        )


def test_rows_are_of_their_pictures_and_a_killed_run_goes_on(drawn: Drawn, tmp_path: Path, compute: Compute) -> None:
    _, pictures = drawn
    units = units_of(tmp_path, pictures)
    table = run(units, compute(0))
    assert list(table["id"]) == [f"p{i}" for i in range(6) for _ in range(2)]
    assert list(table["index"]) == [0, 1] * 6
    assert list(table["kind"]) == [KINDS[i % 3] for i in range(6) for _ in range(2)]
    assert list(table["note"]) == [p.prompt.text for p in pictures]
    by_hand = [np.asarray(Image.open(tmp_path / "images" / "mine" / p.file)).mean() for p in pictures]
    assert list(table["level"]) == pytest.approx(by_hand)
    files = [unit.rows for unit in units]
    assert [file.name for file in files] == ["0000000.parquet", "0000005.parquet", "0000010.parquet"]
    content, times = [file.read_bytes() for file in files], [file.stat().st_mtime_ns for file in files]
    # As a kill in the second unit leaves it.
    files[1].unlink()
    files[1].with_name(f".{files[1].name}.partial").write_bytes(b"half")
    pd.testing.assert_frame_equal(run(units, compute(0)), table)
    assert [file.read_bytes() for file in files] == content
    again = [file.stat().st_mtime_ns for file in files]
    assert again[0] == times[0]
    assert again[2] == times[2]


KILLED = """
import sys
from pathlib import Path
from moe_core.config import ComputeConfig
from tasks import scoring, suites
from tests.tasks.test_scoring import suite_of, units_of
def told(done, count, rate):
    print(done, flush=True)
    sys.stdin.read()
units = units_of(Path(sys.argv[1]), suites.pictures(suite_of("bright"), 0))
compute = ComputeConfig(num_workers=0, cpus_per_worker=1, checkpoint_every=1, log_every=1)
with scoring.judges({}, compute) as group:
    scoring.run(units, group, told)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_killed_after_its_first_unit_it_scores_what_is_left(drawn: Drawn, tmp_path: Path, compute: Compute) -> None:
    _, pictures = drawn
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "5\n"
        os.kill(process.pid, signal.SIGKILL)
    [first] = (tmp_path / "rows").iterdir()
    written = first.stat().st_mtime_ns
    found = run(units_of(tmp_path, pictures), compute(0))
    assert first.stat().st_mtime_ns == written
    pd.testing.assert_frame_equal(found, run(units_of(tmp_path, pictures, rows="whole"), compute(0)))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(180)
def test_rows_are_the_same_whoever_makes_them(drawn: Drawn, tmp_path: Path, compute: Compute) -> None:
    _, pictures = drawn
    by_itself = units_of(tmp_path, pictures)
    table = run(by_itself, compute(0))
    for workers in (1, 2):
        units = units_of(tmp_path, pictures, rows=f"rows{workers}")
        pd.testing.assert_frame_equal(run(units, compute(workers)), table)
        assert [unit.rows.read_bytes() for unit in units] == [unit.rows.read_bytes() for unit in by_itself]
    # What a worker raises comes with its own words, and a scorer that only loading finds missing is told as such.
    (tmp_path / "images" / "mine" / pictures[3].file).unlink()
    with pytest.raises(EvaluationError, match=r"00001-01\.png is missing"):
        run(units_of(tmp_path, pictures, rows="other"), compute(1))
    draw(tmp_path / "images" / "mine", pictures)
    [result] = measured(tmp_path, [suite_of("gone", "bright")], compute(1))
    assert result.not_measured == {"gone": "gone needs The Model, some/model; it cannot be fetched here"}
    assert result.values["level"].value == pytest.approx(table["level"].mean())


def test_pictures_that_are_missing_or_broken_are_named(drawn: Drawn, tmp_path: Path, compute: Compute) -> None:
    _, pictures = drawn
    file = tmp_path / "images" / "mine" / pictures[7].file
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(EvaluationError, match=r"00003-01\.png is missing; every prompt must have its pictures"):
        run(units_of(tmp_path, pictures), compute(0))
    for content in (b"", b"no picture", whole[: len(whole) // 2], whole.replace(b"IHDR", b"IHDX")):
        file.write_bytes(content)
        with pytest.raises(EvaluationError, match=r"00003-01\.png cannot be decoded \(.*\); remove it"):
            run(units_of(tmp_path, pictures), compute(0))
    # The unit before it is kept, its own is not.
    assert [path.name for path in sorted((tmp_path / "rows").iterdir())] == ["0000000.parquet"]
    file.write_bytes(whole)
    assert len(run(units_of(tmp_path, pictures), compute(0))) == 12


def samples_of(count: int) -> list[Sample]:
    return [Sample(Prompt(f"p{i}", f"prompt {i}"), 0, Image.new("RGB", (8, 6), (i, i, i))) for i in range(count)]


def test_a_batch_that_does_not_fit_is_halved_and_its_rows_are_the_same() -> None:
    samples = samples_of(11)
    expected = Brightness().score(samples)
    for most in (1, 2, 3, 10):
        scorer = Brightness(most)
        assert scoring.score(scorer, samples, "bright") == expected
        assert scorer.batches[0] == 11
        assert sum(size for size in scorer.batches if size <= most) == 11
    with pytest.raises(
        EvaluationError, match=r"bright runs out of memory on one picture, \(8, 6\) of 'prompt 0': CUDA out of memory"
    ):
        scoring.score(Brightness(0), samples, "bright")


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_cpus_memory_is_the_same(error: type[Exception]) -> None:
    told = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"

    class Scorer:
        def score(self, samples: Sequence[Sample]) -> list[Row]:
            if len(samples) > 1:
                raise error(told)
            return [{"level": 0.0}]

    assert len(scoring.score(Scorer(), samples_of(4), "bright")) == 4
    # torch's own error is of this kind, and another one of its class is no lack of memory.
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert scoring._is_out_of_memory(caught.value)
    broken: Any = SimpleNamespace(score=lambda samples: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        scoring.score(broken, samples_of(4), "bright")


def test_a_batch_that_did_not_fit_is_let_go_before_its_halves_are_tried() -> None:
    """The error's traceback holds what the scorer had in memory, as long as it is being handled."""
    handled = []

    class Scorer:
        def score(self, samples: Sequence[Sample]) -> list[Row]:
            handled.append(sys.exc_info()[0])
            if len(samples) > 1:
                raise torch.OutOfMemoryError("full")
            return [{"level": 0.0}]

    scoring.score(Scorer(), samples_of(4), "bright")
    assert handled == [None] * 7


def test_a_scorer_that_gives_too_few_rows_is_named() -> None:
    few: Any = SimpleNamespace(score=lambda samples: [{"level": 1.0}] * (len(samples) - 1))
    with pytest.raises(EvaluationError, match="bright gave 3 rows for 4 pictures; it must give one each"):
        scoring.score(few, samples_of(4), "bright")


def test_a_value_that_is_no_number_is_named_and_its_row_is_not_kept(
    drawn: Drawn, tmp_path: Path, compute: Compute
) -> None:
    _, pictures = drawn
    with pytest.raises(EvaluationError, match="nan says level = nan of prompt p4, picture 1; it must be a number"):
        run(units_of(tmp_path, pictures, NAN), compute(0))
    assert [path.name for path in sorted((tmp_path / "rows").iterdir())] == ["0000000.parquet"]
    row = {"level": 1.0, "channels": [1.0, float("inf")]}
    with pytest.raises(EvaluationError, match="channels gives prompt p0, picture 0, channels that are not all numbers"):
        scoring.check_rows(CHANNELS, samples_of(1), [row])
    with pytest.raises(EvaluationError, match="bright says bright = None of prompt p0"):
        scoring.check_rows(BRIGHT, samples_of(1), [row])
    for value in (None, "1.0"):
        wrong: Any = {"level": value, "channels": [1.0, value]}
        with pytest.raises(EvaluationError, match=f"level = {value} of prompt p0, picture 0; it must be a number"):
            scoring.check_rows(BRIGHT, samples_of(1), [wrong])
        with pytest.raises(EvaluationError, match="channels that are not all numbers"):
            scoring.check_rows(CHANNELS, samples_of(1), [wrong])
    # A column that no measure takes of this kind may be anything.
    scoring.check_rows(DARK, samples_of(1), [{"level": float("nan")}])


def test_values_are_means_over_prompts_and_two_runs_say_the_same(
    drawn: Drawn, tmp_path: Path, compute: Compute
) -> None:
    suite, pictures = drawn
    [result] = measured(tmp_path, [suite], compute(0))
    table = result.tables["bright"]
    means = table.groupby("id")["level"].mean()
    assert result.values["level"].value == pytest.approx(means.mean())
    assert result.values["bright"].value == pytest.approx(table["bright"].mean())
    assert {kind: value.count for kind, value in result.kinds["level"].items()} == {"light": 2, "dark": 4}
    assert result.kinds["level"]["light"].value == pytest.approx(means[["p0", "p3"]].mean())
    told = json.dumps(result.as_dict())
    # Again, from rows that are there; in part; and from none.
    (tmp_path / "rows" / "mine" / "bright" / "0000005.parquet").unlink()
    for folder in (tmp_path, tmp_path, tmp_path / "new"):
        draw(folder / "images" / "mine", pictures)
        [again] = measured(folder, [suite], compute(0))
        assert json.dumps(again.as_dict()) == told
    out = tmp_path / "out"
    out.mkdir()
    result.write(out)
    by_prompt = pd.read_parquet(out / "mine.prompts.parquet")
    assert list(by_prompt["prompt"]) == [f"prompt {i}" for i in range(6)]
    assert list(by_prompt["bright.level"]) == pytest.approx(list(means))
    extremes = result.extremes(2)
    best = extremes[(extremes["measure"] == "level") & (extremes["which"] == "best")]
    assert list(best["prompt"]) == [
        f"prompt {i.removeprefix('p')}" for i in means.sort_values(ascending=False).index[:2]
    ]
    sheet = measures.best_and_worst(result, tmp_path / "images" / "mine", pictures)
    assert sheet.size == (3 * 8, 2 * 8)


def test_what_a_scorer_lacks_is_told_and_the_others_go_on(drawn: Drawn, tmp_path: Path, compute: Compute) -> None:
    suite = suite_of("asks", "gone", "similarity", "bright")
    [result] = measured(tmp_path, [suite], compute(0))
    assert list(result.tables) == ["bright"]
    assert result.not_measured["asks"] == (
        "asks needs Big Model, some/big; fetch it and name its folder, or its hub id, in eval.models.big"
    )
    assert result.not_measured["gone"] == "gone needs The Model, some/model; it cannot be fetched here"
    assert "similarity compares with a reference model's pictures" in result.not_measured["similarity"]
    [result] = measured(tmp_path, [suite], compute(0), {"big": str(tmp_path)})
    assert "which has no a.bin; it must hold Big Model" in result.not_measured["asks"]
    packaged = replace(BRIGHT, packages=("no_such_package",))
    assert scoring.unavailable(packaged, {}) == "bright needs the package no_such_package; install it beside this one"
    assert scoring.unavailable(BRIGHT, {}) is None


def test_if_no_scorer_can_be_loaded_all_reasons_are_told(drawn: Drawn, tmp_path: Path, compute: Compute) -> None:
    missing = Suite("other", suite_of("bright").config, missing="eval.suites.other.path is x, where nothing lies")
    with pytest.raises(
        EvaluationError,
        match=r"no scorer of any suite can be loaded: asks needs Big Model.*; eval\.suites\.other\.path is x",
    ):
        measured(tmp_path, [suite_of("asks"), missing], compute(0))
    # One of another suite is enough; the first one's pictures are shown in their own order.
    draw(tmp_path / "images" / "second", suites.pictures(suite_of("bright", name="second"), 0))
    first, second = measured(tmp_path, [suite_of("asks"), suite_of("bright", name="second")], compute(0))
    assert not first.tables
    assert first.extremes(3).empty
    assert second.values
    _, pictures = drawn
    assert measures.best_and_worst(first, tmp_path / "images" / "mine", pictures).size == (24, 16)


def test_a_scorer_of_some_kinds_sees_them_alone_and_no_row_of_another_is_lost(
    drawn: Drawn, tmp_path: Path, compute: Compute
) -> None:
    suite = suite_of("dark", "bright")
    [result] = measured(tmp_path, [suite], compute(0))
    assert set(result.tables["dark"]["kind"]) == {"dark"}
    assert result.values["dark_level"].count == 4
    out = tmp_path / "out"
    out.mkdir()
    result.write(out)
    rows = pd.read_parquet(out / "mine.pictures.parquet")
    assert list(zip(rows["id"], rows["index"], strict=True)) == [(f"p{i}", j) for i in range(6) for j in range(2)]
    assert rows["dark.level"].isna().sum() == 4
    assert rows["bright.level"].notna().all()
    # Read back, each scorer has its own rows.
    for name, table in result.tables.items():
        back = comparison.of_scorer(rows, name)
        pd.testing.assert_frame_equal(back.reset_index(drop=True), table[list(back.columns)], check_dtype=False)
    with pytest.raises(EvaluationError, match="dark measures prompts of the kinds dark; the suite has none"):
        measured(tmp_path, [suite_of("dark", prompts=1)], compute(0))


def test_a_measure_that_no_prompt_counts_for_is_told_and_the_others_go_on(
    drawn: Drawn, tmp_path: Path, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    partly = replace(DARK, measures=(*DARK.measures, Measure("unseen", "level", kinds=("unseen",))))
    monkeypatch.setitem(registry.SPECS, "dark", partly)
    [result] = measured(tmp_path, [suite_of("dark")], compute(0))
    assert list(result.values) == ["dark_level"]
    assert result.not_measured == {"unseen": "no prompt of suite mine counts for unseen"}


def test_two_models_are_compared_prompt_by_prompt(tmp_path: Path, compute: Compute) -> None:
    suite = suite_of("dark", "bright", prompts=9)
    pictures, folders = suites.pictures(suite, 0), []
    for number, model in enumerate("ab"):
        draw(tmp_path / f"images{model}" / "mine", pictures, brighter=3 * number)
        [result] = measured(tmp_path, [suite], compute(0), model=model)
        folders.append(tmp_path / model)
        folders[-1].mkdir()
        result.write(folders[-1])
    found = comparison.differences("mine", suite.config.scorers, *folders[::-1], {}, 0)
    assert set(found) == {"dark_level", "level", "bright"}
    rows = [comparison.rows(folder, "mine") for folder in folders]
    pairs = (rows[1]["bright.level"] - rows[0]["bright.level"]).groupby(rows[0]["id"]).mean()
    assert found["level"].value == pytest.approx(pairs.mean())
    assert found["level"].low <= found["level"].value <= found["level"].high
    same = comparison.differences("mine", suite.config.scorers, folders[0], folders[0], {}, 0)
    assert (same["level"].low, same["level"].value, same["level"].high) == (0, 0, 0)
    # The same ids, and one prompt that asks for something else.
    texts = pd.read_parquet(folders[1] / "mine.prompts.parquet")
    texts.loc[3, "prompt"] = "another"
    texts.to_parquet(folders[1] / "mine.prompts.parquet")
    with pytest.raises(DataError, match="are of other prompts in suite mine"):
        comparison.differences("mine", suite.config.scorers, *folders, {}, 0)
    with pytest.raises(DataError, match=r"b/other\.pictures\.parquet is missing; `evaluate` of b makes it"):
        comparison.rows(folders[1], "other")


def test_what_compares_with_a_reference_has_no_difference_to_it(tmp_path: Path) -> None:
    rows = pd.DataFrame({"id": ["p0", "p1"], "kind": "", "index": 0, "bright.level": [1.0, 2.0], "bright.bright": True})
    for name, psnr in (("one", 30.0), ("other", 20.0)):
        (tmp_path / name).mkdir()
        table = rows.assign(**{f"similarity.{column}": psnr for column in ("psnr", "ssim", "rmse")})
        table.to_parquet(tmp_path / name / "mine.pictures.parquet")
        table.assign(prompt="a").to_parquet(tmp_path / name / "mine.prompts.parquet")
    found = comparison.differences("mine", ["bright", "similarity"], tmp_path / "one", tmp_path / "other", {}, 0)
    assert set(found) == {"level", "bright"}
