"""Stage `report`: table, findings, plots and pictures as `reports/index.html` (self-contained) and `report.md`.

- The same inputs give the same bytes: no date, host, commit or run id is in them. Latency is an input like any other.
- Read `report_inputs` for what goes in, `report_table` and `report_findings` for the numbers, `report_figures` and
  `report_gallery` for the pictures; the templates hold all words that do not depend on the numbers.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from moe_core.config import BaselineConfig, KDStageConfig, MoBGroupsConfig, Params
from tasks import outs, report_figures, report_findings, report_table
from tasks.report_gallery import gallery, sheet
from tasks.report_inputs import Inputs, fingerprints, load
from tasks.report_table import KIND_TITLES, PAPER, parameters, percent, quantity, small
from tasks.stage import Stage, execute
from tasks.tracking import metrics_frame

TEMPLATES = Path(__file__).parent / "templates"
BASELINES = {
    "diff_pruning": "Diff-Pruning: FFNs cut by Taylor scores",
    "lite": "Lite: the blocks of least change dropped, those before gaps trained",
    "bk": "BK-SDM: blocks dropped at equal distances, all weights trained",
}
MARKS = {"holds": "holds", "short": "falls short", "note": "note"}


def make(stage: Stage) -> None:
    """The stage's one function."""
    known = set(fingerprints(stage.root, stage.params).values())
    build(stage.root, stage.params, metrics_frame(stage.root, fingerprints=known))
    with Image.open(stage.root / "reports" / "figures" / "gallery.png") as picture:
        stage.run.image("gallery.png", picture)


def build(root: Path, params: Params, frame: pd.DataFrame) -> None:
    """Writes index.html, report.md and figures/ into `root`/reports.

    `frame` is `tasks.tracking.metrics_frame()`; where it lacks a stage's run, the stage's CSV is read. Raises DataError
    where an input is missing or malformed; then nothing is written.
    """
    inputs = load(root, params, frame)
    shown = gallery(inputs)
    figures = report_figures.draw(inputs)
    values = _values(inputs) | {
        "gallery": shown,
        "figures": figures,
        "uris": {name: _uri(svg) for name, svg in figures.items()},
    }
    html = _environment(escape=True).get_template("report.html.j2").render(values)
    markdown = _environment(escape=False).get_template("report.md.j2").render(values)

    reports = root / "reports"
    with outs.folder(reports / "figures") as folder:
        for name, svg in figures.items():
            outs.write_text(folder / f"{name}.svg", svg)
        sheet(shown).save(folder / "gallery.png", optimize=True)
    outs.write_text(reports / "report.md", markdown)
    outs.write_text(reports / "index.html", html)


def _values(inputs: Inputs) -> dict[str, Any]:
    """What both templates show."""
    params, table = inputs.params, report_table.rows(inputs)
    found = report_findings.findings(inputs)
    return {
        "params": params,
        "rows": table,
        "kinds": [(kind, KIND_TITLES.get(kind, kind)) for kind in report_table.kinds(inputs)],
        "teacher": inputs.evaluations["teacher"],
        "paper": [(row, PAPER[row.model]) for row in table if row.model in PAPER],
        "batch_sizes": inputs.latency.batch_sizes,
        "latency": inputs.latency,
        "findings": found,
        "marks": MARKS,
        "counted": report_findings.counted(found),
        "settings": settings(params),
        "groups": inputs.groups,
        "evaluator": inputs.evaluator,
        "judged": inputs.evaluations["teacher"].judged,
        "manifest": inputs.manifest,
        "suites": inputs.suites,
        "sights": inputs.sights,
        "unseen": inputs.unseen,
    }


