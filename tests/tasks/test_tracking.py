"""MLflow on a real SQLite database: runs, resumed runs, cached stages, the frame."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest
from PIL import Image

from moe_core.errors import ConfigError
from tasks import tracking
from tasks.curves import Point
from tasks.fingerprint import identify
from tasks.tracking import PARENT, StageRun, connect, log_cached, metrics_frame

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database with MLflow's tables: making them takes seconds."""
    path = tmp_path_factory.mktemp("db") / "mlflow.db"
    tracking.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracked(project: Path, migrated: Path) -> Path:
    (project / "mlflow.db").write_bytes(migrated.read_bytes())
    return project


def test_a_stage_is_one_run_with_all_that_belongs_to_it(tracked: Path) -> None:
    [identity] = identify(tracked, "first")
    run = StageRun(tracked, identity)
    run.params()
    run.tag({"git.commit": "abc"})
    run.inputs()
    run.points(
        [Point("train", 5, {"loss": 1.5}), Point("train", 10, {"loss": 1.0}), Point("validation", 10, {"loss": 2.0})]
    )
    run.points([Point("train", 3, {"loss": 9.0})], "vae/")
    run.image("a.png", Image.new("RGB", (4, 4)))
    run.model("model", Path("data/set"), {"loss": 1.0})
    run.end("FINISHED")

    found = run.client.get_run(run.run_id)
    assert found.data.params == {"moe.top_k": "2", "seed": "0"}
    assert found.data.tags["stage"] == "first"
    assert found.data.tags["fingerprint"] == identity.fingerprint
    assert float(found.data.tags["seconds"]) >= 0
    [data] = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("data/set", identity.deps["data/set"])
    [made] = found.outputs.model_outputs
    assert run.client.get_logged_model(made.model_id).tags["path"] == "data/set"
    assert (tracked / "mlruns").is_dir()

    frame = metrics_frame(tracked)
    curve = frame[frame["metric"] == "train/loss"].set_index("stage")
    assert curve.loc["first", "value"].tolist() == [1.5, 1.0]
    assert curve.loc["first-vae", "step"] == 3
    assert set(frame["status"]) == {"FINISHED"}


def test_a_resumed_stage_reopens_its_run_and_logs_each_step_once(
    tracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [identity] = identify(tracked, "first")
    killed = StageRun(tracked, identity)
    killed.params()
    killed.points([Point("train", 5, {"loss": 1.5})])

    parent = killed.client.create_run(tracking.experiment_id(killed.client, tracked), run_name="flow").info.run_id
    monkeypatch.setenv(PARENT, parent)
    again = StageRun(tracked, identity, earlier=killed.run_id)
    again.params()
    assert again.run_id == killed.run_id
    assert again.last_step("train/") == 5
    assert again.last_step("validation/") == -1
    again.end("FINISHED")
    found = again.client.get_run(again.run_id)
    assert found.data.tags["resumed"] == "1"
    assert found.data.tags["mlflow.parentRunId"] == parent
    assert found.info.status == "FINISHED"


def test_the_run_of_an_equal_stage_that_has_finished_is_not_taken_over(tracked: Path) -> None:
    [identity] = identify(tracked, "first")
    theirs = StageRun(tracked, identity)
    theirs.end("FINISHED")
    ours = StageRun(tracked, identity, earlier=theirs.run_id)
    assert ours.run_id != theirs.run_id
    assert not ours.resumed


def test_a_model_is_recorded_by_its_place_in_a_checkout_and_by_its_experiment(
    tracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [identity] = identify(tracked, "first")
    client = connect(tracked)
    parent = client.create_run(tracking.experiment_id(client, tracked), run_name="demo-7").info.run_id
    monkeypatch.setenv(PARENT, parent)
    run = StageRun(tracked, identity)
    run.model("moe_kd", Path("data/checkpoints/moe"), {"loss": 0.5})
    [record] = client.search_logged_models([tracking.experiment_id(client, tracked)])
    assert record.tags["path"] == "data/checkpoints/moe"
    assert record.tags["experiment"] == "demo-7"
    assert record.source_run_id == run.run_id


def test_a_run_that_is_gone_is_told_and_a_new_one_begins(tracked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = StageRun(tracked, identify(tracked, "first")[0], earlier="0" * 32)
    assert run.resumed is False
    assert f"MLflow run {'0' * 32} of the killed attempt is not to be found" in capsys.readouterr().err
    run.end("FINISHED")


def test_a_cached_stage_appears_with_the_metrics_and_the_name_of_its_maker(
    tracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, level = identify(tracked, "first", "level@M")
    # More than MLflow takes at once.
    many = {f"steps.of_{number}": number for number in range(120)}
    first = dataclasses.replace(first, params=many)
    monkeypatch.setattr(
        tracking, "identify", lambda root, *stages: [{"first": first, "level@M": level}[s] for s in stages]
    )
    for value in (3.0, 1.0):
        run = StageRun(tracked, first)
        run.metrics({"loss": value})
        run.params()
        run.end("FINISHED")
    failed = StageRun(tracked, first)
    failed.end("FAILED")
    monkeypatch.setenv(PARENT, "f" * 32)
    assert log_cached(tracked, ["first", "level@M"]) == {"first": run.run_id, "level@M": None}
    # Of a second look at it, the maker is still the run that made it.
    assert log_cached(tracked, ["first"]) == {"first": run.run_id}
    frame = metrics_frame(tracked, stage="first")
    cached = frame[frame["cached_from"] == run.run_id]
    assert cached["value"].tolist() == [1.0, 1.0]
    assert set(cached["parent_run_id"]) == {"f" * 32}
    copied = [connect(tracked).get_run(run_id).data.params for run_id in set(cached["run_id"])]
    assert copied == [{f"steps.of_{number}": str(number) for number in range(120)}] * 2
    assert level.stage == "level@M"


def test_the_database_belongs_to_the_main_checkout(tracked: Path) -> None:
    assert tracking.tracking_uri(tracked) == f"sqlite:///{tracked}/mlflow.db"


def test_a_server_that_does_not_answer_is_named(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=f"MLFLOW_TRACKING_URI is {uri}, but no MLflow server answers there"):
        tracking.connect(tracked)


def test_the_frame_of_an_empty_database_has_its_columns(tracked: Path) -> None:
    frame = metrics_frame(tracked)
    assert frame.empty
    assert {"stage", "fingerprint", "run_id", "metric", "step", "value"} <= set(frame.columns)
