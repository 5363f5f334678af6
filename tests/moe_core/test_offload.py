"""Models larger than the device: what diffusers' group offloading brings to it. Needs accelerate (`make extras`)."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup

from moe_core.distill import predict
from moe_core.errors import ConfigError
from moe_core.transformer import FluxMoETransformer2DModel
from tests.moe_core.tiny_flux import make_batch, make_student

CPU = torch.device("cpu")
needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate (`make extras`)")


def grouped_model() -> FluxMoETransformer2DModel:
    groups = {"double_groups": [[1, 2, 3]], "single_groups": [[0, 1, 2, 3]]}
    return make_student("mob", mob=groups, num_single_layers=5).eval()


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """`peak`: the most bytes of weights that were on the device at once, by what diffusers brings and takes."""
    found: dict[Any, int] = {"peak": 0}
    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_

    def bring(group: ModuleGroup) -> None:
        weights = {*group.parameters, *(p for module in group.modules for p in module.parameters())}
        found[id(group)] = sum(weight.nbytes for weight in weights)
        found["peak"] = max(found["peak"], sum(size for key, size in found.items() if key != "peak"))
        onload(group)

    def take(group: ModuleGroup) -> None:
        found.pop(id(group), None)
        offload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", bring)
    monkeypatch.setattr(ModuleGroup, "offload_", take)
    return found


@needs_accelerate
@pytest.mark.parametrize("disk", [False, True])
@torch.no_grad()
def test_of_a_group_one_block_at_a_time_is_resident(disk: bool, resident: dict[str, int], tmp_path):
    model = grouped_model()
    expected = predict(model, make_batch(1))
    blocks = [sum(p.nbytes for p in block.parameters()) for block in model.single_transformer_blocks[0].blocks]
    whole = sum(parameter.nbytes for parameter in model.parameters())
    around = whole - sum(
        sum(p.nbytes for p in block.parameters())
        for block in (*model.transformer_blocks, *model.single_transformer_blocks)
    )
    model.enable_group_offload(CPU, CPU, **({"offload_to_disk_path": str(tmp_path)} if disk else {}))
    torch.testing.assert_close(predict(model, make_batch(1)), expected)
    largest = max(sum(p.nbytes for p in block.parameters()) for block in model.transformer_blocks[1].blocks)
    routers = sum(p.nbytes for name, p in model.named_parameters() if model.part_of(name) == "block_router")
    assert resident["peak"] <= around + routers + max(largest, *blocks)
    # Samples that chose other blocks find them as well.
    assert len(predict(model, make_batch(5, seed=1))) == 5


@needs_accelerate
@torch.no_grad()
def test_leaf_by_leaf_from_disk_the_routers_see_their_weights(tmp_path):
    model, given = grouped_model(), make_batch(3)
    expected = predict(model, given)
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    torch.testing.assert_close(predict(model, given), expected)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@torch.no_grad()
def test_attention_backends_keep_working(backend: str):
    model, given = grouped_model(), make_batch(3)
    expected = predict(model, given)
    model.set_attention_backend(backend)
    torch.testing.assert_close(predict(model, given), expected, rtol=1e-4, atol=1e-5)


def test_groups_and_what_fetches_ahead():
    with pytest.raises(ConfigError, match=r"use_stream is True.*MoB groups"):
        grouped_model().enable_group_offload(CPU, CPU, use_stream=True)
    with pytest.raises(ConfigError, match="num_blocks_per_group is 2"):
        grouped_model().enable_group_offload(CPU, CPU, num_blocks_per_group=2)
