from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_core import losses
from moe_core.capture import record
from moe_core.distill import KDBatch, KDStep, feature_pairs, predict, validate_kd
from tests.moe_core.tiny_flux import TRAINED, make_batch, make_stage, make_student, make_teacher

F64 = torch.float64
ROOT = Path(losses.__file__).parents[1]


def make_step(kind: str, dtype: torch.dtype = torch.float32, **stage) -> KDStep:
    return KDStep(make_student(kind, dtype=dtype), make_teacher(dtype=dtype), make_stage(kind, **stage))


def gradients(step: KDStep) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}


def test_flow_matching_path_and_target():
    batch = make_batch(3)
    torch.testing.assert_close(batch.noisy, batch.latents + batch.sigma.view(-1, 1, 1) * batch.target)
    assert len(batch[1:]) == 2
    assert torch.equal(batch[1:].pooled, batch.pooled[1:])
    assert torch.equal(batch[1:].img_ids, batch.img_ids)
    without_guidance = KDBatch(**{**vars(batch), "guidance": None})
    assert without_guidance.to(F64)[:1].guidance is None


@pytest.mark.parametrize("kind", TRAINED)
def test_loss_is_equation_10_sample_by_sample(kind: str):
    """Every term again, from the models run on one sample at a time."""
    step = make_step(kind, F64, lambda_feature=0.7, lambda_balance=0.3)
    batch = make_batch(4, dtype=F64)
    parts = step(batch)
    pairs = feature_pairs(step.student)
    distill, feature, unweighted, moe_balances, choices = [], [], [], [], []
    with torch.no_grad():
        for i in range(len(batch)):
            one = batch[i : i + 1]
            with record(step.teacher) as expected, record(step.student) as actual:
                difference = predict(step.student, one) - predict(step.teacher, one)
            distill.append(difference.square().mean())
            errors, norms = [], []
            for student, teacher in pairs:
                given = torch.cat([stream.flatten() for stream in actual.features[student]])
                wanted = torch.cat([stream.flatten() for stream in expected.features[teacher]])
                errors.append((given - wanted).square().mean())
                norms.append(wanted.norm())
            weights = [distill[-1] / e * sum(norms) / (len(norms) * n) if e > 0 else 0 for e, n in zip(errors, norms)]
            feature.append(sum(w * e for w, e in zip(weights, errors)))
            unweighted.append(sum(errors))
            moe_balances.append(
                sum(
                    losses.moe_balance(r.probs_TE, r.indices_TK).item()
                    for name, r in actual.routings.items()
                    if kind == "moe" or name.startswith(("transformer_blocks.1.", "single_transformer_blocks.0."))
                )
            )
            choices.append(actual.block_routings)
    balance = sum(moe_balances) / len(moe_balances)
    for name in choices[0]:
        probs, indices = (torch.cat([getattr(c[name], part) for c in choices]) for part in ("probs_Bm", "indices_Bk"))
        balance += losses.mob_balance(probs, indices).item()
    expected_parts = {
        "distill": torch.stack(distill).mean().item(),
        "feature": torch.stack(feature).mean().item(),
        "feature_unweighted": torch.stack(unweighted).mean().item(),
        "balance": balance,
    }
    for name, value in expected_parts.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-9), name
    loss = expected_parts["distill"] + 0.7 * expected_parts["feature"] + 0.3 * balance
    assert parts["loss"].item() == pytest.approx(loss, rel=1e-9)
    assert [name for name, value in parts.items() if value.requires_grad] == ["loss"]
    assert ("balance_moe" in parts) == (kind != "shared")
    assert ("balance_mob" in parts) == (kind == "mob")


def test_features_are_compared_at_group_ends_where_there_are_groups():
    assert len(feature_pairs(make_student("moe"))) == 7
    assert feature_pairs(make_student("mob")) == [
        ("transformer_blocks.1", "transformer_blocks.3"),
        ("single_transformer_blocks.0", "single_transformer_blocks.1"),
    ]


@pytest.mark.parametrize("kind", TRAINED)
def test_every_trained_parameter_gets_a_gradient_and_no_other(kind: str):
    step = make_step(kind)
    seen: set[str] = set()
    for i in range(8):
        step.zero_grad()
        step(make_batch(8, seed=i))["loss"].backward()
        seen |= {name for name, gradient in gradients(step).items() if gradient.abs().max() > 0}
    wanted = {f"student.{n}" for n, _ in step.student.named_parameters() if step.student.part_of(n) in TRAINED[kind]}
    assert wanted
    assert seen == wanted
    assert not any(p.grad is not None for p in step.teacher.parameters())


def test_training_brings_the_student_nearer():
    step = make_step("moe", train=("all",))
    batch = make_batch(8)
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], 3e-3)
    before = step(batch)
    for _ in range(30):
        optimizer.zero_grad()
        step(batch)["loss"].backward()
        optimizer.step()
    after = step(batch)
    assert after["distill"].item() < 0.5 * before["distill"].item()
    assert after["feature_unweighted"].item() < before["feature_unweighted"].item()


