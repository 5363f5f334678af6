"""What the report is made from, read and checked.

- Every file has a typed shape here; one that is missing or malformed is a `DataError` that names it and its stage.
- Nothing is filled in: a number the report shows was in a file.
- Loss curves come from the tracking database's frame where it holds the very run of a stage (same fingerprint), else
  from the stage's CSV. Both were written from the same numbers, so the report is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from pydantic import ValidationError

from moe_core.config import Params
from moe_core.errors import DataError
from tasks import report_suites
from tasks.places import EVALUATIONS, SANITY
from tasks.report_suites import Record, SeenMeasure, Sight, SuiteTable, SuiteValues

SPLITS = ("train", "validation")


class ParameterCounts(Record):
    """Parameters of one transformer; `by_module` splits the activated ones (a MoB group's shares may be fractions)."""

    total: int
    activated: int
    activated_paper: int
    by_module: dict[str, float]


class Judged(Record):
    """What the evaluator says of a model's pictures."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    interval: str
    accuracy_by_kind: dict[str, float]
    prompts_by_kind: dict[str, int]
    fid: float
    fid_reference: str


class Sanity(Record):
    """`reports/sanity.json`."""

    pictures: int
    measures: dict[str, SeenMeasure]
    not_measured: dict[str, str]


class Evaluation(Record):
    """`data/evaluations/<model>.json`. Pictures that nobody judges have no accuracy."""

    model: str
    prompts: int
    nfe: int
    judged: Judged | None
    teacher_distance: float
    kd_loss: float
    params: ParameterCounts
    flops: float
    expert_use: dict[str, list[float]]
    expert_use_by_timestep: dict[str, list[list[float]]]
    block_use: dict[str, list[float]]
    block_use_by_timestep: dict[str, list[list[float]]]
    suites: dict[str, SuiteValues]


class StageSummary(Record):
    """`reports/stages/<stage>.json`."""

    stage: str
    fingerprint: str
    metrics: dict[str, Any]
    groups: dict[str, list[list[int]]] | None = None
    dropped_blocks: dict[str, list[int]] | None = None


class Evaluator(Record):
    """The metrics of stage `evaluator`: its classifier on unseen digits, and the whole detector on real scenes."""

    test_digits: int
    accuracy: float
    detector_accuracy: float


class Latency(Record):
    """One model at one batch size: seconds for a whole sampling, and the ratio to the teacher's."""

    median_s: float
    low_s: float
    high_s: float
    ratio: float


class LatencyReport(Record):
    """`reports/latency.json`; `models[name][batch size]`."""

    device: str
    rounds: int
    batch_sizes: list[int]
    models: dict[str, dict[str, Latency]]


class BlockChange(Record):
    """`data/importance/block_change.json`: squared norm of output - input over that of the input, a number a block."""

    blocks: list[str]
    sigmas: list[float]
    by_sigma: list[list[float]]
    by_prompt: list[list[float]]
    relative: list[float]


class Rejects(Record):
    """Samples dropped for one reason."""

    count: int
    examples: list[dict[str, str]]


class SplitManifest(Record):
    """One split of the shards."""

    samples: int
    shards: list[dict[str, Any]]


class Manifest(Record):
    """`data/shards/manifest.json`."""

    splits: dict[str, SplitManifest]
    rejects: dict[str, Rejects]


class Picture(Record):
    """One line of `data/evaluations/<model>/pictures.jsonl`."""

    index: int
    file: str
    tag: str
    prompt: str
    correct: bool | None


@dataclass(frozen=True)
class Inputs:
    """Everything the report shows. `models` is the order of the table's rows."""

    params: Params
    models: tuple[str, ...]
    evaluations: Mapping[str, Evaluation]
    pictures: Mapping[str, tuple[Picture, ...]]
    images: Path
    curves: Mapping[str, pd.DataFrame]
    groups: Mapping[str, Mapping[str, list[list[int]]]]
    evaluator: Evaluator | None
    latency: LatencyReport
    block_change: BlockChange
    manifest: Manifest
    suites: list[SuiteTable]
    sights: list[Sight]
    unseen: dict[str, str]
    """scorer -> why its measures are not among the sights"""


RecordT = TypeVar("RecordT", bound=Record)


TEACHER_PARTS = ("teacher-vae", "teacher-text")


def trained_stages(params: Params) -> tuple[str, ...]:
    """The stages that have loss curves, in the DAG's order."""
    teacher = (*TEACHER_PARTS, "teacher") if params.model.source == "train" else ()
    baselines = [f"baseline-{name}" for name in params.baselines]
    return (*teacher, "shared_expert_kd", "moe_kd", *(f"mob_kd-{level}" for level in params.mob.levels), *baselines)


def fingerprints(root: Path, params: Params) -> dict[str, str]:
    """Stage of a curve -> fingerprint of its finished run, by which the tracking database knows it."""
    return {stage: _summary(root / "reports", _owner(stage)).fingerprint for stage in trained_stages(params)}


def load(root: Path, params: Params, frame: pd.DataFrame) -> Inputs:
    """Reads all inputs below `root`, the checkout.

    `frame` is `tasks.tracking.metrics_frame()`; it may be empty. Raises DataError where a file is missing, malformed or
    at odds with another.
    """
    models = tuple(params.models)
    reports, data = root / "reports", root / "data"
    pictures = {name: _pictures(root / EVALUATIONS / name, data / "images" / name, name) for name in models}
    for name in models[1:]:
        if [p.prompt for p in pictures[name]] != [p.prompt for p in pictures["teacher"]]:
            raise DataError(
                f"data/evaluations/{name}/pictures.jsonl has other prompts than data/evaluations/teacher/pictures.jsonl;"
                f" all models must be evaluated on the same ones: dvc repro evaluate@{name}"
            )
    evaluations = {n: _record(Evaluation, root / EVALUATIONS / f"{n}.json", f"evaluate@{n}") for n in models}
    for name, found in evaluations.items():
        if (found.judged is None) != (params.eval.classifier is None):
            raise DataError(
                f"{root / EVALUATIONS / name}.json: judged is {'null' if found.judged is None else 'there'}, which does not fit"
                f" eval.classifier; stage evaluate@{name} makes it: dvc repro evaluate@{name}"
            )
    latency = _record(LatencyReport, reports / "latency.json", "latency")
    for name in models:
        for size in latency.batch_sizes:
            if str(size) not in latency.models.get(name, {}):
                raise DataError(
                    f"reports/latency.json has no model {name} at batch size {size};"
                    " stage latency must time every model: dvc repro --force latency"
                )
    sanity = _record(Sanity, root / SANITY, "sanity")
    return Inputs(
        params=params,
        models=models,
        evaluations=evaluations,
        pictures=pictures,
        images=data / "images",
        curves={stage: _curve(reports, stage, frame) for stage in trained_stages(params)},
        groups={level: _groups(reports, level) for level in params.mob.levels},
        evaluator=None if params.eval.classifier is None else _evaluator(reports),
        latency=latency,
        block_change=_record(BlockChange, data / "importance" / "block_change.json", "importance"),
        manifest=_record(Manifest, data / "shards" / "manifest.json", "shard"),
        suites=report_suites.tables(root, params, {name: evaluations[name].suites for name in models}),
        sights=report_suites.sights(sanity.measures),
        unseen=sanity.not_measured,
    )


def _text(path: Path, stage: str) -> str:
    """A file's text; DataError with the stage that makes it where there is none."""
    if not path.is_file():
        raise DataError(f"{path} is missing; stage {stage} makes it: dvc repro {stage}")
    return path.read_text(encoding="utf-8")


def _record(kind: type[RecordT], path: Path, stage: str) -> RecordT:
    """A JSON file as its typed record."""
    return _parse(kind, _text(path, stage), str(path), stage)


def _parse(kind: type[RecordT], text: str, where: str, stage: str) -> RecordT:
    try:
        return kind.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}); stage {stage} makes it: dvc repro --force {stage}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise DataError(f"{where}: {key}: {fault['msg']}; stage {stage} makes it: dvc repro --force {stage}") from None


