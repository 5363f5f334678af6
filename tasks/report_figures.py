"""The report's plots, as SVG text that is the same for the same numbers.

- Block names are the teacher's: D3 image is the image branch's FFN of double block 3, S7 the single block 7.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tasks.plot_style import ACCENT, INK, MUTED, PARTS, SECOND, WIDTH, plain_log, styled, svg
from tasks.report_inputs import BlockChange, Inputs
from tasks.report_table import title

BALANCE = LinearSegmentedColormap.from_list("balance", [SECOND, "#f7f7f5", ACCENT])


def draw(inputs: Inputs) -> dict[str, str]:
    """All plots of the report: file stem -> SVG text. A plot that has nothing to show (no MoB level) is left out."""
    plots: dict[str, Callable[[Inputs], Figure | None]] = {
        "size_and_accuracy": size_and_accuracy,
        "loss_curves": loss_curves,
        "block_change": block_change,
        "expert_use": expert_use,
        "expert_use_by_timestep": expert_use_by_timestep,
        "block_use": block_use,
    }
    with styled():
        figures = {name: plot(inputs) for name, plot in plots.items()}
        return {name: svg(figure) for name, figure in figures.items() if figure is not None}


def size_and_accuracy(inputs: Inputs) -> Figure:
    """The paper's Fig. 2: activated parameters by module, and against them prompt accuracy, or where nobody judged the distance to the teacher."""
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    counts = [inputs.evaluations[m].params for m in inputs.models]
    modules = list(dict.fromkeys(name for count in counts for name in count.by_module))
    biggest = max(count.activated for count in counts)
    unit, scale = next((u, s) for u, s in (("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)) if biggest >= s)
    base = np.zeros(len(counts))
    for index, module in enumerate(modules):
        values = np.array([count.by_module.get(module, 0) / scale for count in counts])
        left.bar(
            inputs.models,
            values,
            bottom=base,
            width=0.66,
            color=PARTS[index % len(PARTS)],
            label=module.replace("_", " "),
        )
        base += values
    for x, count in enumerate(counts):
        left.text(x, count.activated / scale, f"{count.activated / scale:.3g}", ha="center", va="bottom", fontsize=8)
    left.set_title("Activated parameters by module")
    left.set_ylabel(f"parameters ({unit})" if unit else "parameters")
    left.grid(axis="x", visible=False)
    left.set_ylim(0, biggest / scale * 1.1)
    left.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, reverse=True)

    for model, count in zip(inputs.models, counts, strict=True):
        own = inputs.evaluations[model]
        size, colour = count.activated / scale, {"teacher": INK, "shared": SECOND}.get(model, ACCENT)
        if own.judged is None:
            y, spread = own.teacher_distance, None
        else:
            y = 100 * own.judged.accuracy
            spread = [[max(y - 100 * own.judged.accuracy_low, 0)], [max(100 * own.judged.accuracy_high - y, 0)]]
        right.errorbar(size, y, yerr=spread, fmt="o", color=colour, markersize=6, capsize=3, elinewidth=1)
        right.annotate(model, (size, y), xytext=(7, 4), textcoords="offset points", color=colour, fontweight="bold")
    judged = inputs.evaluator is not None
    right.set_title("Prompt accuracy (95 % interval)" if judged else "Distance to the teacher's pictures")
    right.set_xlabel(f"activated parameters ({unit})" if unit else "activated parameters")
    right.set_ylabel("%" if judged else "root mean square difference")
    right.margins(x=0.12)
    return figure


def loss_curves(inputs: Inputs) -> Figure:
    """Train and validation loss of every trained stage, one panel a stage."""
    columns = 4 if len(inputs.curves) > 6 else 3
    lines = math.ceil(len(inputs.curves) / columns)
    figure = Figure(figsize=(WIDTH, 2.3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (stage, curve) in zip(axes, inputs.curves.items(), strict=False):
        metric = curve_metric(curve)
        for split, colour, style in (
            ("train", "#9fb3c0", {"lw": 1.1}),
            ("validation", SECOND, {"marker": "o", "ms": 3.5, "lw": 1.3}),
        ):
            rows = curve[(curve["split"] == split) & (curve["metric"] == metric)]
            axis.plot(rows["step"], rows["value"], color=colour, label=split, **style)
        axis.set_yscale("log")
        axis.set_title(f"{stage}: {metric}")
        axis.set_xlabel("step")
        plain_log(axis)
    for axis in axes[len(inputs.curves) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles, labels, fontsize=8)
    return figure


def curve_metric(curve: pd.DataFrame) -> str:
    """What a stage's panel shows: the output distillation loss (eq. 7) where both splits have it, else the loss."""
    both = set.intersection(*(set(curve[curve["split"] == split]["metric"]) for split in ("train", "validation")))
    return "distill" if "distill" in both else "loss"


def block_change(inputs: Inputs) -> Figure:
    """The paper's Fig. 3: how much each block of the teacher changes its input, by prompt and noise; groups shaded."""
    change: BlockChange = inputs.block_change
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    x = np.arange(len(change.blocks))
    colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.92, max(len(change.sigmas), 2)))
    for values in change.by_prompt:
        left.plot(x, values, color=ACCENT, alpha=0.18, lw=0.8)
    for index, (sigma, values) in enumerate(zip(change.sigmas, change.by_sigma, strict=True)):
        right.plot(x, values, color=colours[index], lw=1.1, label=f"{sigma:.2f}")
    doubles = sum(1 for name in change.blocks if not name.startswith("single_"))
    level, groups = list(inputs.groups.items())[-1] if inputs.groups else ("", {})
    for axis, heading in ((left, "by prompt"), (right, "by noise level (sigma)")):
        axis.plot(x, change.relative, color="black", lw=1.8, label="mean")
        axis.axvline(doubles - 0.5, color=MUTED, lw=0.8, ls=":")
        for kind, offset in (("double", 0), ("single", doubles)):
            for group in groups.get(kind, []):
                axis.axvspan(offset + group[0] - 0.4, offset + group[-1] + 0.4, color="#e8b04b", alpha=0.22, lw=0)
        axis.set_yscale("log")
        axis.set_title(heading)
        _block_ticks(axis, change.blocks)
        plain_log(axis)
    left.set_ylabel("|out \N{MINUS SIGN} in|² / |in|²")
    right.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if groups:
        figure.supxlabel(f"block (D double, S single); shaded: groups of level {level}", fontsize=8.5, color=MUTED)
    return figure


def expert_use(inputs: Inputs) -> Figure | None:
    """The paper's Fig. 6, all layers: share of token-slots each expert gets, a heat map a model."""
    models = [m for m in inputs.models if inputs.evaluations[m].expert_use]
    if not models:
        return None
    # rows of every map are those of the model with most layers, so that the maps line up
    layers = max((_layers(inputs.evaluations[m].expert_use) for m in models), key=len)
    experts = max(len(shares) for m in models for shares in inputs.evaluations[m].expert_use.values())
    maps = {m: _heat(inputs.evaluations[m].expert_use, layers, experts) for m in models}
    top = max(float(np.nanmax(values)) for values in maps.values())
    figure = Figure(figsize=(WIDTH, min(1.2 + 0.19 * len(layers), 12)), layout="constrained")
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axis, (model, values) in zip(axes, maps.items(), strict=True):
        image = _heat_map(axis, values, top)
        axis.set_title(title(model))
        axis.set_xlabel("expert")
    _layer_ticks(axes[0], layers)
    figure.colorbar(image, ax=axes, shrink=0.6, label=f"over an even share (1/{experts})")
    return figure


def expert_use_by_timestep(inputs: Inputs) -> Figure | None:
    """Fig. 6 (b) and (e): level L's use by sampling step in a double block's image branch and in a single block."""
    use = inputs.evaluations["L"].expert_use_by_timestep
    shown = [
        layer
        for layer in (_middle(use, r"transformer_blocks\.\d+\.ff$"), _middle(use, r"single_transformer_blocks\."))
        if layer
    ]
    if not shown:
        return None
    maps = {layer: np.array(use[layer]).T * len(use[layer][0]) for layer in shown}
    top = max(float(values.max()) for values in maps.values())
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, (layer, values) in zip(axes, maps.items(), strict=True):
        image = _heat_map(axis, values, top)
        axis.set_title(f"MoE-L, {short(layer)}")
        axis.set_xlabel("sampling step (0: pure noise)")
        axis.set_ylabel("expert")
    figure.colorbar(image, ax=axes, shrink=0.8, label="over an even share")
    return figure


def block_use(inputs: Inputs) -> Figure | None:
    """How often each block of a MoB group was chosen, overall and over the sampling steps."""
    models = [m for m in inputs.models if inputs.evaluations[m].block_use]
    if not models:
        return None
    count = sum(len(inputs.evaluations[m].block_use) for m in models)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * count), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.25))
    labels: list[str] = []
    steps = max(len(rows) for m in models for rows in inputs.evaluations[m].block_use_by_timestep.values())
    for model in models:
        own = inputs.evaluations[model]
        for group, shares in sorted(own.block_use.items(), key=lambda item: _order(item[0])):
            y = len(labels)
            first = int(re.findall(r"\d+", group)[0])
            _stack(left, y, np.array([shares]), [first + i for i in range(len(shares))])
            _stack(right, y, np.array(own.block_use_by_timestep[group]), None)
            labels.append(f"{model}  {short(group)}")
    left.set_title("all steps")
    right.set_title("by sampling step (0: pure noise)")
    left.set_xlabel("share of samples and steps")
    right.set_xlim(-0.5, steps - 0.5)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (left, right):
        axis.set_yticks(range(len(labels)), labels)
        axis.grid(visible=False)
    left.set_ylim(len(labels) - 0.4, -0.6)
    return figure


