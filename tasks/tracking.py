"""MLflow: one run a stage, under the flow's run where there is one, and everything of all of them in one frame.

- Without MLFLOW_TRACKING_URI: SQLite in the main checkout, absolute, the same from every worktree.
- A stage's run has its fingerprint as a tag. A resumed stage re-opens its run; a cached one gets a small run that names the run it came from.
- `python -m tasks.tracking cached STAGE...` logs cached stages; the flow calls it.
"""

from __future__ import annotations

import http.client
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read by MLflow when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import pandas as pd
import psutil
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from PIL import Image

from moe_core.errors import ConfigError, Dense2MoEError
from tasks.curves import Point
from tasks.fingerprint import Identity, identify
from tasks.project import main_checkout

EXPERIMENT = "dense2moe"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages then begin with training runs, not with traces of language models."""
PARENT = "DENSE2MOE_PARENT_RUN"
"""Environment variable: id of the flow's run."""
ANSWER_SECONDS = 5
BATCH = 1000
"""MLflow's limits for one call: 1000 metrics, 100 parameters, 100 tags."""
SMALL_BATCH = 100


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, else the SQLite file of the main checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{main_checkout(root)}/mlflow.db"


def connect(root: Path) -> MlflowClient:
    """A client of the tracking store; raises ConfigError where a named server does not answer."""
    uri = tracking_uri(root)
    if urllib.parse.urlparse(uri).scheme in ("http", "https"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS).close()
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise ConfigError(
                f"MLFLOW_TRACKING_URI is {uri}, but no MLflow server answers there ({error}); start one (`make up`), or unset the variable"
                " to log to mlflow.db in the main checkout"
            ) from error
    try:
        return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        raise ConfigError(f"MLFLOW_TRACKING_URI is {uri}, which MLflow refuses: {error}") from error


