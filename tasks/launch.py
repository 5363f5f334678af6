"""From the driver: calls a function in every process of a Ray Train worker group, and brings its errors back."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

import ray.train.torch
import ray.util
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from moe_core.config import ComputeConfig
from moe_core.errors import ConfigError, Dense2MoEError
from tasks.phase import call, failure_in, leave_failure, take_failure
from tasks.ray_train import Trainer


def workers(entry: str, arguments: dict[str, Any], folder: Path, compute: ComputeConfig) -> None:
    """Calls `entry` (`package.module:function`) with these arguments, a device and a thread count in every worker of a Ray Train group.

    - A crashed worker is restarted by Ray, at most `compute.max_failures` times.
    - `folder` takes Ray's and our notes of the run; it must be seen by all workers.

    Raises what a worker raised of this project's errors, or Ray's TrainingFailedError.
    """
    take_failure(folder)
    config: dict[str, Any] = {
        "entry": entry,
        "arguments": arguments | {"threads": compute.cpus_per_worker},
        "folder": folder,
    }
    if compute.num_workers == 0:
        call(entry)(device=torch.device("cpu"), **config["arguments"])
        return
    resources = {"CPU": float(compute.cpus_per_worker)} | ({"GPU": 1.0} if compute.use_gpu else {})
    # Ray Train keeps notes of a run for resuming; ours do that, so each of Ray's runs has a name that never comes again.
    storage = folder / "ray"
    seen = folder / f".seen-by-{uuid.uuid4().hex}"
    seen.touch()
    trainer = Trainer(
        _work,
        train_loop_config=config | {"seen": seen},
        scaling_config=ScalingConfig(
            num_workers=compute.num_workers, use_gpu=compute.use_gpu, resources_per_worker=resources
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if compute.use_gpu else "gloo"),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=compute.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if failure := take_failure(folder):
            raise failure from error
        raise
    finally:
        shutil.rmtree(storage, ignore_errors=True)
        seen.unlink(missing_ok=True)


def _work(config: dict[str, Any]) -> None:
    """What Ray Train calls in every worker process. Ray wraps exceptions: ours is left in a file for the driver."""
    if not config["seen"].exists():
        # Before anything is written: its folder here would be another one.
        raise ConfigError(
            f"node {ray.util.get_node_ip_address()} does not see {config['folder']}, where the stage's state is;"
            " the checkout must be on storage that all nodes share, under the same path"
        )
    if failure := failure_in(config["folder"]):
        # Ray starts the group again after any error. This one would only come again, at the end of as many steps.
        raise failure
    try:
        call(config["entry"])(device=ray.train.torch.get_device(), **config["arguments"])
    except Dense2MoEError as error:
        leave_failure(config["folder"], error)
        raise
