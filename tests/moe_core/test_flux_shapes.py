"""The table of a dense FLUX's tensors, against the model itself on the meta device; and the models that the paper compares with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from moe_core import accounting
from moe_core.flux_shapes import dense_shapes
from moe_core.references import FLUX1_DEV, FLUX1_LITE, FLUX1_MINI, TABLE_1
from tests.moe_core.small_models import SIZES


@pytest.mark.parametrize(
    "config",
    [
        FLUX1_DEV,
        SIZES,
        {**SIZES, "guidance_embeds": False, "num_layers": 1, "out_channels": 12},
        {**SIZES, "patch_size": 2, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)},
    ],
    ids=["FLUX.1 [dev]", "small", "without guidance", "patches"],
)
def test_the_table_has_the_models_tensors(config: Mapping[str, Any]) -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    assert dense_shapes(model.config) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("row", "config"),
    [("FLUX.1 [dev]", FLUX1_DEV), ("FLUX.1-Lite", FLUX1_LITE), ("FLUX-Mini", FLUX1_MINI)],
)
def test_dense_references_have_the_papers_parameters(row: str, config: Mapping[str, Any]) -> None:
    with torch.device("meta"):
        counts = accounting.count(FluxTransformer2DModel(**config))
    assert counts.total == counts.activated == sum(math.prod(shape) for shape in dense_shapes(config).values())
    assert round(counts.activated / 1e9, 2) == TABLE_1[row].activated
