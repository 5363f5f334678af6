"""MoB groups sharded and compiled, on two real workers that choose different blocks: loss and gradients as uncompiled, and no new graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from moe_core import sharding
from moe_core.mob import MoBGroup
from tests.moe_core.tiny_flux import make_student, make_teacher

ROOT = Path(sharding.__file__).parents[1]
SIZES = {"num_layers": 3, "num_single_layers": 2}
GROUPS = {"double_groups": [[1, 2]], "single_groups": [[0, 1]]}

WORKER = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from moe_core import sharding
from moe_core.capture import record
from moe_core.compiling import compile_blocks
from moe_core.distill import KDStep
from moe_core.dtensors import full
from tests.moe_core.tiny_flux import make_batch, make_stage

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
cpu = torch.device("cpu")
dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))

# All is trained: in the first group after frozen blocks the input has no gradient, and a block there would be compiled twice.
def steps(compiled):
    student = sharding.load_flux(folder / "mob", mesh, cpu, torch.float32, ("all",))
    student.set_expert_backend("by_shape")
    step = KDStep(student, sharding.load_flux(folder / "teacher", mesh, cpu, torch.float32), make_stage("mob", train=("all",)))
    if compiled:
        compile_blocks(student, backend="aot_eager")
        compile_blocks(step.teacher, backend="aot_eager")
    counters.clear()
    for number in range(6):
        with record(student, []) as chosen:
            parts = step(make_batch(1, seed=10 * number + rank))
        parts["loss"].backward()
        yield {
            "loss": parts["loss"].item(),
            "gradients": {n: full(p.grad).clone() for n, p in step.named_parameters() if p.grad is not None},
            "blocks": {n: r.indices_Bk.item() for n, r in chosen.block_routings.items()},
            "graphs": counters["stats"]["unique_graphs"],
        }
        step.zero_grad(set_to_none=True)

rows = []
for plain, compiled in zip(list(steps(False)), steps(True)):
    wanted, given = plain.pop("gradients"), compiled.pop("gradients")
    off = {n: ((given[n] - g).norm() / g.norm().clamp_min(1e-12)).item() for n, g in wanted.items()} if wanted.keys() == given.keys() else None
    rows.append({"plain": plain, "compiled": compiled, "off": off})
print(json.dumps(rows))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What two workers saw in six steps of one sample each, plain and compiled."""
    folder = tmp_path_factory.mktemp("sharded-compile")
    make_teacher(**SIZES).save_pretrained(folder / "teacher")
    student = make_student("mob", mob=GROUPS, **SIZES)
    for module in student.modules():
        if isinstance(module, MoBGroup):
            # So that samples choose different blocks.
            nn.init.normal_(module.router.w_x.weight, std=10)
    student.save_pretrained(folder / "mob")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )
        for rank in range(2)
    ]
    return [json.loads(worker.communicate(timeout=500)[0]) for worker in started]


@pytest.mark.slow
def test_the_same_loss_and_gradients(workers: list[list[dict[str, Any]]]) -> None:
    for rows in workers:
        for row in rows:
            assert row["compiled"]["loss"] == pytest.approx(row["plain"]["loss"], rel=1e-5)
            assert row["compiled"]["blocks"] == row["plain"]["blocks"]
            assert row["off"], "other parameters have gradients"
            assert max(row["off"].values()) < 1e-4, row["off"]


@pytest.mark.slow
def test_other_blocks_make_no_other_graphs(workers: list[list[dict[str, Any]]]) -> None:
    assert not any(row["plain"]["graphs"] for rows in workers for row in rows)
    for rows in workers:
        graphs = [row["compiled"]["graphs"] for row in rows]
        assert graphs[0] > 0
        assert len(set(graphs)) == 1, f"graphs after each step: {graphs}"
        assert len({tuple(row["compiled"]["blocks"].items()) for row in rows}) > 1
    # One worker then calls a block on nothing that the other one computes.
    assert any(one["compiled"]["blocks"] != two["compiled"]["blocks"] for one, two in zip(*workers))
