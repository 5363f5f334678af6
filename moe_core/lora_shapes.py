"""Does a LoRA fit the transformer? By names and shapes alone, so that a file's header is enough, without torch.

Names are diffusers': `transformer.<layer>.lora_A.weight` [R, I] and `.lora_B.weight` [O, R] for a layer of weight [O, I].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe_core.errors import CheckpointError

PREFIX = "transformer."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def is_plain(names: list[str]) -> bool:
    """Whether names are diffusers' own already: those of other trainers have no lora_A and lora_B."""
    return bool(names) and all(name.startswith(PREFIX) and name.endswith((DOWN, UP)) for name in names)


def check_lora(
    file: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """The rank of every layer that a LoRA changes; `expected` has the shapes of the transformer's tensors.

    Raises CheckpointError naming the file, the layer and the numbers: a key that is no LoRA matrix of the transformer, a
    layer that it lacks, one matrix without the other, or shapes that do not fit.
    """
    if not shapes:
        raise CheckpointError(f"{file}: holds no LoRA; it must have matrices lora_A and lora_B")
    ranks: dict[str, int] = {}
    for name in sorted(shapes):
        if not name.startswith(PREFIX):
            raise CheckpointError(
                f"{file}: {name} changes no layer of the transformer; only the transformer takes a LoRA here, text encoders"
                " stay as they are: remove such keys from the file"
            )
        layer = name.removeprefix(PREFIX).removesuffix(DOWN).removesuffix(UP)
        if not name.endswith((DOWN, UP)) or len(shapes[name]) != 2:
            raise CheckpointError(
                f"{file}: {name} {list(shapes[name])} is no matrix of a LoRA; only lora_A and lora_B of linear layers can be fused"
            )
        weight = expected.get(f"{layer}.weight")
        if weight is None or len(weight) != 2:
            raise CheckpointError(f"{file}: changes {layer}, but the transformer has no linear layer of that name")
        down, up = shapes.get(PREFIX + layer + DOWN), shapes.get(PREFIX + layer + UP)
        if down is None or up is None:
            have, lack = ("lora_A", "lora_B") if up is None else ("lora_B", "lora_A")
            raise CheckpointError(f"{file}: has {have} of {layer}, but no {lack}; both are needed")
        if down[1] != weight[1]:
            raise CheckpointError(f"{file}: lora_A of {layer} has {down[1]} columns; the layer has {weight[1]}")
        if up[0] != weight[0]:
            raise CheckpointError(f"{file}: lora_B of {layer} has {up[0]} rows; the layer has {weight[0]}")
        if down[0] != up[1]:
            raise CheckpointError(f"{file}: lora_A of {layer} has rank {down[0]}, lora_B {up[1]}; they must be equal")
        ranks[layer] = down[0]
    return ranks
