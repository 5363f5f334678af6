"""Does a LoRA fit the transformer? By names and shapes alone, so that a file's header is enough, without torch.

Names are diffusers': `transformer.<layer>.lora_A.weight` [R, I] and `.lora_B.weight` [O, R] for a layer of weight [O, I].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe_core import checkpoint
from moe_core.errors import CheckpointError

PREFIX = "transformer."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
PAIRS = ((DOWN, UP), ("down.weight", "up.weight"))
"""Ends of the names of a pair: diffusers' and PEFT's; kohya's (`.lora_down.weight`) and XLabs' (`.down.weight`)."""
FOREIGN = (".lora_down.weight", "processor", "query_norm.scale", "base_model")
"""By these diffusers knows the names of other trainers. It alone can say which layers they are: some are split by their values."""
PEFT_PREFIX = "base_model.model."
BFL_BLOCKS = (f"{PEFT_PREFIX}double_blocks.", f"{PEFT_PREFIX}single_blocks.")
ADAPTER_CONFIG = "adapter_config.json"
"""Beside the weights in a folder that PEFT saved."""

Shapes = Mapping[str, tuple[int, ...]]


def check_header(file: Path, shapes: Shapes, expected: Shapes | None) -> None:
    """What can be said of a LoRA by its header, before `moe_core.lora` reads it; `expected` as in `check_lora`, None if not known.

    Raises CheckpointError: as `check_lora` where the names are diffusers' or PEFT's; for all others, and where nothing is known of
    the transformer, if the two matrices of a pair have other ranks.
    """
    matrices = _in_diffusers_names(file, shapes)
    if matrices is not None and expected is not None:
        check_lora(file, matrices, expected)
        return
    for name in sorted(shapes):
        for down, up in PAIRS:
            other = name.removesuffix(down) + up
            if name.endswith(down) and other in shapes and shapes[name][:1] != shapes[other][1:2]:
                raise CheckpointError(
                    f"{file}: {name} has shape {list(shapes[name])}, {other} {list(shapes[other])}; the rows of the first must be"
                    " as many as the columns of the second: the rank"
                )


def _in_diffusers_names(file: Path, shapes: Shapes) -> Shapes | None:
    """The matrices as `moe_core.lora` will name them; None for names that diffusers must translate."""
    if any(name.startswith(PEFT_PREFIX) for name in shapes) and not any(name.startswith(BFL_BLOCKS) for name in shapes):
        checkpoint.read_json(file.parent / ADAPTER_CONFIG)  # must be there: it has the alphas
        return {PREFIX + name.removeprefix(PEFT_PREFIX): shape for name, shape in shapes.items()}
    own = any(name.startswith(PREFIX) and name.endswith((DOWN, UP)) for name in shapes)
    if not own or any(mark in name for name in shapes for mark in FOREIGN):
        return None
    return {name: shape for name, shape in shapes.items() if "alpha" not in name}


def check_lora(file: Path, shapes: Shapes, expected: Shapes) -> dict[str, int]:
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
