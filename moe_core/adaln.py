"""Compression of the AdaLN conditioning, from the model's width to `conditioning_dim` channels (paper, Sec. 4.1).

- Principal components of the conditioning y over a calibration set, turned so that each comes as near as possible to
  one of y's own channels, go into the last layer of each embedder: z = R^T (y - mean) + offset.
- Every AdaLN linear is then fitted by ridge regression from SiLU(z) to what the teacher's gives for y.
- Why turned: SiLU acts on each channel by itself, so in a basis of its own choosing even all components together could
  not reproduce W SiLU(y). Turned, z at full rank is y with its channels reordered, and the compression is exact.

Shapes: N calibration vectors, D the teacher's conditioning width, C conditioning_dim, M an AdaLN layer's modulations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from moe_core.buffers import Buffers
from moe_core.errors import ConfigError

MEASURED = 1024
"""On how many vectors at most `start_errors` measures."""


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


class Compression(NamedTuple):
    """A fit of the teacher's conditioning y by the narrow one z, in fp64: SiLU(y) is about SiLU(z) fit_CD + rest_D."""

    projection: Projection
    fit_CD: Tensor
    rest_D: Tensor


def fit(vectors_ND: Tensor, width: int, conditioning_dim: int, ridge: float = 1e-3) -> Compression:
    """Fits a compression to a calibration set, on the device where that lies.

    vectors_ND: outputs of the teacher's `time_text_embed`, which is `width` wide. ridge: relative to the mean variance of SiLU(z).
    Raises ConfigError if the vectors have another width, are fewer than two, or are not finite, or if conditioning_dim is above the width.
    """
    if vectors_ND.ndim != 2 or vectors_ND.shape[1] != width or len(vectors_ND) < 2:
        raise ConfigError(
            f"conditioning vectors have shape {list(vectors_ND.shape)}; it must be [N, {width}] with N at least 2"
        )
    if not torch.isfinite(vectors_ND).all():
        raise ConfigError("conditioning vectors hold values that are not finite")
    if conditioning_dim > width:
        raise ConfigError(
            f"moe.conditioning_dim is {conditioning_dim}; the teacher's conditioning has {width} channels"
        )
    y_ND = vectors_ND.detach().double()
    projection = _project(y_ND, conditioning_dim)
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
    return Compression(projection, fit_CD, target_ND.mean(0) - mean_C @ fit_CD)


Weight = tuple[tuple[str, ...], Callable[..., Tensor]]
"""Names of teacher's tensors, and the function of their values that gives a weight in the precision of the first of them."""


def compressed_weights(teacher: FluxTransformer2DModel, compression: Compression) -> dict[str, Weight]:
    """How the compressed embedder outputs and AdaLN linears are made of the teacher's, by the parameter names of both.

    Of the teacher only the structure is used; each weight is computed when its function is called, a layer at a time.
    """
    weights: dict[str, Weight] = {}
    work = Buffers()
    for position, name in enumerate(embedder_outputs(teacher)):
        # What belongs to the sum of the embedders, not to one of them, is added once.
        bias = partial(_embedder_bias, compression.projection, position == 0)
        weights[f"{name}.weight"] = (f"{name}.weight",), partial(_embedder_weight, compression.projection)
        weights[f"{name}.bias"] = (f"{name}.bias",), bias
    for name in adaln_linears(teacher):
        weights[f"{name}.weight"] = (f"{name}.weight",), partial(_linear_weight, compression, work)
        weights[f"{name}.bias"] = (f"{name}.bias", f"{name}.weight"), partial(_linear_bias, compression, work)
    return weights


def _embedder_weight(projection: Projection, weight_DD: Tensor) -> Tensor:
    return (projection.basis_DC.to(weight_DD.device).T @ weight_DD.double()).to(weight_DD.dtype)


def _embedder_bias(projection: Projection, first: bool, bias_D: Tensor) -> Tensor:
    basis_DC, mean_D, offset_C = (tensor.to(bias_D.device) for tensor in projection)
    bias_C = bias_D.double() @ basis_DC
    if first:
        bias_C = bias_C + offset_C - mean_D @ basis_DC
    return bias_C.to(bias_D.dtype)


def _linear_weight(compression: Compression, work: Buffers, weight_MD: Tensor) -> Tensor:
    wide_MD = _widened(work, weight_MD)
    return (wide_MD @ compression.fit_CD.to(wide_MD).T).to(weight_MD.dtype)


def _linear_bias(compression: Compression, work: Buffers, bias_M: Tensor, weight_MD: Tensor) -> Tensor:
    wide_MD = _widened(work, weight_MD)
    return (bias_M.to(wide_MD) + wide_MD @ compression.rest_D.to(wide_MD)).to(bias_M.dtype)


