"""Prefect flows over the stages of `dvc.yaml`."""

import gc

# As in `tasks`: Prefect, MLflow and DVC load a fifth faster.
gc.set_threshold(50_000, 20, 100)
