"""A LoRA fused into a transformer's weights: W + scale * alpha / rank * B A, for every layer that it changes.

- Names are read as diffusers reads them, so files of diffusers, PEFT, kohya and XLabs do.
- From file to file, a tensor at a time: 12 B parameters need the memory of the LoRA and of one matrix.
- In float32, rounded once to the weight's own format; every other byte of the file, header included, stays as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moe_core import checkpoint
from moe_core.errors import CheckpointError
from moe_core.lora_shapes import ADAPTER_CONFIG, BFL_BLOCKS, DOWN, PEFT_PREFIX, PREFIX, UP, check_lora

ADAPTER_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the same in the file."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CHUNK = 16 * 2**20


@dataclass(frozen=True)
class Change:
    """What a LoRA adds to one layer's weight [O, I], at scale 1: factor * up_OR @ down_RI; float32."""

    down_RI: Tensor
    up_OR: Tensor
    factor: float
    """alpha / rank, or alpha / sqrt(rank) for a rank-stabilised LoRA"""

    def add_to(self, weight_OI: Tensor, scale: float) -> Tensor:
        """The fused weight, in the format of the given one."""
        sum_OI = weight_OI.to(torch.float32, copy=True)
        return sum_OI.addmm_(self.up_OR, self.down_RI, alpha=scale * self.factor).to(weight_OI.dtype)


def read_lora(file: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
    """The changes by layer; `expected` has the shapes of the transformer's tensors.

    Raises CheckpointError, with the file, the layer and the numbers, for a file that is no LoRA of this transformer: see
    `check_lora`; also for what is not finite, for DoRA, and for an alpha that is given for some layers only.
    """
    stored = checkpoint.read_header(file)
    checkpoint.check_floats(stored)
    if dora := [name for name in stored if "dora_scale" in name or "lora_magnitude_vector" in name]:
        raise CheckpointError(f"{file}: {dora[0]} belongs to a DoRA; only plain LoRAs can be fused")
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: {name} has values that are infinite or not a number")
    matrices, alphas, settings = _normalised(file, tensors)
    ranks = check_lora(file, {name: tuple(tensor.shape) for name, tensor in matrices.items()}, expected)
    if unknown := sorted(alphas.keys() - ranks.keys()):
        raise CheckpointError(f"{file}: has an alpha of {unknown[0]}, but no matrices of it")
    if alphas and (without := sorted(ranks.keys() - alphas.keys())):
        raise CheckpointError(
            f"{file}: has an alpha for {len(alphas)} of {len(ranks)} layers, none for {without[0]}; all must have one, or none"
        )
    return {
        layer: Change(
            matrices[PREFIX + layer + DOWN],
            matrices[PREFIX + layer + UP],
            _factor(settings, layer, rank) if settings else alphas.get(layer, float(rank)) / rank,
        )
        for layer, rank in ranks.items()
    }


def fuse_file(source: Path, target: Path, changes: Mapping[str, Change], scale: float) -> set[str]:
    """Writes a safetensors file with the changed weights in their old places; returns the layers changed in it.

    Raises CheckpointError if a sum is too large for the weight's format.
    """
    fused: set[str] = set()
    tensors = sorted(checkpoint.read_header(source).items(), key=lambda item: item[1].start)
    with source.open("rb") as old, target.open("xb") as new:
        _copy(old, new, tensors[0][1].start)
        for name, stored in tensors:
            layer = name.removesuffix(".weight")
            size = stored.end - stored.start
            if name == layer or layer not in changes:
                _copy(old, new, size)
                continue
            weight = torch.frombuffer(bytearray(old.read(size)), dtype=DTYPES[stored.dtype]).view(stored.shape)
            result = changes[layer].add_to(weight, scale)
            if not result.isfinite().all():
                raise CheckpointError(
                    f"{source}: {name} with the LoRA at scale {scale:g} does not fit into {stored.dtype}"
                )
            new.write(result.contiguous().view(torch.uint8).numpy().data)
            fused.add(layer)
    return fused


def _copy(old: BinaryIO, new: BinaryIO, size: int) -> None:
    while size:
        part = old.read(min(size, CHUNK))
        new.write(part)
        size -= len(part)


def _normalised(file: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Any]]:
    """Matrices by diffusers' names; alphas by layer, where tensors give them; PEFT's settings, where the file has them."""
    if any(name.startswith(PEFT_PREFIX) for name in tensors) and not any(
        name.startswith(BFL_BLOCKS) for name in tensors
    ):
        # PEFT's own file. diffusers takes this prefix for that of a trainer that names the blocks as Black Forest Labs do.
        settings = checkpoint.read_json(file.parent / ADAPTER_CONFIG)
        return {PREFIX + name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}, {}, settings
    try:
        found, alphas = FluxLoraLoaderMixin.lora_state_dict(tensors, return_alphas=True)
    except (ValueError, KeyError, IndexError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{file}: diffusers cannot read its names as those of a FLUX LoRA ({error})") from error
    own = {name.removeprefix(PREFIX): tensor for name, tensor in found.items() if name.startswith(PREFIX)}
    if own and not any(".lora_A" in name for name in own):
        # As diffusers itself does when it loads one.
        own = convert_unet_state_dict_to_peft(own)
    matrices = {PREFIX + name: tensor for name, tensor in own.items()}
    matrices |= {name: tensor for name, tensor in found.items() if not name.startswith(PREFIX)}
    by_layer = {
        name.removeprefix(PREFIX).removesuffix(".alpha").split(".lora_A")[0]: float(alpha)
        for name, alpha in (alphas or {}).items()
    }
    with safe_open(file, framework="np") as opened:
        metadata = json.loads((opened.metadata() or {}).get(ADAPTER_METADATA, "{}"))
    settings = {name.removeprefix(PREFIX): value for name, value in metadata.items() if name.startswith(PREFIX)}
    if settings and by_layer:
        raise CheckpointError(f"{file}: has alphas both as tensors and in {ADAPTER_METADATA}; one of them must go")
    return matrices, by_layer, settings


def _factor(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / rank of a layer, by PEFT's settings; a pattern names layers by the end of their names."""
    alpha = float(settings.get("lora_alpha") or rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
