"""The numbers of the report: the table in the shape of the paper's Table 1, and the paper's own ratios beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_core import references
from tasks.report_inputs import Evaluation, Inputs, Judged

TITLES = {"teacher": "Teacher (dense)", "shared": "Shared experts only"}

KIND_TITLES = {
    "single_object": "One object",
    "two_object": "Two objects",
    "counting": "Counting",
    "colors": "Colours",
    "position": "Position",
    "color_attr": "Colour attribution",
}
"""GenEval's six task kinds, in its order."""


@dataclass(frozen=True)
class PaperRow:
    """One level in the paper's Table 1, over its FLUX.1 [dev] row."""

    activated: float
    flops: float
    latency: float
    geneval: float


def _over_flux1(row: references.PaperRow) -> PaperRow:
    dense = references.TABLE_1["FLUX.1 [dev]"]
    return PaperRow(
        row.activated / dense.activated,
        row.tflops / dense.tflops,
        row.latency / dense.latency,
        row.geneval / dense.geneval,
    )


PAPER = {level: _over_flux1(references.TABLE_1[f"FLUX.1-MoE-{level}"]) for level in ("L", "M", "S", "XS")}


@dataclass(frozen=True)
class Row:
    """One model. Ratios are over the teacher's."""

    model: str
    title: str
    is_level: bool
    """L or a level of `mob.levels`: neither the teacher, nor shared experts alone, nor a baseline"""
    evaluation: Evaluation
    accuracy_ratio: float | None
    """null where nobody judged"""
    kind_ratios: dict[str, float | None]
    activated_ratio: float
    paper_ratio: float
    flops_ratio: float
    latency_ratios: dict[int, float]


def title(model: str) -> str:
    """The name of the teacher or one of its sparse descendants, for people."""
    return TITLES.get(model, f"MoE-{model}")


def kinds(inputs: Inputs) -> list[str]:
    """The kinds of the prompts, in GenEval's order, others last."""
    present = {picture.tag for picture in inputs.pictures["teacher"]}
    return [k for k in KIND_TITLES if k in present] + sorted(k for k in present if k not in KIND_TITLES)


def rows(inputs: Inputs) -> list[Row]:
    """The table, one row a model."""
    teacher = inputs.evaluations["teacher"]
    result = []
    levels = ("L", *inputs.params.mob.levels)
    for model in inputs.models:
        own = inputs.evaluations[model]
        result.append(
            Row(
                model=model,
                title=title(model) if model in (*TITLES, *levels) else f"{model} (baseline)",
                is_level=model in levels,
                evaluation=own,
                accuracy_ratio=_accuracy_ratio(own.judged, teacher.judged),
                kind_ratios=_kind_ratios(own.judged, teacher.judged),
                activated_ratio=own.params.activated / teacher.params.activated,
                paper_ratio=own.params.activated_paper / teacher.params.activated_paper,
                flops_ratio=own.flops / teacher.flops,
                latency_ratios={
                    size: inputs.latency.models[model][str(size)].ratio for size in inputs.latency.batch_sizes
                },
            )
        )
    return result


def _accuracy_ratio(own: Judged | None, teacher: Judged | None) -> float | None:
    return None if own is None or teacher is None else _ratio(own.accuracy, teacher.accuracy) or 0.0


def _kind_ratios(own: Judged | None, teacher: Judged | None) -> dict[str, float | None]:
    if own is None or teacher is None:
        return {}
    return {kind: _ratio(own.accuracy_by_kind.get(kind, 0.0), base) for kind, base in teacher.accuracy_by_kind.items()}


def _ratio(value: float, base: float) -> float | None:
    """value / base, or None where the base is 0: a ratio to nothing is not a number to show."""
    return value / base if base else None


def quantity(value: float, digits: int = 3) -> str:
    """A count in units of k, M, G or T with so many significant digits: 1234567 -> 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{_significant(value / size, digits)} {unit}"
    return _significant(value, digits)


def parameters(count: float) -> str:
    """A parameter count: billions are B, as everyone writes them."""
    return quantity(count).replace(" G", " B")


def _significant(value: float, digits: int) -> str:
    whole = len(str(int(abs(value))))
    return f"{value:.{max(digits - whole, 0)}f}"


def percent(share: float) -> str:
    """0.9146 -> 91.5 %"""
    return f"{100 * share:.1f} %"


def small(value: float | None) -> str:
    """A loss or distance with three significant digits; a dash where there is none."""
    return "\N{EN DASH}" if value is None else f"{value:.3g}"


def joined(items: Sequence[str]) -> str:
    """a, b and c"""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