def _pictures(evaluation: Path, folder: Path, model: str) -> tuple[Picture, ...]:
    """The pictures of one model, in prompt order, each checked to be there."""
    stage, path = f"evaluate@{model}", evaluation / "pictures.jsonl"
    lines = _text(path, stage).splitlines()
    pictures = tuple(_parse(Picture, line, f"{path}:{number}", stage) for number, line in enumerate(lines, 1))
    if not pictures:
        raise DataError(f"{path} is empty; it must have a line a picture: dvc repro --force {stage}")
    for picture in pictures:
        if not (folder / picture.file).is_file():
            raise DataError(
                f"{folder / picture.file} is missing, but {path} lists it;"
                f" stage {stage} makes it: dvc repro --force {stage}"
            )
    return pictures


def _owner(curve: str) -> str:
    """The stage that a curve is of: a teacher has one for each part that is trained before the transformer."""
    return "teacher" if curve in TEACHER_PARTS else curve


def _summary(reports: Path, stage: str) -> StageSummary:
    """`stage` as in file names, `mob_kd-M`."""
    return _record(StageSummary, reports / "stages" / f"{stage}.json", stage.replace("-", "@"))


def _evaluator(reports: Path) -> Evaluator:
    metrics = _summary(reports, "evaluator").metrics
    return _parse(Evaluator, json.dumps(metrics), str(reports / "stages" / "evaluator.json"), "evaluator")