def _stack(axis: Axes, y: int, shares_SM: np.ndarray, names: Sequence[int] | None) -> None:
    """Shares of M blocks at S steps (rows): one lying bar where S is 1, else a column of colours a step."""
    parts_SM = shares_SM / shares_SM.sum(axis=1, keepdims=True)
    edges = np.concatenate([np.zeros((len(parts_SM), 1)), parts_SM.cumsum(axis=1)], axis=1)
    for block in range(parts_SM.shape[1]):
        colour = PARTS[block % len(PARTS)]
        if names is None:
            axis.bar(
                range(len(parts_SM)),
                0.72 * parts_SM[:, block],
                bottom=y - 0.36 + 0.72 * edges[:, block],
                width=0.94,
                color=colour,
            )
            continue
        axis.barh(y, parts_SM[0, block], left=edges[0, block], height=0.72, color=colour)
        if parts_SM[0, block] > 0.06:
            centre = edges[0, block] + parts_SM[0, block] / 2
            axis.text(
                centre, y, str(names[block]), ha="center", va="center", color="white", fontsize=8, fontweight="bold"
            )


def _heat(use: Mapping[str, Sequence[float]], layers: Sequence[str], experts: int) -> np.ndarray:
    """Layers x experts, over an even share; nan where a model has no such layer."""
    values = np.full((len(layers), experts), np.nan)
    for row, layer in enumerate(layers):
        shares = use.get(layer, [])
        values[row, : len(shares)] = np.array(shares) * len(shares)
    return values


