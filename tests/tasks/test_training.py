"""The loop in one process: resuming, metrics, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_core.config import ComputeConfig, OptimizerConfig
from moe_core.errors import ConfigError, TrainingError
from tasks import optimizer, run_training, training
from tasks.curves import Curve, Point
from tasks.phase import METRICS, NOTES, PRODUCT, MetricsTail, Phase
from tasks.worker import Worker
from tests.tasks.trivial import Linear

CPU = torch.device("cpu")
Maker = Callable[..., Phase]


class Killed(Exception):
    """Stands in for a kill, in one process; the tests on Ray kill for real."""


def run(phases: list[Phase], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    training.run(phases, folder, CPU, 1, 0)


def product(folder: Path, name: str = "train") -> dict[str, torch.Tensor]:
    return load_file(folder / name / PRODUCT / "model.safetensors")


def records(folder: Path, name: str = "train") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name / METRICS).read_text().splitlines()]


def without_time(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [1, 5, 13, 19])
def test_resumed_at_any_step_it_ends_bit_for_bit_the_same(
    tmp_path: Path, phase: Maker, monkeypatch: pytest.MonkeyPatch, stop: int, kind: str
) -> None:
    def made() -> Phase:
        return phase(optimizer=kind, rates={"layer.weight": 0.5})

    run([made()], tmp_path / "whole")
    taken = 0
    step = training._Loop._step

    def killed(*arguments: object) -> None:
        nonlocal taken
        if taken == stop:
            raise Killed
        taken += 1
        step(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training._Loop, "_step", killed)
        with pytest.raises(Killed):
            run([made()], tmp_path / "cut")
    run([made()], tmp_path / "cut")

    expected, found = product(tmp_path / "whole"), product(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert without_time(records(tmp_path / "cut")) == without_time(records(tmp_path / "whole"))


def test_the_curve_has_every_step_once(tmp_path: Path, phase: Maker) -> None:
    run([phase()], tmp_path)
    rows = records(tmp_path)
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 21))
    assert [row["step"] for row in rows if row["split"] == "validation"] == [0, 10, 20]
    assert rows[0]["split"] == "validation"


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path, phase: Maker) -> None:
    run([phase(steps=10)], tmp_path)
    file = tmp_path / "train" / METRICS
    whole = without_time(records(tmp_path))
    (tmp_path / "train" / PRODUCT).rename(tmp_path / "gone")
    file.write_text(file.read_text() + '{"split": "train", "st')
    run([phase(steps=10)], tmp_path)
    assert without_time(records(tmp_path)) == whole


def test_a_broken_checkpoint_is_named_and_the_older_one_used(tmp_path: Path, phase: Maker) -> None:
    run([phase()], tmp_path / "whole")
    run([phase()], tmp_path / "cut")
    (tmp_path / "cut" / "train" / PRODUCT).rename(tmp_path / "gone")
    (tmp_path / "cut" / "train" / "step-00000020" / "state.safetensors").write_bytes(b"x")
    run([phase()], tmp_path / "cut")
    notes = (tmp_path / "cut" / NOTES).read_text()
    assert "passed over: checkpoint" in notes
    assert "train goes on from" in notes
    assert "step-00000015" in notes
    assert torch.equal(product(tmp_path / "whole")["layer.weight"], product(tmp_path / "cut")["layer.weight"])


def test_gradients_of_micro_batches_add_up_to_the_batch(tmp_path: Path, phase: Maker) -> None:
    whole = phase()
    cut = Phase(**{**whole.__dict__, "optimizer": whole.optimizer.model_copy(update={"micro_batch": 2})})
    run([whole], tmp_path / "whole")
    run([cut], tmp_path / "cut")
    for one, two in zip(records(tmp_path / "whole"), records(tmp_path / "cut"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, weight in product(tmp_path / "whole").items():
        torch.testing.assert_close(product(tmp_path / "cut")[name], weight, rtol=1e-4, atol=1e-5)


def test_the_average_is_validated_saved_and_resumed(
    tmp_path: Path, phase: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = phase()
    job = Phase(**{**plain.__dict__, "optimizer": plain.optimizer.model_copy(update={"ema_decay": 0.6})})
    weights, update = [], optimizer.Average.update

    def seen(self: optimizer.Average, step: int) -> None:
        weights.append(self._parameters["layer.weight"].detach().clone())
        update(self, step)

    monkeypatch.setattr(optimizer.Average, "update", seen)
    run([plain], tmp_path / "plain")
    run([job], tmp_path / "whole")
    torch.manual_seed(0)
    expected = Linear().layer.weight.detach()
    for step, weight in enumerate(weights):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(product(tmp_path / "whole")["layer.weight"], expected)
    # What trains is not touched by it.
    assert torch.equal(product(tmp_path / "plain")["layer.weight"], weights[-1])
    last = records(tmp_path / "whole")[-1]
    assert last["split"] == "validation"
    assert last["loss"] != records(tmp_path / "plain")[-1]["loss"]

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "train" / PRODUCT)
    shutil.rmtree(tmp_path / "cut" / "train" / "step-00000020")
    run([job], tmp_path / "cut")
    assert torch.equal(product(tmp_path / "cut")["layer.weight"], product(tmp_path / "whole")["layer.weight"])


def test_a_finished_phase_is_passed_over(tmp_path: Path, phase: Maker) -> None:
    run([phase("a")], tmp_path)
    before = (tmp_path / "a" / METRICS).read_text()
    run([phase("a"), phase("b")], tmp_path)
    assert (tmp_path / "a" / METRICS).read_text() == before
    assert (tmp_path / "b" / PRODUCT).is_dir()


def test_a_loss_that_is_no_number_ends_the_run_before_its_checkpoint(tmp_path: Path, phase: Maker) -> None:
    with pytest.raises(TrainingError, match=r"train: the loss is nan at step 8; a lower learning_rate \(now 0.1\)"):
        run([phase(nan_at=56)], tmp_path)
    assert [p.name for p in (tmp_path / "train").glob("step-*")] == ["step-00000005"]


@pytest.mark.parametrize(("at", "step"), [(32, 5), (152, 20)])
def test_a_finite_loss_with_a_gradient_that_is_no_number_leaves_no_checkpoint_and_no_product(
    tmp_path: Path, phase: Maker, at: int, step: int
) -> None:
    """In the step before a checkpoint, and in the last one: the loss does not show it, the weights have it."""
    with pytest.raises(TrainingError, match=rf"train: the norm of the gradients is (nan|inf) at step {step}; a lower"):
        run([phase(steep_at=at)], tmp_path)
    assert not (tmp_path / "train" / f"step-{step:08d}").exists()
    assert not (tmp_path / "train" / PRODUCT).exists()


def test_a_validation_that_is_no_number_ends_the_run(
    tmp_path: Path, phase: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.tasks.trivial.Trivial.validate", lambda self: {"loss": float("inf")})
    with pytest.raises(TrainingError, match="train: the validation's loss is inf at step 0"):
        run([phase()], tmp_path)


def test_a_trainee_with_nothing_to_train_is_refused(tmp_path: Path, phase: Maker) -> None:
    broken = Phase(**{**phase().__dict__, "build": "tests.tasks.trivial:build_frozen"})
    with pytest.raises(ConfigError, match="no parameter is trained"):
        run([broken], tmp_path)


def test_the_driver_passes_every_record_on(tmp_path: Path, phase: Maker, compute: Callable[..., ComputeConfig]) -> None:
    seen: dict[str, list[tuple[str, int]]] = {"a": [], "b": []}

    def watch(job: Phase, rows: list[dict[str, float]]) -> None:
        seen[job.name] += [(str(row["split"]), int(row["step"])) for row in rows]

    run_training.train([phase("a"), phase("b")], tmp_path, compute(0), 0, watch)
    assert seen["a"] == seen["b"] == [(row["split"], row["step"]) for row in records(tmp_path, "a")]


def test_an_error_of_the_driver_is_raised_once_the_training_is_over(
    tmp_path: Path, phase: Maker, compute: Callable[..., ComputeConfig]
) -> None:
    def watch(job: Phase, rows: list[dict[str, float]]) -> None:
        raise Killed

    with pytest.raises(Killed):
        run_training.train([phase()], tmp_path, compute(0), 0, watch)
    assert (tmp_path / "train" / PRODUCT).is_dir()


def test_the_tail_sees_each_record_once_though_the_file_is_cut_back(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    lines = [json.dumps({"split": "train", "step": step}) + "\n" for step in range(1, 6)]
    tail = MetricsTail(file)
    assert list(tail.read()) == []
    file.write_text("".join(lines[:4]) + lines[4][:7])
    assert [row["step"] for row in tail.read()] == [1, 2, 3, 4]
    (tmp_path / "shorter").write_text("".join(lines[:2]))
    (tmp_path / "shorter").replace(file)
    assert list(tail.read()) == []
    with file.open("a") as handle:
        handle.writelines(lines[2:])
    assert [row["step"] for row in tail.read()] == [5]


def test_a_curve_is_means_over_windows_that_depend_on_the_steps_alone() -> None:
    rows = [{"split": "train", "step": step, "loss": float(step), "seconds": 1.0} for step in range(1, 251)]
    rows.insert(100, {"split": "validation", "step": 100, "loss": 7.0})
    points = list(Curve(250).add(rows))
    assert points[0] == Point("train", 2, {"loss": 1.5})
    assert Point("validation", 100, {"loss": 7.0}) in points
    split = Curve(250)
    assert list(split.add(rows[:33])) + list(split.add(rows[33:])) == points


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_positions_that_do_not_divide_count_once(workers: int) -> None:
    for count in range(1, 18):
        dealt = [Worker(rank, workers, CPU).dealt(range(100, 100 + count)) for rank in range(workers)]
        assert len({len(rows) for rows, _ in dealt}) == 1
        assert [row for rows, own in dealt for row in rows[:own]] == list(range(100, 100 + count))
        assert all(row in range(100, 100 + count) for rows, _ in dealt for row in rows)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_the_learning_rate_rises_to_its_peak_and_never_above(schedule: str) -> None:
    config = OptimizerConfig(steps=100, batch_size=1, learning_rate=0.5, schedule=schedule, warmup_steps=10)
    rates = [optimizer.learning_rate(config, step) for step in range(100)]
    assert max(rates) == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5)
    assert rates[:10] == sorted(rates[:10])
    assert all(rate > 0 for rate in rates)
    assert rates[-1] == pytest.approx(0.5) if schedule == "constant" else rates[-1] < 0.001


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_part_can_have_a_rate_of_its_own(kind: str) -> None:
    def change(rates: dict[str, float]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = Linear()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        config = OptimizerConfig(steps=1, batch_size=1, learning_rate=1.0, optimizer=kind)
        optim = optimizer.build(config, module, rates)
        optimizer.set_rate(optim, 0.1)
        module((torch.ones(3, 4), torch.zeros(3)))["loss"].backward()
        optim.step()
        return {name: p.detach() - before[name] for name, p in module.named_parameters()}

    plain, halved = change({}), change({"layer.weight": 0.5})
    assert plain["layer.weight"].abs().max() > 0
    torch.testing.assert_close(halved["layer.weight"], plain["layer.weight"] / 2)
    assert torch.equal(halved["layer.bias"], plain["layer.bias"])
