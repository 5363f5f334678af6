"""Compression of the AdaLN conditioning, from the model's width to `conditioning_dim` channels (paper, Sec. 4.1).

- Principal components of the conditioning y over a calibration set, turned so that each comes as near as possible to
  one of y's own channels, go into the last layer of each embedder: z = R^T (y - mean) + offset.
- Every AdaLN linear is then fitted by ridge regression from SiLU(z) to what the teacher's gives for y.
- Why turned: SiLU acts on each channel by itself, so in a basis of its own choosing even all components together could
  not reproduce W SiLU(y). Turned, z at full rank is y with its channels reordered, and the compression is exact.

Shapes: N calibration vectors, D the teacher's conditioning width, C conditioning_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from moe_core.errors import ConfigError


class Projection(NamedTuple):
    """z = (y - mean) R + offset, in fp64."""

    basis_DC: Tensor
    mean_D: Tensor
    offset_C: Tensor

    def __call__(self, vectors_ND: Tensor) -> Tensor:
        return (vectors_ND - self.mean_D) @ self.basis_DC + self.offset_C


def adaln_linears(model: FluxTransformer2DModel) -> dict[str, nn.Linear]:
    """Every linear layer that turns the conditioning into modulations, by its parameter prefix."""
    norms = (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)
    return {f"{name}.linear": module.linear for name, module in model.named_modules() if isinstance(module, norms)}


def embedder_outputs(model: FluxTransformer2DModel) -> dict[str, nn.Linear]:
    """The last layer of each embedder (timestep, guidance, pooled text); the conditioning is their outputs' sum."""
    children = model.time_text_embed.named_children()
    return {
        f"time_text_embed.{name}.linear_2": child.linear_2 for name, child in children if hasattr(child, "linear_2")
    }


@torch.no_grad()
def compressed_weights(
    teacher: FluxTransformer2DModel, vectors_ND: Tensor, conditioning_dim: int, ridge: float = 1e-3
) -> dict[str, Tensor]:
    """Weights of the compressed embedder outputs and AdaLN linears, by the teacher's parameter names, in its dtype.

    vectors_ND: outputs of the teacher's `time_text_embed` over a calibration set. ridge: relative to the mean variance
    of SiLU(z).
    Raises ConfigError if the vectors have another width than the teacher's conditioning, are fewer than two, or are not
    finite.
    """
    y_ND = _checked(teacher, vectors_ND)
    projection = _project(y_ND, conditioning_dim)
    outputs = embedder_outputs(teacher)
    weights: dict[str, Tensor] = {}
    for position, (name, linear) in enumerate(outputs.items()):
        bias_D = linear.bias.double()
        bias_C = bias_D @ projection.basis_DC
        if position == 0:  # what belongs to the sum, not to one embedder, is added once
            bias_C = bias_C + projection.offset_C - projection.mean_D @ projection.basis_DC
        weights[f"{name}.weight"] = (projection.basis_DC.T @ linear.weight.double()).to(linear.weight.dtype)
        weights[f"{name}.bias"] = bias_C.to(linear.bias.dtype)

    features_NC = F.silu(projection(y_ND))
    mean_C = features_NC.mean(0)
    centred_NC = features_NC - mean_C
    gram_CC = centred_NC.T @ centred_NC / len(centred_NC)
    strength = ridge * gram_CC.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    factor_CC = torch.linalg.cholesky(
        gram_CC + strength * torch.eye(len(gram_CC), dtype=gram_CC.dtype, device=gram_CC.device)
    )
    target_ND = F.silu(y_ND)
    moments_CD = centred_NC.T @ (target_ND - target_ND.mean(0)) / len(centred_NC)
    # The teacher's linear maps SiLU(y); fitting SiLU(y) once and applying each layer to the fit is the same regression
    # as one a layer.
    fit_CD = torch.cholesky_solve(moments_CD, factor_CC)
    rest_D = target_ND.mean(0) - mean_C @ fit_CD
    for name, linear in adaln_linears(teacher).items():
        weight = linear.weight.double()
        weights[f"{name}.weight"] = (weight @ fit_CD.T).to(linear.weight.dtype)
        weights[f"{name}.bias"] = (linear.bias.double() + weight @ rest_D).to(linear.bias.dtype)
    return weights