def _heat_map(axis: Axes, values: np.ndarray, top: float) -> Any:
    """Shares over an even share, white where balanced. pcolormesh, not imshow: cells stay crisp vectors."""
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(top, 2.0))
    mesh = axis.pcolormesh(values, cmap=BALANCE, norm=norm, edgecolors="white", linewidth=0.3)
    axis.set_ylim(values.shape[0], 0)
    axis.grid(visible=False)
    step = max(1, math.ceil(values.shape[1] / 12))
    axis.set_xticks(
        np.arange(0, values.shape[1], step) + 0.5, [str(i) for i in range(0, values.shape[1], step)], fontsize=7
    )
    if values.shape[0] <= 16:
        axis.set_yticks(np.arange(values.shape[0]) + 0.5, [str(i) for i in range(values.shape[0])], fontsize=7)
    return mesh


def _layers(use: Mapping[str, object]) -> list[str]:
    return sorted(use, key=_order)


def _order(name: str) -> tuple[bool, list[int], str]:
    """Double blocks before single ones, then by index."""
    return name.startswith("single_"), [int(n) for n in re.findall(r"\d+", name)], name


def _middle(use: Mapping[str, object], pattern: str) -> str | None:
    """The middle one of the layers whose name matches, as a representative."""
    names = [name for name in _layers(use) if re.match(pattern, name)]
    return names[len(names) // 2] if names else None


def short(name: str) -> str:
    """Name in a plot: transformer_blocks.3.ff_context -> D3 text; transformer_blocks.1-3 -> D1-3."""
    stack, _, rest = name.partition(".")
    index, _, part = rest.partition(".")
    letter = "S" if stack.startswith("single_") else "D"
    branch = {"ff": " image", "ff_context": " text"}.get(part, "")
    return f"{letter}{index}{branch}"


def _block_ticks(axis: Axes, blocks: Sequence[str]) -> None:
    step = max(1, math.ceil(len(blocks) / 20))
    axis.set_xticks(range(0, len(blocks), step), [short(name) for name in blocks[::step]], fontsize=7)
    axis.grid(axis="x", visible=False)


def _layer_ticks(axis: Axes, layers: Sequence[str]) -> None:
    step = max(1, math.ceil(len(layers) / 50))
    axis.set_yticks(np.arange(0, len(layers), step) + 0.5, [short(name) for name in layers[::step]], fontsize=7)
