"""A distillation small enough for seconds, on one process or several, sharded or not: what the tests of sharded training run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_core import sampling, sharding
from moe_core.config import OptimizerConfig
from moe_core.distill import KDBatch, KDStep, validate_kd
from moe_core.memory import LiveMemory, parameters_and_buffers
from tasks import training
from tasks.phase import Phase
from tasks.worker import Worker
from tests.moe_core.tiny_flux import TRAINED, make_batch, make_stage, make_student, make_teacher

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def write_models(folder: Path, dtype: torch.dtype = torch.float64, **sizes: Any) -> Path:
    """A teacher and a student of each kind, as folders."""
    make_teacher(dtype=dtype, **sizes).save_pretrained(folder / "teacher")
    for kind in TRAINED:
        make_student(kind, dtype=dtype, **sizes).save_pretrained(folder / kind)
    return folder


def samples(positions: Sequence[int], dtype: torch.dtype) -> KDBatch:
    """Each a function of its position alone."""
    rows = [make_batch(1, seed=position, dtype=dtype) for position in positions]
    joined = {
        name: torch.cat([getattr(row, name) for row in rows])
        for name in ("latents", "noise", "sigma", "prompt_embeds", "pooled", "guidance")
    }
    return KDBatch(**joined, img_ids=rows[0].img_ids, txt_ids=rows[0].txt_ids)


class Distillation:
    """The trainee. `stop_at`: the last rank kills itself when it asks for that position or a later one, once; `mark` remembers it."""

    def __init__(
        self, folder: Path, kind: str, sharded: bool, dtype: torch.dtype, stop_at: int | None, mark: str | None
    ) -> None:
        self.dtype, self.stop_at, self.mark = dtype, stop_at, mark
        self.worker = Worker.here(CPU)
        if sharded:
            mesh = init_device_mesh("cpu", (self.worker.size,))
            student = sharding.load_flux(folder / kind, mesh, CPU, dtype, TRAINED[kind])
            teacher = sharding.load_flux(folder / "teacher", mesh, CPU, dtype)
        else:
            student, teacher = (sampling.load_transformer(folder / name, dtype) for name in (kind, "teacher"))
        student.set_expert_backend("loop")
        self.student = student
        stage = make_stage(kind, lambda_balance=0.1, gradient_checkpointing=sharded)
        self.module = KDStep(student, teacher, stage)
        # Of some weights, so that what is said of sharded training is said of rates too.
        self.rates = {
            f"student.{name}": 0.5 for name, _ in student.named_parameters() if name.endswith("norm.linear.weight")
        }

    def batch(self, positions: Sequence[int]) -> KDBatch:
        last = self.worker.rank == self.worker.size - 1
        if self.mark and self.stop_at is not None and last and positions[0] >= self.stop_at:
            mark = Path(self.mark)
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return samples(positions, self.dtype)

    def validate(self) -> dict[str, float]:
        return validate_kd(self.student, self.module.teacher, [samples(range(4), self.dtype)])

    def save(self, folder: Path) -> None:
        sharding.save_flux(self.student, folder, None, writes=self.worker.rank == 0)


def build(
    device: torch.device,
    folder: str,
    kind: str,
    sharded: bool,
    dtype: str = "float64",
    stop_at: int | None = None,
    mark: str | None = None,
) -> Distillation:
    """What a phase names."""
    return Distillation(Path(folder), kind, sharded, getattr(torch, dtype), stop_at, mark)


def phase(models: Path, kind: str, sharded: bool, steps: int = 50, name: str = "train", **more: Any) -> Phase:
    """A training phase of it; further arguments are `build`'s and the optimizer's."""
    arguments = {key: more.pop(key) for key in ("dtype", "stop_at", "mark") if key in more}
    values = {"steps": steps, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.01, **more}
    arguments |= {"folder": str(models), "kind": kind, "sharded": sharded}
    return Phase(name, "tests.tasks.sharded_kd:build", arguments, OptimizerConfig(**values), 25, 5, 5)


def train(jobs: Sequence[Phase], folder: Path, workers: int, counted: bool = False) -> None:
    """Runs the loop in so many processes of their own, on gloo; `counted`: and leaves what `_count_second_steps` found."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = [{**vars(job), "optimizer": job.optimizer.model_dump()} for job in jobs]
    (folder / "asked.json").write_text(json.dumps(asked))
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.tasks.sharded_kd",
                str(rank),
                str(workers),
                str(store),
                str(folder),
                str(int(counted)),
            ],
            cwd=ROOT,
            env=environment,
        )
        for rank in range(workers)
    ]
    assert [process.wait(400) for process in started] == [0] * workers


def peaks(folder: Path, workers: int) -> list[dict[str, int]]:
    """What `train` counted: of each process, phase -> most bytes of tensors during the second step."""
    return [json.loads((folder / f"memory-{rank}.json").read_text()) for rank in range(workers)]


@contextmanager
def _count_second_steps(found: dict[str, int]) -> Iterator[None]:
    """Fills `found` with each phase's most bytes in its second step, which begins with the optimizer's state."""
    resize, step = torch.UntypedStorage.resize_, training._Loop._step

    def counted(loop: Any, trainee: Any, module: Any, optim: Any, parameters: Any, number: int) -> None:
        arguments = (loop, trainee, module, optim, parameters, number)
        if number != 1:
            return step(*arguments)
        memory, encoders = LiveMemory(), (trainee.pipeline.text_encoder, trainee.pipeline.text_encoder_2)
        for part in (trainee.student, trainee.module.teacher, *encoders):
            memory.watch(parameters_and_buffers(part), "weights")
        memory.watch([t for s in optim.state.values() for t in s.values() if isinstance(t, torch.Tensor)], "optimizer")

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            memory.resized(storage)

        with mock.patch.object(torch.UntypedStorage, "resize_", resized), memory:
            step(*arguments)
        found[loop.phase.name] = memory.peak.total
        return None

    with mock.patch.object(training._Loop, "_step", counted):
        yield


def main(rank: int, workers: int, store: Path, folder: Path, counted: bool) -> None:
    """One of the processes."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    asked = json.loads((folder / "asked.json").read_text())
    jobs = [Phase(**{**job, "optimizer": OptimizerConfig(**job["optimizer"])}) for job in asked]
    found: dict[str, int] = {}
    with _count_second_steps(found) if counted else nullcontext():
        training.run(jobs, folder, CPU, 1, 0)
    if counted:
        (folder / f"memory-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5] == "1")