def compress(
    student: FluxTransformer2DModel, teacher: FluxTransformer2DModel, vectors_ND: Tensor, ridge: float = 1e-3
) -> None:
    """Sets the student's embedders and AdaLN linears, in place, to the compression of the teacher's."""
    conditioning_dim = student.config.get("conditioning_dim")
    if conditioning_dim is None:
        raise ConfigError("the student's conditioning_dim is null; a compression needs the width to compress to")
    weights = {f"time_text_embed.{name}": tensor for name, tensor in teacher.time_text_embed.state_dict().items()}
    weights.update(compressed_weights(teacher, vectors_ND, conditioning_dim, ridge))
    student.load_state_dict(weights, strict=False)


@torch.no_grad()
def modulation_error(
    student: FluxTransformer2DModel, teacher: FluxTransformer2DModel, vectors_ND: Tensor
) -> dict[str, float]:
    """Relative error of every AdaLN layer's modulations: sum |student - teacher|^2 / sum |teacher - its mean|^2, over
    the vectors.

    1 is what a constant would get. It is meant for a student as converted: one whose embedders were trained since no
    longer answers to the teacher's vectors. The layers are those of the teacher; the student's must have the same
    names, so it has no MoB groups.
    """
    y_ND = _checked(teacher, vectors_ND)
    student_linears = adaln_linears(student)
    z_NC = _student_conditioning(student, teacher, y_ND)
    errors = {}
    for name, linear in adaln_linears(teacher).items():
        if name not in student_linears:
            raise ConfigError(f"the student has no layer {name}; modulations are compared before blocks are grouped")
        target = F.linear(F.silu(y_ND), linear.weight.double(), linear.bias.double())
        own = student_linears[name]
        output = F.linear(F.silu(z_NC), own.weight.double(), own.bias.double())
        errors[name] = ((output - target).square().sum() / (target - target.mean(0)).square().sum()).item()
    return errors


def _student_conditioning(student: FluxTransformer2DModel, teacher: FluxTransformer2DModel, y_ND: Tensor) -> Tensor:
    # y = sum_i W_i h_i + b and z = sum_i V_i h_i + c, with the same h. If V_i = R^T W_i, then z = R^T (y - b) + c for
    # R^T = V W^+ of the matrices side by side: also where W has no full rank, as y - b lies in its range.
    theirs, own = embedder_outputs(teacher), embedder_outputs(student)
    w = torch.cat([linear.weight.double() for linear in theirs.values()], dim=1)
    v = torch.cat([own[name].weight.double() for name in theirs], dim=1)
    b_D = torch.stack([linear.bias.double() for linear in theirs.values()]).sum(0)
    c_C = torch.stack([own[name].bias.double() for name in theirs]).sum(0)
    return (y_ND - b_D) @ (v @ torch.linalg.pinv(w)).T + c_C


def _project(y_ND: Tensor, conditioning_dim: int) -> Projection:
    mean_D = y_ND.mean(0)
    covariance_DD = (y_ND - mean_D).T @ (y_ND - mean_D) / len(y_ND)
    basis_DC = torch.linalg.eigh(covariance_DD).eigenvectors[:, -conditioning_dim:]
    # The channels of y that the components determine best, by pivoting; then the rotation that brings each component
    # nearest to its own.
    channels, rest_DC = [], basis_DC
    for _ in range(conditioning_dim):
        channels.append(int(rest_DC.square().sum(1).argmax()))
        direction_C = F.normalize(rest_DC[channels[-1]], dim=0)
        rest_DC = rest_DC - torch.outer(rest_DC @ direction_C, direction_C)
    channels_C = torch.tensor(sorted(channels), device=y_ND.device)
    u, _, vh = torch.linalg.svd(basis_DC[channels_C])
    basis_DC = basis_DC @ (u @ vh).T
    return Projection(basis_DC, mean_D, mean_D[channels_C])


def _checked(teacher: FluxTransformer2DModel, vectors_ND: Tensor) -> Tensor:
    width = next(iter(adaln_linears(teacher).values())).in_features
    if vectors_ND.ndim != 2 or vectors_ND.shape[1] != width or len(vectors_ND) < 2:
        raise ConfigError(
            f"conditioning vectors have shape {list(vectors_ND.shape)}; it must be [N, {width}] with N at least 2"
        )
    if not torch.isfinite(vectors_ND).all():
        raise ConfigError("conditioning vectors hold values that are not finite")
    return vectors_ND.double().to(next(teacher.parameters()).device)