def experiment_id(client: MlflowClient, root: Path) -> str:
    """The id of our experiment, made where it is missing; its artifacts lie beside a SQLite database."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    local = tracking_uri(root).startswith("sqlite:")
    try:
        location = (main_checkout(root) / "mlruns").as_uri() if local else None
        return str(client.create_experiment(EXPERIMENT, location, tags=EXPERIMENT_TAGS))
    except MlflowException:
        # Another stage, started at the same moment, has made it.
        if (found := client.get_experiment_by_name(EXPERIMENT)) is None:
            raise
        return str(found.experiment_id)


class StageRun:
    """The MLflow run of one stage."""

    def __init__(self, root: Path, identity: Identity, earlier: str | None = None) -> None:
        """Opens a run; `earlier` is the run that a killed attempt left open."""
        self.client = connect(root)
        self.identity = identity
        self._experiment = experiment_id(self.client, root)
        self._started = time.monotonic()
        self._parent = os.environ.get(PARENT)
        tags = {"stage": identity.stage, "fingerprint": identity.fingerprint}
        if self._parent:
            tags["mlflow.parentRunId"] = self._parent
        run = self._reopen(earlier)
        self.resumed = run is not None
        if run is None:
            run = self.client.create_run(self._experiment, run_name=identity.stage, tags=tags)
        else:
            self.client.update_run(run.info.run_id, status="RUNNING")
            self.tag(tags | {"resumed": str(int(run.data.tags.get("resumed", "0")) + 1)})
        self.run_id = run.info.run_id
        self._seconds = float(run.data.tags.get("seconds", "0"))

    def _reopen(self, earlier: str | None) -> Run | None:
        if earlier is None:
            return None
        try:
            run = self.client.get_run(earlier)
        except MlflowException as error:
            # The database was removed or another one is in use: then there is nothing to re-open.
            print(
                f"MLflow run {earlier} of the killed attempt is not to be found ({error}); a new one begins",
                file=sys.stderr,
            )
            return None
        if run.info.status == "FINISHED":
            # An equal run's, for which this one has waited: what it did stays its own.
            return None
        self.run_id = run.info.run_id
        return run

    def tag(self, tags: Mapping[str, str]) -> None:
        """Sets tags; those set before are replaced."""
        items = [RunTag(name, value) for name, value in tags.items()]
        for first in range(0, len(items), SMALL_BATCH):
            self.client.log_batch(self.run_id, tags=items[first : first + SMALL_BATCH])

    def params(self) -> None:
        """Logs every parameter that the stage lists in dvc.yaml. A resumed run may have them already: the same ones, which MLflow allows."""
        _log_params(self.client, self.run_id, flatten(self.identity.params))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs values of one step."""
        self._log([Metric(name, float(value), _now(), step) for name, value in values.items()])

    def points(self, points: Iterable[Point], prefix: str = "") -> None:
        """Logs points of a curve as `<prefix><split>/<name>`."""
        now = _now()
        self._log(
            [
                Metric(f"{prefix}{p.split}/{name}", value, now, p.step)
                for p in points
                for name, value in p.values.items()
            ]
        )

    def _log(self, metrics: list[Metric]) -> None:
        for first in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + BATCH])

    def last_step(self, prefix: str) -> int:
        """The last step that an earlier attempt logged of the metrics under a prefix (`train/`), -1 without one."""
        if not self.resumed:
            return -1
        names = [name for name in self.client.get_run(self.run_id).data.metrics if name.startswith(prefix)]
        return max((m.step for name in names for m in self.client.get_metric_history(self.run_id, name)), default=-1)

    def inputs(self) -> None:
        """Logs every data dependency as a dataset whose digest is its DVC hash."""
        data = [
            DatasetInput(
                Dataset(name=path, digest=md5, source_type="dvc", source=f'{{"path": "{path}"}}'),
                [InputTag("mlflow.data.context", "input")],
            )
            for path, md5 in self.identity.data().items()
        ]
        if data and not self.client.get_run(self.run_id).inputs.dataset_inputs:
            self.client.log_inputs(self.run_id, datasets=data)

    def image(self, name: str, picture: Image.Image) -> None:
        """Logs one picture as an artifact."""
        self.client.log_image(self.run_id, picture, artifact_file=f"images/{name}")

    def table(self, name: str, rows: pd.DataFrame) -> None:
        """Logs a table as an artifact that MLflow shows."""
        self.client.log_table(self.run_id, rows, artifact_file=f"tables/{name}")

    def model(self, name: str, checkpoint: Path, metrics: Mapping[str, float]) -> None:
        """Records that this run made a model; no copy is taken.

        `checkpoint` is its path in a checkout. Of a flow run that is the checkout in which its experiment was applied: the
        tag `experiment` names it, and the worktree in which the model was made goes when the run ends.
        """
        tags = {"path": str(checkpoint), "stage": self.identity.stage, "fingerprint": self.identity.fingerprint}
        if self._parent:
            tags["experiment"] = str(self.client.get_run(self._parent).info.run_name)
        record = self.client.create_logged_model(
            self._experiment,
            name=name,
            source_run_id=self.run_id,
            tags=tags,
            model_type="diffusers",
        )
        self.client.log_outputs(self.run_id, [LoggedModelOutput(record.model_id, step=0)])
        for key, value in metrics.items():
            self.client.log_metric(self.run_id, f"model/{key}", float(value), model_id=record.model_id)
        self.client.finalize_logged_model(record.model_id, LoggedModelStatus.READY)

    def child(
        self,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        curves: Mapping[str, Iterable[Sequence[float]]],
        seconds: float,
    ) -> None:
        """A finished run of its own below this one: a training of a study, which took so long. `curves`: metric -> (step, value)."""
        tags, now = {**tags, "mlflow.parentRunId": self.run_id}, _now()
        began = now - int(seconds * 1000)
        run = self.client.create_run(self._experiment, start_time=began, run_name=name, tags=tags).info.run_id
        _log_params(self.client, run, params)
        found = [Metric(key, float(value), now, 0) for key, value in metrics.items()]
        found += [Metric(key, float(value), now, int(step)) for key, points in curves.items() for step, value in points]
        for first in range(0, len(found), BATCH):
            self.client.log_batch(run, metrics=found[first : first + BATCH])
        self.client.set_terminated(run, status="FINISHED")

    def children(self) -> set[str]:
        """Names of the finished runs below this one."""
        if not self.resumed:
            return set()
        query = f"tags.mlflow.parentRunId = '{self.run_id}' and attributes.status = 'FINISHED'"
        return {str(run.info.run_name) for run in _runs(self.client, self._experiment, query)}

    def end(self, status: str) -> None:
        """Closes the run: FINISHED, FAILED or KILLED. Wall time adds up over resumed attempts."""
        # `seconds`: of all attempts, from this run's opening; `process_seconds`: of this attempt, imports included.
        alive = time.time() - psutil.Process().create_time()
        seconds = self._seconds + time.monotonic() - self._started
        self.tag({"seconds": f"{seconds:.1f}", "process_seconds": f"{alive:.1f}"})
        self.client.set_terminated(self.run_id, status=status)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names; lists stay values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _now() -> int:
    return int(time.time() * 1000)


