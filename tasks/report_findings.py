"""What the numbers say, in plain sentences made from them.

- Each finding is marked: it holds, it falls short of a target or of what the method is for, or it is a remark.
- The targets are this project's own for its embedded presets; the paper states none.
- A finding that the numbers cannot carry is not made: an interval that covers a target is said to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from tasks.report_inputs import Inputs
from tasks.report_table import Row, joined, percent, rows, small, title

ACCURACY_TARGETS = {"L": 0.97, "XS": 0.85}
"""Least prompt accuracy of a level over the teacher's."""

TEACHER_TARGETS = {"digits": 0.95, "scenes": 0.80}
"""Least prompt accuracy of the teacher of an embedded data preset."""

STILL_FALLING = 0.05
"""A validation loss that fell by more than this share over its last two points had not settled."""

IDLE_EXPERT = 0.1
"""An expert with less than this part of an even share does next to nothing."""

ONE_SIDED = 0.95
"""A block router that sends more than this share of samples one way is no longer a choice."""


@dataclass(frozen=True)
class Finding:
    """A sentence with its mark."""

    mark: Literal["holds", "short", "note"]
    text: str


def findings(inputs: Inputs) -> list[Finding]:
    """All findings, targets first."""
    table = {row.model: row for row in rows(inputs)}
    return [
        *_teacher(inputs),
        *_targets(table),
        *_order(inputs, table),
        *_pruned(inputs, table),
        *_cost(inputs, table),
        *_training(inputs.curves),
        *_experts(inputs),
        *_blocks(inputs),
        *_evaluator(inputs),
        *_data(inputs),
    ]


def _teacher(inputs: Inputs) -> list[Finding]:
    own = inputs.evaluations["teacher"].judged
    if own is None:
        return [
            Finding(
                "note",
                "Nobody judged the pictures (eval.classifier is null): prompt accuracy and FID are not measured. Distance to the"
                " teacher's pictures from the same noise and validation KD loss say how near a model is to the teacher, not how good it is.",
            )
        ]
    interval = _interval(own.accuracy_low, own.accuracy_high)
    found = f"The teacher gets {percent(own.accuracy)} of the prompts right (95 % interval {interval})"
    target = TEACHER_TARGETS.get(inputs.params.data.name)
    if target is None:
        return [Finding("note", found + ".")]
    if own.accuracy >= target:
        return [Finding("holds", f"{found}; the target is {percent(target)}.")]
    return [
        Finding(
            "short",
            f"{found}; the target is {percent(target)}, so it is {100 * (target - own.accuracy):.1f} points short.",
        )
    ]


def _targets(table: dict[str, Row]) -> list[Finding]:
    result = []
    teacher = table["teacher"].evaluation.judged
    for model, target in ACCURACY_TARGETS.items():
        if model not in table:
            continue
        row = table[model]
        own, ratio = row.evaluation.judged, row.accuracy_ratio
        if teacher is None or own is None or ratio is None:
            continue
        needed = target * teacher.accuracy
        found = (
            f"{row.title} keeps {ratio:.3f} of the teacher's prompt accuracy ({percent(own.accuracy)});"
            f" the target is {target:.2f} ({percent(needed)})"
        )
        if ratio >= target:
            sure = (
                ""
                if own.accuracy_low >= needed
                else f", though the interval {_interval(own.accuracy_low, own.accuracy_high)} reaches below it"
            )
            result.append(Finding("holds", f"{found}{sure}."))
        else:
            within = "It lies within" if own.accuracy_high >= needed else "It lies outside"
            result.append(
                Finding(
                    "short",
                    f"{found}. {within} the 95 % interval"
                    f" ({_interval(own.accuracy_low, own.accuracy_high)}) of {row.evaluation.prompts} prompts.",
                )
            )
    return result


def _order(inputs: Inputs, table: dict[str, Row]) -> list[Finding]:
    """Do the experts help, and does quality fall with size?"""
    shared, moe = table["shared"].evaluation, table["L"].evaluation
    accuracy = ""
    if moe.judged is not None and shared.judged is not None:
        accuracy = f"; prompt accuracy {percent(moe.judged.accuracy)} against {percent(shared.judged.accuracy)}"
    verdict = "lower" if moe.kd_loss < shared.kd_loss else "not lower"
    result = [
        Finding(
            "holds" if moe.kd_loss < shared.kd_loss else "short",
            f"With normal experts (MoE-L) the validation KD loss is {verdict} than with shared experts alone:"
            f" {small(moe.kd_loss)} against {small(shared.kd_loss)}{accuracy}.",
        )
    ]
    levels = [m for m, row in table.items() if row.is_level]
    losses = [inputs.evaluations[m].kd_loss for m in levels]
    if len(levels) > 1:
        chain = ", ".join(f"{m} {small(loss)}" for m, loss in zip(levels, losses, strict=True))
        if losses == sorted(losses):
            result.append(
                Finding("holds", f"The sparser the level, the larger its validation KD loss, as expected: {chain}.")
            )
        else:
            result.append(Finding("note", f"The validation KD loss does not rise with sparsity throughout: {chain}."))
    return result


