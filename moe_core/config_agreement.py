"""Whether sections of the parameters agree with each other: called by `moe_core.config`, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_core.config import MoBConfig, MoEConfig


def check_widths(moe: MoEConfig, width: int) -> None:
    """Raises ValueError unless every expert has a whole number of hidden units at model width `width`."""
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


def check_blocks(moe: MoEConfig, mob: MoBConfig, num_double: int, num_single: int) -> None:
    """Raises ValueError where block indices or groups do not fit a model of so many blocks."""
    for index in moe.dense_double_blocks:
        if not 0 <= index < num_double:
            raise ValueError(
                f"moe.dense_double_blocks has {index}, but the model's double blocks are 0 to {num_double - 1}"
            )
    models = {"teacher", "checkpoints/moe", *(f"checkpoints/mob/{level}" for level in mob.levels)}
    for level, config in mob.levels.items():
        if config.init not in models - {f"checkpoints/mob/{level}"}:
            raise ValueError(
                f"mob.levels.{level}.init is '{config.init}'; it must be one of {', '.join(sorted(models))}, and not itself"
            )
        dense = set(moe.dense_double_blocks)
        if inside := [list(group) for group in config.double.blocks or () if dense & set(group)]:
            raise ValueError(
                f"mob.levels.{level}.double.blocks has {inside[0]}, but moe.dense_double_blocks keeps {sorted(dense)} dense;"
                " no group may have one of them"
            )
        free = longest_run(num_double, dense)
        if config.double.groups and config.double.blocks is None and config.double.size > free:
            raise ValueError(
                f"mob.levels.{level}.double: groups of {config.double.size} need as many consecutive blocks, but between"
                f" those that moe.dense_double_blocks keeps dense there are at most {free}"
            )
        for kind, groups, count in (("double", config.double, num_double), ("single", config.single, num_single)):
            where = f"mob.levels.{level}.{kind}"
            if groups.groups * groups.size > count:
                raise ValueError(
                    f"{where}: {groups.groups} groups of {groups.size} need {groups.groups * groups.size} blocks;"
                    f" the model has {count}"
                )
            for group in groups.blocks or ():
                if group[-1] >= count or group[0] < 0:
                    raise ValueError(
                        f"{where}.blocks has {list(group)}, but the model's {kind} blocks are 0 to {count - 1}"
                    )
            for size in {len(g) for g in groups.blocks or ()} | ({groups.size} if groups.groups else set()):
                if mob.active > size:
                    raise ValueError(f"mob.active is {mob.active}, but {where} has groups of {size} blocks")


def longest_run(count: int, without: set[int]) -> int:
    """The most consecutive numbers below `count` that are not in `without`."""
    longest = current = 0
    for index in range(count):
        current = 0 if index in without else current + 1
        longest = max(longest, current)
    return longest
