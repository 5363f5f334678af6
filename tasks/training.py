"""The training loop, as it runs in every worker.

- Step, sample positions and learning rate are functions of the step number; a resumed run differs in nothing from one never killed.
- The global batch is cut into micro batches, and each of those into equal consecutive parts, one a rank; gradients and logged
  values are means over both. So what is computed does not depend on the number of workers.
- A trainee whose weights are sharded is stepped as it is; another one is wrapped in DDP where there are more workers than one.
- Rank 0 writes `metrics.jsonl` (every step's losses) and the checkpoints; whoever started the workers reads them there.
- Everything lies in the resume folder of the stage: `<phase>/step-*`, `<phase>/metrics.jsonl`, `<phase>/product/`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_core import dtensors
from moe_core.errors import ConfigError, TrainingError
from moe_core.training import Trainee
from tasks import checkpoints, optimizer, outs
from tasks.phase import METRICS, NOTES, PRODUCT, Phase, call
from tasks.worker import Worker


def run(phases: list[Phase], folder: Path, device: torch.device, threads: int, seed: int) -> None:
    """Trains phase after phase; one whose product stands is passed over. Called in every worker."""
    worker = Worker.here(device)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Determinism would also fill every new tensor; nothing here reads memory that it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with _alone(folder, worker):
        for phase in phases:
            if not (folder / phase.name / PRODUCT).exists():
                _Loop(phase, folder / phase.name, worker, seed).run()
            worker.barrier()


@contextlib.contextmanager
def _alone(folder: Path, worker: Worker) -> Iterator[None]:
    """Rank 0 waits until the rank 0 of a killed driver, which may outlive it by seconds, no longer writes here."""
    with (folder / "worker.lock").open("a") as lock:
        if worker.rank == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
        worker.barrier()
        yield


@dataclass
class _Loop:
    """One phase in one worker."""

    phase: Phase
    folder: Path
    worker: Worker
    seed: int
    pending: list[tuple[int, dict[str, Tensor], float]] = field(default_factory=list)

    def run(self) -> None:
        config = self.phase.optimizer
        if config.at_once % self.worker.size:
            key = "batch_size" if config.micro_batch is None else "micro_batch"
            raise ConfigError(
                f"{self.phase.name}: {key} is {config.at_once}; it must be a multiple of the"
                f" {self.worker.size} workers (compute.num_workers)"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        # What a builder draws without a seed of its own is the same in every worker and every run.
        torch.manual_seed(self.seed)
        trainee: Trainee = call(self.phase.build)(device=self.worker.device, **self.phase.arguments)
        trainee.module.train()
        parameters = checkpoints.trained(trainee.module)
        if not parameters:
            raise ConfigError(f"{self.phase.name}: no parameter is trained; check the parts that `train` lists")
        optim = optimizer.build(config, trainee.module, trainee.rates)
        average = optimizer.Average(config.ema_decay, parameters) if config.ema_decay is not None else None
        step = self._restore(trainee.module, optim, average)
        self._truncate(step)
        module: nn.Module = trainee.module
        if self.worker.size > 1 and not dtensors.is_sharded(module):
            # A block that no sample of this rank chose has no gradient here.
            module = DistributedDataParallel(trainee.module, find_unused_parameters=True)
        if step == 0:
            self._validate(trainee, average, 0)
        while step < config.steps:
            self._step(trainee, module, optim, list(parameters.values()), step)
            if average is not None:
                average.update(step)
            step += 1
            last = step == config.steps
            if step % self.phase.log_every == 0 or last:
                self._flush()
            if step % self.phase.validate_every == 0 or last:
                self._flush()
                self._validate(trainee, average, step)
            if step % self.phase.checkpoint_every == 0 or last:
                self._flush()
                checkpoints.save(self.folder, step, trainee.module, optim, average, self.worker)
        with average.in_place() if average is not None else contextlib.nullcontext():
            if self.worker.rank == 0:
                with outs.folder(self.folder / PRODUCT) as product:
                    trainee.save(product)
            elif dtensors.is_sharded(trainee.module):
                # Takes part in gathering what rank 0 writes.
                trainee.save(self.folder / PRODUCT)

    def _step(
        self,
        trainee: Trainee,
        module: nn.Module,
        optim: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        step: int,
    ) -> None:
        config = self.phase.optimizer
        started = time.monotonic()
        # Nothing should draw from the global generator; if something does, it draws by step and rank.
        torch.manual_seed(self.seed + step * self.worker.size + self.worker.rank)
        optimizer.set_rate(optim, optimizer.learning_rate(config, step))
        optim.zero_grad(set_to_none=True)
        found: list[dict[str, Tensor]] = []
        for positions in self._micro_batches(step):
            batch = trainee.batch(self.worker.part(positions))
            with self._summing(module, last=positions.stop == (step + 1) * config.batch_size):
                with self._autocast():
                    losses = module(batch)
                (losses["loss"] * (config.at_once / config.batch_size)).backward()
            found.append({name: value.detach() for name, value in losses.items()})
        dtensors.drop_zero_gradients(parameters)
        norm = dtensors.full(nn.utils.clip_grad_norm_(parameters, config.grad_clip))
        optim.step()
        record = {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}
        self.pending.append((step + 1, record | {"grad_norm": norm.detach()}, time.monotonic() - started))

    def _micro_batches(self, step: int) -> list[range]:
        """The global sample positions of a step, as they go through the model together."""
        size, at_once = self.phase.optimizer.batch_size, self.phase.optimizer.at_once
        return [range(first, first + at_once) for first in range(step * size, (step + 1) * size, at_once)]

    def _summing(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """DDP sums gradients over ranks with the last micro batch. A sharded model does with each: unsummed ones have no shards."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.worker.device.type, torch.bfloat16, enabled=self.phase.optimizer.precision == "bf16")

    def _flush(self) -> None:
        """Writes the losses of the steps since the last flush: means over ranks.

        Raises TrainingError at a loss or a gradient that is no number: the weights after such a step are none either.
        """
        if not self.pending:
            return
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack([record[name].double() for name in names]) for _, record, _ in self.pending])
        rows = self.worker.mean(values).tolist()
        records = [
            {"split": "train", "step": step, **dict(zip(names, row, strict=True)), "seconds": round(seconds, 4)}
            for (step, _, seconds), row in zip(self.pending, rows, strict=True)
        ]
        self.pending.clear()
        self._write(records)
        for record in records:
            for name, words in (("loss", "loss"), ("grad_norm", "norm of the gradients")):
                self._require_number(words, record[name], record["step"])

    def _validate(self, trainee: Trainee, average: optimizer.Average | None, step: int) -> None:
        # On every rank, so that what the module gathers over ranks is there; the result is the same on each.
        started = time.monotonic()
        with average.in_place() if average is not None else contextlib.nullcontext(), self._autocast():
            metrics = trainee.validate()
        seconds = round(time.monotonic() - started, 4)
        self._write([{"split": "validation", "step": step, **metrics, "seconds": seconds}])
        for name, value in metrics.items():
            self._require_number(f"validation's {name}", value, step)

    def _require_number(self, words: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.phase.name}: the {words} is {value} at step {step}; a lower learning_rate"
                f" (now {self.phase.optimizer.learning_rate:g}) or grad_clip may help"
            )

    def _write(self, records: list[dict[str, Any]]) -> None:
        if self.worker.rank == 0:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                # Before a checkpoint stands, the metrics up to it do.
                os.fsync(file.fileno())

    def _restore(self, module: nn.Module, optim: torch.optim.Optimizer, average: optimizer.Average | None) -> int:
        """Loads the newest whole checkpoint, the same one on every rank; returns its step, 0 without one."""
        found, broken = checkpoints.newest(self.folder, self.worker)
        if self.worker.rank == 0:
            lines = [f"passed over: {problem}" for problem in broken]
            lines += [f"{self.phase.name} goes on from {found}"] if found else []
            with (self.folder.parent / NOTES).open("a", encoding="utf-8") as notes:
                notes.writelines(line + "\n" for line in lines)
        if found is None:
            return 0
        checkpoints.load(found, module, optim, average)
        return checkpoints.check(found, self.worker)

    def _truncate(self, step: int) -> None:
        """Drops the records after `step`, and a line cut short by a kill: they will be written again."""
        path = self.folder / METRICS
        if self.worker.rank != 0 or not path.exists():
            return
        kept = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        # A step without a checkpoint starts at the very beginning, validation of step 0 included.
        outs.write_text(path, "".join(line + "\n" for line in kept) if step else "")