def _pruned(inputs: Inputs, table: dict[str, Row]) -> list[Finding]:
    """Is the sparse model better than FFNs cut down to its active width?"""
    moe, own = inputs.params.moe, table["L"].evaluation
    active = moe.shared_ratio + moe.top_k * moe.normal_ratio
    result = []
    for name, baseline in inputs.params.baselines.items():
        if baseline.ratio is None or not math.isclose(baseline.ratio, active) or name not in table:
            continue
        cut = table[name].evaluation
        accuracy = ""
        if own.judged is not None and cut.judged is not None:
            accuracy = f"; prompt accuracy {percent(own.judged.accuracy)} against {percent(cut.judged.accuracy)}"
        verdict = "lower" if own.kd_loss < cut.kd_loss else "not lower"
        result.append(
            Finding(
                "holds" if own.kd_loss < cut.kd_loss else "short",
                f"The validation KD loss of MoE-L is {verdict} than that of FFNs cut to the same active width, r = {active:g} ({name},"
                f" {baseline.kd.optimizer.steps} steps): {small(own.kd_loss)} against {small(cut.kd_loss)}{accuracy}.",
            )
        )
    return result


def _cost(inputs: Inputs, table: dict[str, Row]) -> list[Finding]:
    levels = [row for row in table.values() if row.is_level]
    last = levels[-1]
    result = [
        Finding(
            "note",
            f"{last.title} activates {percent(last.activated_ratio)} of the teacher's weights"
            f" ({percent(last.paper_ratio)} by the paper's count) and needs {percent(last.flops_ratio)} of its FLOPs;"
            f" {levels[0].title} {percent(levels[0].activated_ratio)} and {percent(levels[0].flops_ratio)}.",
        )
    ]
    for size in inputs.latency.batch_sizes:
        slower = [row for row in levels if row.latency_ratios[size] >= 1]
        times = joined([f"{row.model} {row.latency_ratios[size]:.2f}" for row in levels])
        found = f"Latency over the teacher's at batch {size} on {inputs.latency.device}: {times}."
        if slower:
            names = joined([row.title for row in slower])
            result.append(
                Finding(
                    "short",
                    f"{found} {names} {'is' if len(slower) == 1 else 'are'} not faster than the dense teacher here.",
                )
            )
        else:
            result.append(Finding("holds", f"{found} Every level is faster than the dense teacher."))
    return result


def _training(curves: Mapping[str, pd.DataFrame]) -> list[Finding]:
    falling = [stage for stage, curve in curves.items() if _drop(curve) > STILL_FALLING]
    if not falling:
        return []
    return [
        Finding(
            "note",
            f"Had not settled: {joined(falling)}. The validation loss still fell by more than {percent(STILL_FALLING)}"
            " between its last two points, so longer training may lower it.",
        )
    ]


def _drop(curve: pd.DataFrame) -> float:
    """Relative fall of the validation loss over its last two points; 0 where there are fewer."""
    values = curve[(curve["split"] == "validation") & (curve["metric"] == "loss")]["value"].to_list()
    return 1 - values[-1] / values[-2] if len(values) > 1 and values[-2] > 0 else 0.0


def _experts(inputs: Inputs) -> list[Finding]:
    use = inputs.evaluations["L"].expert_use
    if not use:
        return []
    busiest, layer = max((max(shares) * len(shares), name) for name, shares in use.items())
    idle = sum(1 for shares in use.values() for share in shares if share * len(shares) < IDLE_EXPERT)
    count = sum(len(shares) for shares in use.values())
    found = (
        f"Of MoE-L's {count} normal experts in {len(use)} layers, {idle or 'none'} {'gets' if idle <= 1 else 'get'}"
        f" less than {percent(IDLE_EXPERT)} of an even share; the busiest ({layer}) gets {busiest:.1f} times it."
    )
    return [Finding("short" if idle else "holds", found)]


def _blocks(inputs: Inputs) -> list[Finding]:
    one_sided = [
        f"{title(model)} {group}"
        for model in inputs.models
        for group, shares in inputs.evaluations[model].block_use.items()
        # a block that is always among the k active ones has a share of 1 / k
        if max(shares) * inputs.params.mob.active > ONE_SIDED * sum(shares)
    ]
    if one_sided:
        text = (
            f"Block routers that send more than {percent(ONE_SIDED)} of the samples to one block: {joined(one_sided)}."
        )
        return [Finding("short", text)]
    if any(inputs.evaluations[m].block_use for m in inputs.models):
        return [
            Finding(
                "holds",
                f"Every block router still chooses: no block of a group gets over {percent(ONE_SIDED)} of the samples.",
            )
        ]
    return []


def _evaluator(inputs: Inputs) -> list[Finding]:
    own = inputs.evaluator
    if own is None:
        return []
    text = (
        f"The evaluator's classifier reads {percent(own.accuracy)} of {own.test_digits} real digits right that neither"
        f" it nor the generator was trained on, and its detector {percent(own.detector_accuracy)} of real scenes:"
        " about what a perfect model would score."
    )
    return [Finding("note", text)]


def _data(inputs: Inputs) -> list[Finding]:
    dropped = sum(reject.count for reject in inputs.manifest.rejects.values())
    kept = sum(split.samples for split in inputs.manifest.splits.values())
    return [Finding("note", f"{kept} image-text pairs were used and {dropped} dropped.")]


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def counted(found: Sequence[Finding]) -> dict[str, int]:
    """How many findings of each mark."""
    return {mark: sum(1 for finding in found if finding.mark == mark) for mark in ("holds", "short", "note")}