def test_teacher_is_not_part_of_the_module():
    step = make_step("moe")
    assert all(name.startswith("student.") for name in step.state_dict())
    assert not step.teacher.training
    assert step.train().teacher.training is False


def test_two_halves_average_to_the_whole():
    batch = make_batch(6, dtype=F64)
    step = make_step("moe", F64)
    whole = step(batch)
    whole["loss"].backward()
    expected = gradients(step)
    step.zero_grad()
    halves = [step(batch[:3]), step(batch[3:])]
    (sum(h["loss"] for h in halves) / 2).backward()
    for name, value in whole.items():
        assert sum(h[name].item() for h in halves) / 2 == pytest.approx(value.item(), rel=1e-10), name
    for name, gradient in gradients(step).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-12, msg=name)


def test_gradient_checkpointing_gives_the_same_loss_and_gradients():
    batch = make_batch(4)
    for kind in ("moe", "mob"):
        plain, checkpointed = (make_step(kind, gradient_checkpointing=on) for on in (False, True))
        results = [step.train()(batch)["loss"] for step in (plain, checkpointed)]
        for loss in results:
            loss.backward()
        assert results[0].item() == results[1].item()
        expected = gradients(plain)
        assert expected.keys() == gradients(checkpointed).keys()
        for name, gradient in gradients(checkpointed).items():
            torch.testing.assert_close(gradient, expected[name], msg=name)


def test_identical_student_has_zero_loss_and_finite_gradients():
    teacher = make_teacher()
    student = make_student("shared", moe=None, conditioning_dim=None)
    student.load_state_dict(teacher.state_dict())
    step = KDStep(student, teacher, make_stage("shared", train=("all",)))
    parts = step(make_batch(3))
    parts["loss"].backward()
    assert parts["loss"].item() == 0
    assert all(bool((g == 0).all()) for g in gradients(step).values())


def test_top_k_0_leaves_no_balance():
    step = make_step("moe", train=("all",))
    step.student.set_top_k(0)
    parts = step(make_batch(2))
    assert parts["balance"].item() == 0
    assert "balance_moe" not in parts


# torch says so of every RMSNorm under autocast; it is only slower.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_bf16_autocast_gives_nearly_the_fp32_loss():
    batch = make_batch(4)
    step = make_step("shared")
    expected = step(batch)
    with torch.autocast("cpu", torch.bfloat16):
        parts = step(batch)
    assert parts["loss"].dtype == torch.float32
    for name in ("distill", "feature_unweighted"):
        assert parts[name].item() == pytest.approx(expected[name].item(), rel=0.05)


def test_validation_loss_ignores_batch_cut_and_restores_the_mode():
    teacher, batch = make_teacher(), make_batch(6)
    student = make_student("moe").train()
    whole = validate_kd(student, teacher, [batch])
    cut = validate_kd(student, teacher, [batch[:1], batch[1:]])
    assert student.training
    assert whole["distill"] == pytest.approx(cut["distill"], rel=1e-5)
    step = KDStep(student, teacher, make_stage("moe"))
    assert whole["distill"] == pytest.approx(step(batch)["distill"].item(), rel=1e-5)
    assert validate_kd(teacher, teacher, [batch]) == {"distill": 0.0, "distill_relative": 0.0}
    with pytest.raises(ValueError, match="0 samples"):
        validate_kd(student, teacher, [])


WORKER = """
import json, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.moe_core.test_distill import make_step
from tests.moe_core.tiny_flux import make_batch

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
batch = make_batch(8, dtype=torch.float64)
results = {}
for kind in ("moe", "mob"):
    step = make_step(kind, torch.float64)
    ddp = DistributedDataParallel(step, find_unused_parameters=True)
    loss = ddp(batch[:4] if rank == 0 else batch[4:])["loss"]
    loss.backward()
    norms = {n: p.grad.norm().item() for n, p in step.named_parameters() if p.grad is not None}
    results[kind] = {"loss": loss.item(), "norms": norms}
print(json.dumps(results))
dist.destroy_process_group()
"""


def test_two_ddp_workers_train_as_one(tmp_path: Path):
    command = [sys.executable, "-c", WORKER]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )
        for rank in range(2)
    ]
    outputs = [json.loads(worker.communicate(timeout=240)[0]) for worker in workers]
    for kind in ("moe", "mob"):
        results = [output[kind] for output in outputs]
        step = make_step(kind, F64)
        loss = step(make_batch(8, dtype=F64))["loss"]
        loss.backward()
        assert sum(r["loss"] for r in results) / 2 == pytest.approx(loss.item(), rel=1e-9)
        assert results[0]["norms"] == pytest.approx(results[1]["norms"], rel=1e-12)
        for name, gradient in gradients(step).items():
            assert results[0]["norms"][name] == pytest.approx(gradient.norm().item(), rel=1e-6, abs=1e-12), (kind, name)