def log_cached(root: Path, stages: Iterable[str]) -> dict[str, str | None]:
    """For stages that DVC found unchanged: a run under the parent with what the run that made them has of metrics and
    parameters; that run is named in tag `cached_from`.

    Returns stage -> run id of the maker, or None where the database does not know it (then the new run has neither).
    """
    client = connect(root)
    experiment = experiment_id(client, root)
    makers: dict[str, str | None] = {}
    for identity in identify(root, *stages):
        maker = _maker(client, experiment, identity)
        makers[identity.stage] = maker.info.run_id if maker else None
        tags = {"stage": identity.stage, "fingerprint": identity.fingerprint, "cached": "true"}
        if parent := os.environ.get(PARENT):
            tags["mlflow.parentRunId"] = parent
        if maker:
            tags["cached_from"] = maker.info.run_id
        run = client.create_run(experiment, run_name=f"{identity.stage} (cached)", tags=tags)
        if maker:
            latest = [Metric(key, value, _now(), 0) for key, value in maker.data.metrics.items()]
            client.log_batch(run.info.run_id, metrics=latest[:BATCH])
            _log_params(client, run.info.run_id, maker.data.params)
        client.set_terminated(run.info.run_id, status="FINISHED")
    return makers


def _log_params(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    items = [Param(name, str(value)) for name, value in values.items()]
    for first in range(0, len(items), SMALL_BATCH):
        client.log_batch(run_id, params=items[first : first + SMALL_BATCH])


def _maker(client: MlflowClient, experiment: str, identity: Identity) -> Run | None:
    found = client.search_runs(
        [experiment],
        f"tags.stage = '{identity.stage}' and tags.fingerprint = '{identity.fingerprint}' and attributes.status = 'FINISHED'",
        max_results=50,
        order_by=["attributes.start_time DESC"],
    )
    return next((run for run in found if "cached" not in run.data.tags), None)


def metrics_frame(
    root: Path | None = None, *, stage: str | None = None, fingerprints: Iterable[str] | None = None
) -> pd.DataFrame:
    """Metrics of all stages and runs: one row a run, metric and step.

    Columns: stage (`mob_kd-M`; `teacher-vae` for an earlier phase of a stage), fingerprint, run_id, parent_run_id, status, cached_from,
    start_time (ms), metric (`train/loss`), step, value. `stage` and `fingerprints` keep the rows of these only.
    """
    root = root or Path.cwd()
    client = connect(root)
    wanted = None if fingerprints is None else set(fingerprints)
    rows: list[dict[str, Any]] = []
    for run in _runs(client, experiment_id(client, root)):
        tags = run.data.tags
        if (
            "stage" not in tags
            or (stage and tags["stage"] != stage)
            or (wanted is not None and tags.get("fingerprint") not in wanted)
        ):
            continue
        name = tags["stage"].replace("@", "-")
        base = {
            "fingerprint": tags.get("fingerprint"),
            "run_id": run.info.run_id,
            "parent_run_id": tags.get("mlflow.parentRunId"),
            "status": run.info.status,
            "cached_from": tags.get("cached_from"),
            "start_time": run.info.start_time,
        }
        for metric in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, metric)
            # `vae/train/loss` is of an earlier phase of the stage.
            phase, _, rest = metric.partition("/")
            shown = (f"{name}-{phase}", rest) if "/" in rest else (name, metric)
            rows.extend(
                base | {"stage": shown[0], "metric": shown[1], "step": m.step, "value": m.value} for m in history
            )
    columns = [
        "stage",
        "fingerprint",
        "run_id",
        "parent_run_id",
        "status",
        "cached_from",
        "start_time",
        "metric",
        "step",
        "value",
    ]
    return pd.DataFrame(rows, columns=columns)


def _runs(client: MlflowClient, experiment: str, query: str = "") -> Iterable[Run]:
    token = None
    while True:
        page = client.search_runs([experiment], query, ViewType.ACTIVE_ONLY, max_results=BATCH, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def main(arguments: list[str]) -> int:
    """`cached STAGE...`"""
    if len(arguments) < 2 or arguments[0] != "cached":
        print("usage: python -m tasks.tracking cached STAGE [STAGE...]", file=sys.stderr)
        return 2
    try:
        for stage, maker in log_cached(Path.cwd(), arguments[1:]).items():
            print(f"{stage}: cached, made by run {maker or 'unknown to this database'}")
    except Dense2MoEError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
