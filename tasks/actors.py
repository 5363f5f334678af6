"""A group of equal Ray actors that take units of work, whichever is free; or, without workers, the same in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_core.config import ComputeConfig

UnitT = TypeVar("UnitT")
AHEAD = 2
"""Units that an actor is given at once, so that it need not wait for the driver."""


class Group:
    """Actors, or one object in this process."""

    def __init__(self, members: list[Any], remote: bool) -> None:
        self._members, self._remote = members, remote

    def each(self, method: str, units: Sequence[UnitT]) -> Iterator[tuple[UnitT, Any]]:
        """Calls `method(unit)` for every unit; yields (unit, result) as they come back, and raises what a call raises."""
        if not self._remote:
            for unit in units:
                yield unit, getattr(self._members[0], method)(unit)
            return
        todo, running = list(enumerate(units)), {}

        def give(member: Any) -> None:
            if todo:
                number, unit = todo.pop(0)
                running[getattr(member, method).remote(unit)] = (member, number)

        for _ in range(AHEAD):
            for member in self._members:
                give(member)
        while running:
            [done], _ = ray.wait(list(running), num_returns=1)
            member, number = running.pop(done)
            result = ray.get(done)
            give(member)
            yield units[number], result

    def first(self, method: str, *arguments: Any) -> Any:
        """What one of them answers."""
        if not self._remote:
            return getattr(self._members[0], method)(*arguments)
        return ray.get(getattr(self._members[0], method).remote(*arguments))


@contextmanager
def actors(kind: type, arguments: tuple[Any, ...], compute: ComputeConfig, most: int | None = None) -> Iterator[Group]:
    """`compute.num_workers` actors of a class, at most `most`; 0: one object in this process.

    All or none: two stages side by side that each held half the machine would wait for each other for ever.
    """
    if compute.num_workers == 0:
        yield Group([kind(*arguments)], remote=False)
        return
    number = compute.num_workers if most is None else max(1, min(compute.num_workers, most))
    bundle = {"CPU": float(compute.cpus_per_worker)} | ({"GPU": 1.0} if compute.use_gpu else {})
    group = placement_group([bundle] * number, strategy="PACK")
    try:
        options = {
            "num_cpus": compute.cpus_per_worker,
            "num_gpus": int(compute.use_gpu),
            "max_restarts": compute.max_failures,
            "max_task_retries": compute.max_failures,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group),
        }
        yield Group([ray.remote(kind).options(**options).remote(*arguments) for _ in range(number)], remote=True)
    finally:
        # Ends the actors too.
        remove_placement_group(group)
