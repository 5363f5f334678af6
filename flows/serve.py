"""The process that serves the flow to Prefect's UI: `python -m flows.serve`, started by `flows.services`."""

from __future__ import annotations

from prefect import serve
from prefect.deployments.runner import EntrypointType

from flows.pipeline import pipeline

DEPLOYMENT = "pipeline"

RUNS_AT_ONCE = 4
"""Flow runs of this process side by side; more wait in Prefect as Scheduled."""


def main() -> None:
    """Publishes the deployment and runs what is triggered, until it is ended."""
    deployment = pipeline.to_deployment(
        DEPLOYMENT,
        description=(pipeline.__doc__ or "").split("Args:")[0].strip(),
        # By module, so that a run's process imports the package as this one did, wherever it is started.
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    serve(deployment, limit=RUNS_AT_ONCE)


if __name__ == "__main__":
    main()
