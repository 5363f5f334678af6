"""The losses against slow references written straight from the equations, in fp64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_core import losses

B, L = 3, 4
F64 = torch.float64


def make_features(seed: int) -> list[losses.Feature]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(B, 2, 5, generator=generator, dtype=F64) * (layer + 1),
            torch.randn(B, 3, 5, generator=generator, dtype=F64),
        )
        for layer in range(L)
    ]


def stack(student: list[losses.Feature], teacher: list[losses.Feature]) -> tuple[Tensor, Tensor]:
    return (
        torch.stack([losses.feature_loss(s, t) for s, t in zip(student, teacher)]),
        torch.stack([losses.feature_norm(t) for t in teacher]),
    )


def no_floor(feature_LB: Tensor) -> Tensor:
    return torch.zeros_like(feature_LB)


def test_equations_7_to_9_against_loops():
    student, teacher = make_features(0), make_features(1)
    output, answer = torch.randn(B, 3, 2, dtype=F64), torch.randn(B, 3, 2, dtype=F64)
    distill_B = losses.distill_loss(output, answer)
    feature_LB, norm_LB = stack(student, teacher)
    weights_LB = losses.feature_weights(distill_B, feature_LB, norm_LB, no_floor(feature_LB))
    loss_B = losses.weighted_feature_loss(distill_B, feature_LB, norm_LB, no_floor(feature_LB))
    for b in range(B):
        difference = (answer[b] - output[b]).flatten().tolist()
        distill = sum(d**2 for d in difference) / len(difference)
        assert distill_B[b].item() == pytest.approx(distill, rel=1e-12)
        norms, errors = [], []
        for s, t in zip(student, teacher):
            s_flat = [x for stream in s for x in stream[b].flatten().tolist()]
            t_flat = [x for stream in t for x in stream[b].flatten().tolist()]
            norms.append(sum(x**2 for x in t_flat) ** 0.5)
            errors.append(sum((x - y) ** 2 for x, y in zip(t_flat, s_flat)) / len(t_flat))
        total = 0.0
        for layer in range(L):
            weight = abs(distill) / abs(errors[layer]) * sum(norms) / (L * norms[layer])
            assert weights_LB[layer, b].item() == pytest.approx(weight, rel=1e-12)
            total += weight * errors[layer]
        assert loss_B[b].item() == pytest.approx(total, rel=1e-12)


def test_weights_carry_no_gradient_and_features_do():
    student, teacher = make_features(0), make_features(1)
    for text, image in student:
        text.requires_grad_()
        image.requires_grad_()
    distill_B = torch.rand(B, dtype=F64, requires_grad=True)
    feature_LB, norm_LB = stack(student, teacher)
    weights_LB = losses.feature_weights(distill_B, feature_LB, norm_LB, no_floor(feature_LB))
    assert not weights_LB.requires_grad
    losses.weighted_feature_loss(distill_B, feature_LB, norm_LB, no_floor(feature_LB)).sum().backward()
    assert distill_B.grad is None
    elements = 25
    for layer, ((text, image), (wanted_text, wanted_image)) in enumerate(zip(student, teacher)):
        for given, wanted in ((text, wanted_text), (image, wanted_image)):
            expected = weights_LB[layer].view(-1, 1, 1) * 2 * (given - wanted) / elements
            torch.testing.assert_close(given.grad, expected.detach(), rtol=1e-12, atol=0)


def test_layers_that_equal_the_teachers_get_no_weight_and_no_nan():
    student, teacher = make_features(0), make_features(1)
    student[1] = teacher[1]
    teacher[2] = tuple(torch.zeros_like(stream) for stream in teacher[2])
    feature_LB, norm_LB = stack(student, teacher)
    weights_LB = losses.feature_weights(torch.ones(B, dtype=F64), feature_LB, norm_LB, no_floor(feature_LB))
    assert torch.equal(weights_LB[1:3], torch.zeros(2, B, dtype=F64))
    assert bool((weights_LB[[0, 3]] > 0).all())
    assert bool(weights_LB.isfinite().all())


def test_a_layer_that_differs_by_rounding_alone_gets_no_weight():
    teacher = [(text.float(), image.float()) for text, image in make_features(1)]
    student = [tuple(stream * (1 + 1e-8) for stream in layer) for layer in teacher]
    student[0] = tuple(torch.nextafter(stream, stream + 1) for stream in teacher[0])
    student[3] = tuple(stream * 1.01 for stream in teacher[3])
    feature_LB, norm_LB = stack(student, teacher)
    floor_LB = losses.rounding_floor(norm_LB, 25, torch.float32)
    weights_LB = losses.feature_weights(torch.ones(B), feature_LB, norm_LB, floor_LB)
    assert torch.equal(weights_LB[:3], torch.zeros(3, B))
    assert bool((weights_LB[3] > 0).all())


def test_low_precision_features_are_compared_in_fp32():
    answer = torch.full((1, 64), 1.0, dtype=torch.bfloat16)
    output = torch.full((1, 64), 1.0078125, dtype=torch.bfloat16)
    assert losses.distill_loss(output, answer).dtype == torch.float32
    assert losses.distill_loss(output, answer).item() == 0.0078125**2


def balance_by_loops(probs: list[list[float]], chosen: list[list[int]], gate: bool) -> float:
    """The paper's load balancing loss: tokens t, experts i."""
    tokens, n, k = len(probs), len(probs[0]), len(chosen[0])
    total = 0.0
    for i in range(n):
        load = n / (tokens * k) * sum(i in chosen[t] for t in range(tokens))
        if gate:
            gates = [probs[t][i] / sum(probs[t][j] for j in chosen[t]) for t in range(tokens) if i in chosen[t]]
            mean = sum(gates) / tokens
        else:
            mean = sum(probs[t][i] for t in range(tokens)) / tokens
        total += load * mean
    return total


