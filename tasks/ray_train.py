"""Ray Train with its controller in the stage's own process.

Ray Train runs its controller in an actor, so that a training outlives who asked for it. A stage does not: its driver waits
for the training, and what it left is found again by the next run (`tasks.resume`). The actor would cost each stage four to
five seconds on two cores, in which a process starts and loads torch and Ray Train once more.

The classes here use what Ray Train does not promise to keep: another Ray than that of requirements.lock may need them changed.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
import ray.train.torch
from ray.train import Result
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup


class Trainer(ray.train.torch.TorchTrainer):
    """A TorchTrainer whose controller runs here, and without two helpers, each an actor in a process of its own.

    - The watcher that frees the workers' placement group when the controller dies: it asks Ray's dashboard, which a
      private Ray and a run's own do not have, and then holds up the end of every training by its timeout of 12 s. Here a
      dead controller is a dead stage, and with the stage's job go its placement groups.
    - The manager of Ray datasets: the workers read their shards themselves. Starting it takes three seconds of two cores.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made: list[Any] = super()._create_default_callbacks()
        left_out = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in made if not isinstance(callback, left_out)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        arguments["scaling_policy"] = _Policy(self.scaling_config)
        controller = _Controller(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()


class _Policy(FixedScalingPolicy):
    """A fixed number of workers, and no coordinator.

    That is an actor for Ray's autoscaler, which learns from the workers' placement group what it needs. It outlives the stage, and the
    workers wait until it has loaded Ray's datasets: two seconds of two cores.
    """

    def _send_resource_request(self) -> None:
        """Asks nobody."""

    def _maybe_send_resource_request(self) -> None:
        """Asks nobody."""

    def _cancel_resource_request(self) -> None:
        """Nothing was asked for."""


class _Group(WorkerGroup):
    """Workers that know no controller: they would ask it for reported checkpoints, and report none."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        """The job's as it is: on a cluster of others `tasks.cluster` has put Ray Train's variables there, elsewhere Ray's processes were started
        with them. With one of its own a worker could not take a process that stands already."""
        return custom_runtime_env

    def _init_train_context_on_workers(
        self, workers: list[Worker], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        begun = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[i] for name, values in train_context_args.items()},
            )
            for i, worker in enumerate(workers)
        ]
        ray.get(begun)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Group