def _groups(reports: Path, level: str) -> Mapping[str, list[list[int]]]:
    """The MoB groups of a level, by kind of block, as the teacher's block indices."""
    groups = _summary(reports, f"mob_kd-{level}").groups
    if groups is None:
        path = reports / "stages" / f"mob_kd-{level}.json"
        raise DataError(f"{path}: groups is missing; stage mob_kd@{level} must list the groups it chose")
    return groups


def _curve(reports: Path, stage: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Loss curve of a stage in long form: columns split, metric, step, value; sorted."""
    name = _owner(stage)
    fingerprint = _summary(reports, name).fingerprint
    tracked = tracked_curve(frame, stage, fingerprint)
    return tracked if not tracked.empty else csv_curve(reports / "curves" / f"{stage}.csv", name.replace("-", "@"))


def tracked_curve(frame: pd.DataFrame, stage: str, fingerprint: str) -> pd.DataFrame:
    """The curve of the last finished run of a stage with this fingerprint; empty where the database has none."""
    columns = ["split", "metric", "step", "value"]
    if frame.empty:
        return pd.DataFrame(columns=columns)
    # the run of a cached stage has its maker's last values alone
    finished = (frame["status"] == "FINISHED") & frame["cached_from"].isna()
    rows = frame[finished & (frame["stage"] == stage) & (frame["fingerprint"] == fingerprint)]
    rows = rows[rows["metric"].str.match(rf"(?:{'|'.join(SPLITS)})/")]
    if rows.empty:
        return pd.DataFrame(columns=columns)
    last = rows.sort_values(["start_time", "run_id"])["run_id"].iloc[-1]
    rows = rows[rows["run_id"] == last]
    names = rows["metric"].str.split("/", n=1, expand=True)
    curve = pd.DataFrame(
        {"split": names[0], "metric": names[1], "step": rows["step"].astype(int), "value": rows["value"].astype(float)}
    )
    # a resumed run may have logged a step twice, with the same value
    return curve.drop_duplicates(columns[:3], keep="last").sort_values(columns[:3]).reset_index(drop=True)


def csv_curve(path: Path, stage: str) -> pd.DataFrame:
    """The same from `reports/curves/<stage>.csv`, whose columns are step, split and one a metric."""
    _text(path, stage)
    wide = pd.read_csv(path)
    if not {"step", "split"} <= set(wide.columns) or wide.empty:
        raise DataError(
            f"{path}: must have columns step and split and at least one row;"
            f" stage {stage} makes it: dvc repro --force {stage}"
        )
    long = wide.melt(id_vars=["step", "split"], var_name="metric", value_name="value").dropna(subset=["value"])
    return long[["split", "metric", "step", "value"]].sort_values(["split", "metric", "step"]).reset_index(drop=True)