def settings(params: Params) -> list[tuple[str, str]]:
    """The parameters that matter, each in a line."""
    moe, mob, model = params.moe, params.mob, params.model
    active = moe.shared_ratio + moe.top_k * moe.normal_ratio
    lines = [("Teacher", _teacher(params)), ("Data", _data(params))]
    lines.append(
        (
            "MoE",
            f"{moe.shared_ratio:g}S{moe.num_experts}E{moe.top_k}A: shared expert r_s = {moe.shared_ratio:g},"
            f" {moe.num_experts} normal experts of r_n = {moe.normal_ratio:g}, {moe.top_k} active;"
            f" {active:g} of r = {moe.expansion_ratio:g} active. Split by {moe.split}, dealt by {moe.deal}; router"
            f" {moe.router_init}{', W2 refitted' if moe.refit else ''}; gate {moe.gate_norm};"
            f" double blocks kept dense: {', '.join(map(str, moe.dense_double_blocks)) or 'none'}.",
        )
    )
    if moe.conditioning_dim is not None:
        lines.append(("AdaLN", f"conditioning compressed to {moe.conditioning_dim} channels"))
    for name, level in mob.levels.items():
        parts = [text for kind in ("double", "single") if (text := _groups(getattr(level, kind), kind))]
        lines.append((f"Level {name}", f"{' and '.join(parts) or 'no groups'}, {mob.active} active; from {level.init}"))
    for name, made in params.baselines.items():
        lines.append((f"Baseline {name}", f"{_baseline(made)}; from {made.init}. {_kd(made.kd)}"))
    for name, stage in (
        ("Shared-expert KD", params.kd.shared_expert),
        ("MoE KD", params.kd.moe),
        ("MoB KD", params.kd.mob),
    ):
        lines.append((name, _kd(stage)))
    if params.kd.joint:
        lines.append(("Joint", "MoE KD starts from the dense teacher, not from the trained shared experts"))
    guidance = "no guidance" if model.guidance_scale is None else f"guidance {model.guidance_scale:g}"
    lines.append(("Sampling", f"{model.num_inference_steps} steps, {guidance}, seed {params.seed}"))
    lines.append(("Evaluation", f"{params.eval.prompts} prompts, the same initial noise for every model"))
    return lines


def _teacher(params: Params) -> str:
    model = params.model
    if model.transformer is None:
        return f"{model.name}, from {model.path}, {model.resolution} px"
    size = model.transformer
    width = size.num_attention_heads * size.attention_head_dim
    blocks = f"{size.num_layers} double and {size.num_single_layers} single blocks, width {width}"
    steps = (
        ""
        if model.training is None
        else f"; {model.training.transformer.steps} steps of batch {model.training.transformer.batch_size}"
    )
    return f"{model.name}: FLUX with {blocks}, {model.resolution} px{steps}"


def _data(params: Params) -> str:
    data = params.data
    if data.embedded is None:
        return f"{data.name}: {data.kind} at {data.path}"
    kinds = ", ".join(KIND_TITLES[kind].lower() for kind in dict.fromkeys(data.embedded.kinds))
    return f"{data.name}: {data.embedded.samples} scenes of handwritten digits; {kinds}"


def _groups(groups: MoBGroupsConfig, kind: str) -> str:
    if groups.blocks:
        return f"{len(groups.blocks)} given group{'s' if len(groups.blocks) > 1 else ''} of {kind} blocks"
    return (
        f"{groups.groups} group{'s' if groups.groups > 1 else ''} of {groups.size} {kind} blocks"
        if groups.groups
        else ""
    )


def _baseline(made: BaselineConfig) -> str:
    blocks = {"double": made.double_blocks, "single": made.single_blocks}
    left = [f"{count} {kind} blocks" for kind, count in blocks.items() if count is not None]
    what = f"r = {made.ratio:g}" if made.ratio is not None else f"{' and '.join(left)} left"
    return f"{BASELINES[made.method]}, {what}"


def _kd(stage: KDStageConfig) -> str:
    run = stage.optimizer
    factors = ", ".join(f"{part.replace('_', ' ')} x {factor:g}" for part, factor in stage.rates.items())
    return (
        f"{run.steps} steps of batch {run.batch_size}, learning rate {run.learning_rate:g} ({run.schedule}){'; ' + factors if factors else ''};"
        f" trains {', '.join(stage.train).replace('_', ' ')};"
        f" λ feature {stage.lambda_feature:g}, λ balance {stage.lambda_balance:g}"
    )


def _environment(escape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        quantity=quantity, parameters=parameters, percent=percent, small=small, cell=_markdown_cell, unbroken=_unbroken
    )
    return environment


def _markdown_cell(text: str) -> str:
    """Text that cannot break out of a Markdown table's cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _unbroken(text: str) -> str:
    """Names such as MoE-L with a hyphen at which no line breaks."""
    return text.replace("MoE-", "MoE\N{NON-BREAKING HYPHEN}")


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


if __name__ == "__main__":
    execute("report", make)
