"""Plots of a study: validation KD loss along training, a panel for each source of claims.

The loss is that of the loop, on validation samples with noise of the run's own seed; the tables have the experiment's seed for all runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_core.config import StudyConfig
from tasks.plot_style import PARTS, WIDTH, plain_log, styled, svg

COLUMNS = 3


def curves(config: StudyConfig, runs: Mapping[tuple[str, str, int], dict[str, Any]], budget: str) -> str:
    """SVG text: mean over seeds and the range of all of them, of the arms that each source has claims of, from the teacher on."""
    panels: dict[str, list[str]] = {}
    for claim in config.claims.values():
        panels.setdefault(claim.source, []).extend((claim.better, claim.than))
    panels = panels or {"All arms": list(config.arms)}
    with styled():
        rows = math.ceil(len(panels) / COLUMNS)
        figure = Figure(figsize=(WIDTH, 2.7 * rows), layout="constrained")
        for index, (source, arms) in enumerate(panels.items()):
            axis = figure.add_subplot(rows, COLUMNS, index + 1)
            # The curve of one that goes on from another has that one's.
            within = {before for arm in arms for before in config.line(arm)[:-1]}
            for number, arm in enumerate(arm for arm in dict.fromkeys(arms) if arm not in within):
                steps, losses_SN = _whole_curve(config, runs, arm, budget)
                colour = PARTS[number % len(PARTS)]
                axis.plot(steps, losses_SN.mean(0), color=colour, lw=1.5, label=arm)
                axis.fill_between(steps, losses_SN.min(0), losses_SN.max(0), color=colour, alpha=0.18, lw=0)
            axis.set_title(source)
            axis.set_yscale("log")
            plain_log(axis)
            axis.set_xlabel("step")
            if index % COLUMNS == 0:
                axis.set_ylabel("validation KD loss")
            axis.legend(fontsize=7)
        return svg(figure)


def _whole_curve(
    config: StudyConfig, runs: Mapping[tuple[str, str, int], dict[str, Any]], arm: str, budget: str
) -> tuple[list[float], np.ndarray]:
    """Steps from the teacher on, and the loss of each seed [S, N] at them; an arm that goes on from another one begins with that one's."""
    steps: list[float] = []
    losses: list[list[float]] = [[] for _ in config.seeds]
    before = 0
    for one in config.line(arm):
        found = [runs[one, budget, seed]["curve"] for seed in config.seeds]
        steps += [before + step for step, _ in found[0]]
        for values, curve in zip(losses, found, strict=True):
            values += [loss for _, loss in curve]
        before = config.steps(one, budget)
    return steps, np.array(losses)
