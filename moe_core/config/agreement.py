"""Whether sections of the parameters agree with each other, and with the model: looked at before any work.

Each function raises ValueError that names the parameters, their values and the rule; `moe_core.config.params` calls them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_core.config import BaselineConfig, EvaluatedModel, MoBConfig, MoEConfig, Params

FLUX_RATIO = 4.0
"""Hidden width of FLUX's FFNs over its width."""

DIGIT_PIXELS = 8
"""Side of the embedded data's digits."""


def check_widths(moe: MoEConfig, width: int) -> None:
    """Every expert must have a whole number of hidden units at model width `width`, and all of them the dense FFN's."""
    if moe.expansion_ratio != FLUX_RATIO:
        raise ValueError(f"moe.expansion_ratio is {moe.expansion_ratio:g}; the FFNs of FLUX have {FLUX_RATIO:g}")
    for name in ("shared_ratio", "normal_ratio"):
        value = getattr(moe, name) * width
        if abs(value - round(value)) > 1e-6:
            raise ValueError(
                f"moe.{name} * width = {getattr(moe, name):g} * {width} = {value:g}; it must be a whole number"
            )
    if moe.conditioning_dim is not None and moe.conditioning_dim > width:
        raise ValueError(
            f"moe.conditioning_dim is {moe.conditioning_dim}; it must be at most the model's width, {width}"
        )


def check_fit(moe: MoEConfig, joint: bool) -> None:
    """W2 is fitted, and units are chosen, for all experts together, so none of them may have been trained before."""
    if joint or not (moe.refit or moe.split == "greedy"):
        return
    what = "moe.refit is true" if moe.refit else "moe.split is greedy"
    raise ValueError(
        f"{what}, but kd.joint false; all experts are fitted together, so kd.joint must be true (moe=1s12e2a is a recipe in two steps)"
    )


def check_baselines(
    baselines: Mapping[str, BaselineConfig], moe: MoEConfig, width: int, num_double: int, num_single: int
) -> None:
    """Baselines must fit a model of this width and so many blocks; one that starts from another must leave less of it."""
    for name, baseline in baselines.items():
        if baseline.ratio is not None:
            hidden = baseline.ratio * width
            if baseline.ratio >= moe.expansion_ratio or abs(hidden - round(hidden)) > 1e-6:
                raise ValueError(
                    f"baselines.{name}.ratio is {baseline.ratio:g}; it must be below {moe.expansion_ratio:g}, and times the width"
                    f" {width} a whole number, not {hidden:g}"
                )
        start = baselines.get(baseline.init.removeprefix("checkpoints/baselines/"))
        for key, all_blocks in (("double_blocks", num_double), ("single_blocks", num_single)):
            there = (getattr(start, key) if start else None) or all_blocks
            left = getattr(baseline, key)
            if left is not None and left > there:
                raise ValueError(f"baselines.{name}.{key} is {left}; the model it starts from has {there}")


def check_baseline_starts(baselines: Mapping[str, BaselineConfig]) -> None:
    """A baseline starts from the teacher, or from one before it that has whole blocks."""
    possible = ["teacher"]
    for name, baseline in baselines.items():
        if baseline.init not in possible:
            raise ValueError(
                f"baselines.{name}.init is '{baseline.init}'; it must be one of those before it: {', '.join(possible)}"
            )
        possible.append(f"checkpoints/baselines/{name}")
        start = baselines.get(baseline.init.removeprefix("checkpoints/baselines/"))
        if start is not None and start.method == "diff_pruning":
            raise ValueError(
                f"baselines.{name}.init is '{baseline.init}', whose FFNs are cut; only models of whole blocks lose blocks"
            )


def _check_names(where: str, names: Iterable[str], others: set[str]) -> None:
    if taken := others & set(names):
        raise ValueError(f"{where} has {min(taken)}; that is the name of another model")


def checkpoints(levels: Iterable[str], baselines: Iterable[str]) -> dict[str, str]:
    """Name of a model that the stages make, or are given as the teacher -> where its transformer lies."""
    return {
        "teacher": "data/teacher/transformer",
        "shared": "data/checkpoints/shared_expert",
        "L": "data/checkpoints/moe",
        **{level: f"data/checkpoints/mob/{level}" for level in levels},
        **{name: f"data/checkpoints/baselines/{name}" for name in baselines},
    }


