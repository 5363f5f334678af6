"""Models whose weights lie on many GPUs: FSDP2's units, loading from and writing to diffusers folders.

- A unit is what is gathered at once: a block, a MoB group, and the rest of the model. Each holds an equal part of every weight.
- The experts' packed weights are cut along the expert width, so that parts are equal whatever the number of experts.
- Routers are units of their own: the others compute in bf16 where that is asked for, routing stays in the masters' precision.
- What trains is kept in fp32 (the masters) and gathered in the precision computed in; what is frozen is kept in that precision.
- No process ever holds a whole model: a folder is read slice by slice, and written tensor by tensor.

FSDP2's collectives pair up by order. So every process must run every unit in the same order, also where it has no sample for
it: `MoBGroup.every_block` is set here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_core import checkpoint
from moe_core.checkpoint import Stored
from moe_core.dtensors import full
from moe_core.errors import CheckpointError
from moe_core.mob import BlockRouter, MoBGroup
from moe_core.moe import MoELayer, Router
from moe_core.shards import Entry, cut, file_names, write_index
from moe_core.transformer import FluxMoETransformer2DModel

if TYPE_CHECKING:
    from transformers import T5EncoderModel

FILE_BYTES = 2 * 2**30
"""Largest file of a written folder; also what its writer holds in memory."""

EXPERT_WIDTH = {"w1_EFD": 1, "b1_EF": 1, "w2_EDF": 2}
"""Parameters of a MoELayer, and which of their dimensions is the expert width."""


# -- precision: one rule, sharded or not


def is_router(name: str) -> bool:
    """Whether a parameter of a sparse FLUX, by its name, is a router's."""
    return "router" in name.split(".")


def lower_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps what is not trained in `dtype`, routers excepted; what is trained stays as it is: the masters."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not is_router(name):
            parameter.data = parameter.data.to(dtype)


# -- sharding


def shard_flux(model: FluxTransformer2DModel, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """Spreads a dense or sparse FLUX over a mesh of one dimension; on the meta device nothing is moved yet.

    compute_dtype: what units are gathered in; None: in the precision they are kept in. Set what trains before.
    Activations keep their precision: under autocast it is the operations that choose.
    """
    width_of = {
        id(getattr(layer, name)): dim
        for layer in model.modules()
        if isinstance(layer, MoELayer) and layer.num_experts
        for name, dim in EXPERT_WIDTH.items()
    }

    def placement(parameter: nn.Parameter) -> Shard | None:
        dim = width_of.get(id(parameter))
        # FSDP2 takes equal parts only, along any but the first dimension.
        return None if dim is None or parameter.shape[dim] % mesh.size() else Shard(dim)

    # Blocks return views, and nothing changes those in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Gradients are summed in fp32. Inputs keep their type: a timestep in bf16 would be another one.
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32 if compute_dtype else None, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, Router | BlockRouter):
            fully_shard(module, mesh=mesh, mp_policy=exact, reshard_after_forward=True)
        if isinstance(module, MoBGroup):
            module.every_block = True
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=True)
    # By default the outermost unit stays gathered after a forward pass: after a validation it would miss a change of its parts.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def shard_text_encoder(encoder: T5EncoderModel, mesh: DeviceMesh) -> None:
    """Spreads T5 over a mesh, block by block: with it on the CPU, a device holds one block and its own parts at most."""
    for block in encoder.encoder.block:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(encoder, mesh=mesh, reshard_after_forward=True)


# -- loading


def load_flux(
    folder: Path, mesh: DeviceMesh, device: torch.device, precision: torch.dtype, train: Iterable[str] = ()
) -> FluxTransformer2DModel:
    """A FLUX transformer, dense or sparse as its config.json says, from a diffusers folder straight into its shards.

    train: parts of a sparse model that are trained, see `FluxMoETransformer2DModel.set_trainable`; they are kept in at least fp32,
    the rest in `precision`. Each process reads its own slices only. Raises CheckpointError where the folder is not whole.
    """
    config = checkpoint.read_config(folder)
    classes = {kind.__name__: kind for kind in (FluxTransformer2DModel, FluxMoETransformer2DModel)}
    name = config.get("_class_name")
    if name not in classes:
        raise CheckpointError(
            f"{folder / checkpoint.CONFIG} has _class_name '{name}'; it must be one of {', '.join(classes)}"
        )
    with torch.device("meta"):
        model = classes[name].from_config(config)
    stored = checkpoint.check_weights(folder, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    model.requires_grad_(False)
    if isinstance(model, FluxMoETransformer2DModel):
        model.set_trainable(train)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.promote_types(precision, torch.float32))
    lower_frozen(model, precision)
    shard_flux(model, mesh, precision if precision == torch.bfloat16 else None)
    model.to_empty(device=device)
    _read_parts(model, stored)
    return model


@torch.no_grad()
def _read_parts(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    parameters = dict(model.named_parameters())
    for path in sorted({tensor.path for tensor in stored.values()}):
        with safe_open(path, framework="pt") as file:
            for name, parameter in parameters.items():
                if stored[name].path == path:
                    target = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    # Copied: a tensor mapped from a file may start at any byte, and CPU kernels then round otherwise.
                    target.copy_(file.get_slice(name)[_own_slices(parameter)])


def _own_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this process keeps: FSDP2 deals equal parts along one dimension, the last ones shorter."""
    slices = [slice(None)] * parameter.ndim
    if isinstance(parameter, DTensor):
        [placement], mesh = parameter.placements, parameter.device_mesh
        assert isinstance(placement, Shard)
        length = parameter.shape[placement.dim]
        each = -(-length // mesh.size())
        start = min(mesh.get_local_rank() * each, length)
        slices[placement.dim] = slice(start, min(start + each, length))
    return tuple(slices)


# -- writing


def save_flux(model: FluxTransformer2DModel, folder: Path, dtype: torch.dtype | None, writes: bool) -> None:
    """Writes a diffusers model folder; every process must call this, the one with `writes` holds a file's tensors at most.

    dtype: of the written weights; None: as they are kept.
    """
    state = model.state_dict()
    files = cut([Entry(name, dtype or t.dtype, tuple(t.shape)) for name, t in state.items()], FILE_BYTES)
    for file, members in zip(file_names(len(files)), files, strict=True):
        tensors: dict[str, Tensor] = {}
        for entry in members:
            whole = full(state[entry.name].detach())
            if writes:
                tensors[entry.name] = whole.to("cpu", entry.dtype, copy=True).contiguous()
            del whole
        if writes:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if writes:
        # FSDP2 gives a sharded module a class of its own. Where a model was loaded from is no part of it.
        config = json.loads(model.to_json_string()) | {"_class_name": _class_of(model)}
        config.pop("_name_or_path", None)
        (folder / checkpoint.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_index(folder, files)


def _class_of(model: nn.Module) -> str:
    kinds = (kind.__name__ for kind in type(model).__mro__)
    return next(name for name in kinds if name in (FluxMoETransformer2DModel.__name__, FluxTransformer2DModel.__name__))