def _widened(work: Buffers, weight: Tensor) -> Tensor:
    """fp32 for half precision, whose rounding hides fp32's a thousandfold: FLUX.1 has 3.2 B of these weights. fp64 for fp32.

    As a whole, not some rows after others: how many there are decides in which order a product's sums are taken.
    """
    wide = torch.float32 if weight.itemsize == 2 else torch.float64
    return work.empty(weight.shape, wide, weight.device).copy_(weight)


class Start(NamedTuple):
    """Relative errors of the AdaLN layers' modulations, sum |own - teacher's|^2 / sum |teacher's - its mean|^2; 1 is what a constant would get."""

    fit: float
    """mean over the layers, on the vectors of the fit"""
    fit_worst_layer: float
    fit_held_out: float
    """of a fit to three quarters of the vectors, on the other quarter"""
    random: float
    """of embedder outputs and AdaLN layers as torch initialises linear layers"""


@torch.no_grad()
def start_errors(
    teacher: FluxTransformer2DModel,
    read: Callable[[str], Tensor],
    vectors_ND: Tensor,
    conditioning_dim: int,
    ridge: float = 1e-3,
    seed: int = 0,
) -> Start:
    """How near to the teacher's the modulations are before any training: for the fit, and beside it for a random start.

    teacher: only its structure is used; `read` gives its tensors by name, on the vectors' device, one layer's at a time.
    Measured on at most MEASURED vectors, evenly spread over the set. The random start draws from `seed`; it sees the least hidden states of the
    embedders that give the vectors. Raises ConfigError as `fit` does.
    """
    width = teacher.inner_dim
    whole = fit(vectors_ND, width, conditioning_dim, ridge)
    held = torch.arange(len(vectors_ND)) % 4 == 3
    part = fit(vectors_ND[~held], width, conditioning_dim, ridge)
    y_ND, unseen_ND = _spread(vectors_ND.double()), _spread(vectors_ND[held].double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random_NC = _random_conditioning(teacher, read, y_ND, conditioning_dim)
        errors: dict[str, list[float]] = {"fit": [], "fit_held_out": [], "random": []}
        for name in adaln_linears(teacher):
            weight, bias = read(f"{name}.weight"), read(f"{name}.bias")
            target = F.linear(F.silu(y_ND), weight.double(), bias.double())
            fresh = nn.Linear(conditioning_dim, len(weight)).double()
            errors["fit"].append(_error(target, whole.projection(y_ND), *_compressed(whole, weight, bias)))
            errors["random"].append(_error(target, random_NC, fresh.weight, fresh.bias))
            target = F.linear(F.silu(unseen_ND), weight.double(), bias.double())
            errors["fit_held_out"].append(_error(target, part.projection(unseen_ND), *_compressed(part, weight, bias)))
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    return Start(fit_worst_layer=max(errors["fit"]), **means)


def _spread(vectors_ND: Tensor) -> Tensor:
    return vectors_ND[:: -(-len(vectors_ND) // MEASURED)]


def _compressed(compression: Compression, weight_MD: Tensor, bias_M: Tensor) -> tuple[Tensor, Tensor]:
    work = Buffers()
    return _linear_weight(compression, work, weight_MD), _linear_bias(compression, work, bias_M, weight_MD)


def _error(target_NM: Tensor, z_NC: Tensor, weight_MC: Tensor, bias_M: Tensor) -> float:
    own_NM = F.linear(F.silu(z_NC), weight_MC.double(), bias_M.double())
    return ((own_NM - target_NM).square().sum() / (target_NM - target_NM.mean(0)).square().sum()).item()


def _random_conditioning(
    teacher: FluxTransformer2DModel, read: Callable[[str], Tensor], y_ND: Tensor, conditioning_dim: int
) -> Tensor:
    # y = W h + b, with the embedders side by side; the least h for a y is W^T (W W^T)^+ (y - b).
    names = list(embedder_outputs(teacher))
    w_DH = torch.cat([read(f"{name}.weight").double() for name in names], dim=1)
    b_D = torch.stack([read(f"{name}.bias").double() for name in names]).sum(0)
    hidden_NH = (y_ND - b_D) @ torch.linalg.pinv(w_DH @ w_DH.T, hermitian=True) @ w_DH
    fresh = [nn.Linear(linear.in_features, conditioning_dim) for linear in embedder_outputs(teacher).values()]
    v_CH = torch.cat([linear.weight.double() for linear in fresh], dim=1)
    return hidden_NH @ v_CH.T + torch.stack([linear.bias.double() for linear in fresh]).sum(0)


def _project(y_ND: Tensor, conditioning_dim: int) -> Projection:
    mean_D = y_ND.mean(0)
    centred_ND = y_ND - mean_D
    if conditioning_dim <= len(y_ND) < y_ND.shape[1]:
        # The same components; of the covariance, as wide as FLUX.1 is, they would take ten times as long.
        basis_DC = torch.linalg.svd(centred_ND, full_matrices=False).Vh[:conditioning_dim].T
    else:
        covariance_DD = centred_ND.T @ centred_ND / len(y_ND)
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