def check_levels(mob: MoBConfig, baselines: Mapping[str, BaselineConfig], models: Mapping[str, EvaluatedModel]) -> None:
    """What is evaluated must be what is made, and given baselines in their folder; a level that starts from another keeps its groups."""
    made = checkpoints(mob.levels, baselines)
    _check_names("mob.levels", mob.levels, {"teacher", "shared", "L"})
    _check_names("baselines", baselines, {"teacher", "shared", "L", *mob.levels})
    places = {name: made.get(name, f"data/baselines/{name}") for name in {**made, **models}}
    if wrong := [name for name, place in places.items() if name not in models or models[name].checkpoint != place]:
        raise ValueError(
            f"models.{wrong[0]} is {models[wrong[0]].checkpoint if wrong[0] in models else 'missing'}; with mob.levels"
            f" {', '.join(mob.levels) or 'none'} models must be {', '.join(made)} and baselines, and {wrong[0]}'s checkpoint"
            f" {places[wrong[0]]}"
        )
    for name in (models.keys() - made.keys()) | baselines.keys():
        if not name.isidentifier():
            raise ValueError(f"models has '{name}'; a baseline's name must be of letters, digits and _ alone")
        if models[name].reference != "data/images/teacher":
            raise ValueError(
                f"models.{name}.reference is {models[name].reference}; a baseline's must be data/images/teacher"
            )
    starts = {"teacher", "checkpoints/moe", *(f"checkpoints/mob/{level}" for level in mob.levels)}
    for level, config in mob.levels.items():
        if config.init not in starts - {f"checkpoints/mob/{level}"}:
            raise ValueError(
                f"mob.levels.{level}.init is '{config.init}'; it must be one of {', '.join(sorted(starts))}, and not itself"
            )
        start = config.init.removeprefix("checkpoints/mob/")
        if start not in mob.levels:
            continue
        for kind in ("double", "single"):
            own, kept = getattr(config, kind), getattr(mob.levels[start], kind)
            where, there = f"mob.levels.{level}.{kind}", f"level {start}, from which it starts,"
            if own.blocks is not None:
                if lost := [list(group) for group in kept.blocks or () if group not in own.blocks]:
                    raise ValueError(f"{where}.blocks lacks {lost[0]}, a group of {there} which stays")
            elif own.groups < (count := kept.groups or len(kept.blocks or ())):
                raise ValueError(f"{where}.groups is {own.groups}, but {there} has {count}, and they stay")
            elif kept.groups and own.size != kept.size:
                raise ValueError(
                    f"{where}.size is {own.size}, but the groups of {there} have {kept.size}, and they stay"
                )


def check_blocks(moe: MoEConfig, mob: MoBConfig, num_double: int, num_single: int) -> None:
    """Block indices and groups must fit a model of so many blocks."""
    for index in moe.dense_double_blocks:
        if not 0 <= index < num_double:
            raise ValueError(
                f"moe.dense_double_blocks has {index}, but the model's double blocks are 0 to {num_double - 1}"
            )
    dense = set(moe.dense_double_blocks)
    for level, config in mob.levels.items():
        if inside := [list(group) for group in config.double.blocks or () if dense & set(group)]:
            raise ValueError(
                f"mob.levels.{level}.double.blocks has {inside[0]}, but moe.dense_double_blocks keeps {sorted(dense)} dense;"
                " no group may have one of them"
            )
        for kind, groups, count, taken in (
            ("double", config.double, num_double, dense),
            ("single", config.single, num_single, set()),
        ):
            where = f"mob.levels.{level}.{kind}"
            if groups.groups and (room := windows(count, groups.size, taken)) < groups.groups:
                raise ValueError(
                    f"{where}: {groups.groups} groups of {groups.size} consecutive blocks do not fit: there is room for {room}"
                    f" among {count} blocks" + (f", of which {sorted(taken)} stay dense" if taken else "")
                )
            for group in groups.blocks or ():
                if group[-1] >= count or group[0] < 0:
                    raise ValueError(
                        f"{where}.blocks has {list(group)}, but the model's {kind} blocks are 0 to {count - 1}"
                    )
            for size in {len(g) for g in groups.blocks or ()} | ({groups.size} if groups.groups else set()):
                if mob.active > size:
                    raise ValueError(f"mob.active is {mob.active}, but {where} has groups of {size} blocks")


def windows(count: int, size: int, without: set[int]) -> int:
    """How many disjoint runs of `size` consecutive numbers below `count` avoid those in `without`."""
    found = run = 0
    for index in range(count):
        run = 0 if index in without else run + 1
        if run == size:
            found, run = found + 1, 0
    return found


def check_samples(params: Params) -> None:
    """There must be as many samples and pixels as are asked for."""
    shard, embedded = params.data.shard, params.data.embedded
    if params.kd.validation_samples > shard.validation_samples:
        raise ValueError(
            f"kd.validation_samples is {params.kd.validation_samples}, but data.shard.validation_samples keeps only"
            f" {shard.validation_samples}"
        )
    if params.eval.classifier is not None and params.data.kind != "embedded":
        raise ValueError(
            f"eval.classifier is set, but data.kind is {params.data.kind}; it finds the embedded digits and nothing else:"
            " eval.classifier=null makes pictures that nobody judges"
        )
    if embedded is not None and params.model.resolution % (unit := embedded.grid * DIGIT_PIXELS):
        raise ValueError(
            f"model.resolution is {params.model.resolution}; with data.embedded.grid {embedded.grid} it must be a multiple of {unit}"
        )


def check_workers(params: Params) -> None:
    """Every worker must get an equal part of what goes through the model at once; models are sharded over worker processes."""
    batches = [
        ("shared_expert_kd", "kd.shared_expert.optimizer", params.kd.shared_expert.optimizer),
        ("moe_kd", "kd.moe.optimizer", params.kd.moe.optimizer),
        ("mob_kd", "kd.mob.optimizer", params.kd.mob.optimizer),
        *(("baseline", f"baselines.{name}.kd.optimizer", made.kd.optimizer) for name, made in params.baselines.items()),
    ]
    if (training := params.model.training) is not None:
        batches += [
            ("teacher", f"model.training.{name}", getattr(training, name)) for name in ("vae", "text", "transformer")
        ]
    for stage, where, optimizer in batches:
        workers = params.compute.of(stage).num_workers
        if not workers and params.compute.sharding == "full" and stage != "teacher":
            raise ValueError(
                f"compute.sharding is full, but {stage} has num_workers 0, which trains in the calling process; it must be at least 1"
            )
        if workers and optimizer.at_once % workers:
            key = "batch_size" if optimizer.micro_batch is None else "micro_batch"
            raise ValueError(
                f"{where}.{key} is {optimizer.at_once}; it must be a multiple of the {workers} workers of {stage}"
                " (compute.num_workers)"
            )
