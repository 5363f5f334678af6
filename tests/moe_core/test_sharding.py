"""Sharded models on two real workers that choose different blocks: gradients, what each holds, what is written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_core import sharding
from moe_core.distill import KDStep
from moe_core.errors import CheckpointError
from moe_core.mob import MoBGroup
from moe_core.transformer import FluxMoETransformer2DModel
from tests.moe_core.tiny_flux import TRAINED, make_batch, make_stage, make_student, make_teacher

F64 = torch.float64
ROOT = Path(sharding.__file__).parents[1]

WORKER = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from moe_core import sharding
from moe_core.capture import record
from moe_core.distill import KDStep, predict
from moe_core.dtensors import full
from tests.moe_core.tiny_flux import TRAINED, make_batch, make_stage

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
cpu = torch.device("cpu")
dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))

def make(kind, dtype, **stage):
    student = sharding.load_flux(folder / kind, mesh, cpu, dtype, TRAINED[kind])
    student.set_expert_backend("loop")
    return KDStep(student, sharding.load_flux(folder / "teacher", mesh, cpu, dtype), make_stage(kind, **stage))

results = {}
batch = make_batch(8, dtype=torch.float64)
batch = batch[:4] if rank == 0 else batch[4:]
for kind in ("moe", "mob"):
    for checkpointing in (False, True):
        step = make(kind, torch.float64, gradient_checkpointing=checkpointing)
        with record(step.student) as chosen, torch.no_grad():
            predict(step.student, batch)
        loss = step(batch)["loss"]
        loss.backward()
        gradients = {n: full(p.grad).norm().item() for n, p in step.named_parameters() if p.grad is not None}
        results[f"{kind}-{checkpointing}"] = {
            "loss": loss.item(),
            "gradients": gradients,
            "blocks": {n: sorted(set(r.indices_Bk.flatten().tolist())) for n, r in chosen.block_routings.items()},
            "bytes": sum(p.to_local().nbytes for p in step.student.parameters()),
            "placements": {n: p.placements[0].dim for n, p in step.student.named_parameters()},
        }
    written = folder / f"written-{kind}"
    if rank == 0:
        written.mkdir()
    sharding.save_flux(step.student, written, None, writes=rank == 0)

step = make("mob", torch.bfloat16)
with torch.autocast("cpu", torch.bfloat16):
    loss = step(batch.to(torch.float32))["loss"]
loss.backward()
results["bf16"] = {
    "loss": loss.item(),
    "kept": {n: str(p.dtype) for n, p in step.student.named_parameters()},
    "teacher": sorted({str(p.dtype) for p in step.teacher.parameters()}),
    "gradients": sorted({str(p.grad.dtype) for p in step.parameters() if p.grad is not None}),
    "finite": all(bool(full(p.grad).isfinite().all()) for p in step.parameters() if p.grad is not None),
}
print(json.dumps(results))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and two students as folders."""
    folder = tmp_path_factory.mktemp("sharding")
    make_teacher(dtype=F64).save_pretrained(folder / "teacher")
    for kind in ("moe", "mob"):
        make_student(kind, dtype=F64).save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def workers(folder: Path) -> list[dict[str, Any]]:
    """What two workers saw, each with half of the batch."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )
        for rank in range(2)
    ]
    return [json.loads(worker.communicate(timeout=240)[0]) for worker in started]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["moe", "mob"])
def test_two_workers_have_the_gradients_of_one(workers: list[dict[str, Any]], kind: str, checkpointing: bool) -> None:
    one, two = (worker[f"{kind}-{checkpointing}"] for worker in workers)
    whole = KDStep(make_student(kind, dtype=F64), make_teacher(dtype=F64), make_stage(kind))
    loss = whole(make_batch(8, dtype=F64))["loss"]
    loss.backward()
    assert (one["loss"] + two["loss"]) / 2 == pytest.approx(loss.item(), rel=1e-12)
    assert one["gradients"] == two["gradients"]
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            assert one["gradients"][name] == pytest.approx(parameter.grad.norm().item(), rel=1e-9, abs=1e-14), name


def test_the_workers_chose_different_blocks(workers: list[dict[str, Any]]) -> None:
    blocks = [worker["mob-False"]["blocks"] for worker in workers]
    assert any(blocks[0][group] != blocks[1][group] for group in blocks[0])


def test_each_holds_half_and_experts_are_cut_along_their_width(workers: list[dict[str, Any]]) -> None:
    held = [worker["moe-False"]["bytes"] for worker in workers]
    assert min(held) > 0.49 * sum(held)
    dims = workers[0]["moe-False"]["placements"]
    assert {dims[name] for name in dims if name.endswith(("w1_EFD", "b1_EF"))} == {1}
    assert {dims[name] for name in dims if name.endswith("w2_EDF")} == {2}


@pytest.mark.parametrize("kind", ["moe", "mob"])
def test_what_two_workers_write_is_what_diffusers_writes(
    folder: Path, workers: list[dict[str, Any]], kind: str
) -> None:
    names = sorted(path.name for path in (folder / kind).iterdir())
    assert sorted(path.name for path in (folder / f"written-{kind}").iterdir()) == names
    for name in names:
        one, two = (hashlib.sha256((folder / part / name).read_bytes()).digest() for part in (kind, f"written-{kind}"))
        assert one == two, name


def test_masters_are_fp32_and_the_rest_is_bf16(workers: list[dict[str, Any]]) -> None:
    found = workers[0]["bf16"]
    student = make_student("mob")
    student.set_trainable(TRAINED["mob"])
    for name, parameter in student.named_parameters():
        wide = parameter.requires_grad or "router" in name
        assert found["kept"][name] == ("torch.float32" if wide else "torch.bfloat16"), name
    assert found["teacher"] == ["torch.bfloat16"]
    assert found["gradients"] == ["torch.float32"]
    assert found["finite"]
    mean = sum(worker["bf16"]["loss"] for worker in workers) / 2
    exact = sum(worker["mob-False"]["loss"] for worker in workers) / 2
    assert mean == pytest.approx(exact, rel=0.05)


def test_a_large_model_is_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student("mob")
    monkeypatch.setattr(sharding, "FILE_BYTES", 20_000)
    sharding.save_flux(student, tmp_path, torch.bfloat16, writes=True)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 20_000 for file in files)
    again = FluxMoETransformer2DModel.from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name).to(torch.bfloat16).float()), name
    sharding.save_flux(again, tmp_path, None, writes=True)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_a_folder_that_is_no_flux_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match="_class_name 'UNet2DModel'; it must be one of"):
        sharding.load_flux(tmp_path, None, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]


def test_blocks_called_on_nothing_change_nothing_and_have_gradients_of_zero() -> None:
    batch = make_batch(1, dtype=F64)
    results = []
    for every_block in (False, True):
        step = KDStep(make_student("mob", dtype=F64), make_teacher(dtype=F64), make_stage("mob"))
        for module in step.modules():
            if isinstance(module, MoBGroup):
                module.every_block = every_block
        parts = step(batch)
        parts["loss"].backward()
        results.append((parts["loss"].item(), {n: p.grad for n, p in step.named_parameters() if p.requires_grad}))
    (loss, without), (same, gradients) = results
    assert same == loss
    missing = [name for name, gradient in without.items() if gradient is None]
    assert missing
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.equal(gradient, torch.zeros_like(gradient) if name in missing else without[name]), name