@pytest.mark.parametrize("balance_probs", ["softmax", "gate"])
def test_moe_balance_against_loops(balance_probs: losses.BalanceProbs):
    probs = torch.randn(B, 7, 5, dtype=F64).softmax(-1)
    indices = probs.topk(2, dim=-1).indices
    expected = [balance_by_loops(p.tolist(), i.tolist(), balance_probs == "gate") for p, i in zip(probs, indices)]
    torch.testing.assert_close(losses.moe_balance(probs, indices, balance_probs), torch.tensor(expected, dtype=F64))
    group = losses.mob_balance(probs[:, 0], indices[:, 0], balance_probs)
    assert group.item() == pytest.approx(
        balance_by_loops(probs[:, 0].tolist(), indices[:, 0].tolist(), balance_probs == "gate"), rel=1e-12
    )


def test_balance_is_1_when_even_and_n_over_k_when_collapsed():
    even = torch.full((1, 4, 4), 0.25)
    assert losses.moe_balance(even, torch.tensor([[[0, 1], [2, 3], [0, 2], [1, 3]]])).item() == pytest.approx(1)
    collapsed = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 4, 4)
    assert losses.moe_balance(collapsed, torch.tensor([[[0, 1]] * 4])).item() == pytest.approx(2)


def test_balance_pushes_probability_away_from_the_crowded():
    logits = torch.tensor([[1.0, 0.0, 0.0]] * 6, requires_grad=True)
    probs = logits.softmax(-1)
    losses.mob_balance(probs, probs.topk(1, dim=-1).indices).backward()
    assert bool((logits.grad[:, 0] > 0).all())
    assert bool((logits.grad[:, 1:] < 0).all())


def test_printed_gate_of_one_active_block_has_no_gradient():
    """Why `balance_probs` is softmax by default."""
    logits = torch.randn(6, 3, dtype=F64, requires_grad=True)
    probs = logits.softmax(-1)
    losses.mob_balance(probs, probs.topk(1, dim=-1).indices, "gate").backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-15, rtol=0)


WORKER = """
import json, sys
import torch, torch.distributed as dist
from moe_core.losses import mob_balance

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
results = {}
for balance_probs in ("softmax", "gate"):
    logits = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = (logits[:3] if rank == 0 else logits[3:]).requires_grad_()  # uneven on purpose
    probs = mine.softmax(-1)
    loss = mob_balance(probs, probs.topk(2, dim=-1).indices, balance_probs)
    loss.backward()
    results[balance_probs] = {"loss": loss.item(), "gradient": mine.grad.tolist()}
print(json.dumps(results))
dist.destroy_process_group()
"""


def test_mob_balance_averaged_over_two_workers_is_the_global_one(tmp_path: Path):
    root = Path(losses.__file__).parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True, cwd=root, env=env
        )
        for rank in range(2)
    ]
    outputs = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    probabilities: tuple[losses.BalanceProbs, ...] = ("softmax", "gate")
    for balance_probs in probabilities:
        results = [output[balance_probs] for output in outputs]
        logits = torch.randn(7, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        probs = logits.softmax(-1)
        loss = losses.mob_balance(probs, probs.topk(2, dim=-1).indices, balance_probs)
        loss.backward()
        assert sum(r["loss"] for r in results) / 2 == pytest.approx(loss.item(), rel=1e-12)
        # Each sample's gradient comes from one worker; averaging over workers halves it.
        gathered = torch.tensor(results[0]["gradient"] + results[1]["gradient"], dtype=F64) / 2
        torch.testing.assert_close(gathered, logits.grad, rtol=1e-12, atol=1e-15)
