"""LoRAs that PEFT itself made, on a whole small pipeline: fused here as diffusers' `load_lora_weights` and `fuse_lora` do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from moe_core import checkpoint, lora
from moe_core.flux_shapes import dense_shapes
from tests.moe_core.tiny_pipeline import tiny_pipeline

peft = pytest.importorskip("peft", reason="`make extras` runs these, in an environment with PEFT")

SCALE = 0.125
SETTINGS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": [
        "to_q",
        "to_k",
        "to_out.0",
        "add_v_proj",
        "net.0.proj",
        "proj_mlp",
        "proj_out",
        "x_embedder",
        "linear",
    ],
    "rank_pattern": {"proj_mlp": 2},
    "alpha_pattern": {"add_v_proj": 16},
}


def save_lora(folder: Path, **settings: Any) -> Path:
    """A LoRA with random matrices, saved as diffusers' training scripts do; returns its file."""
    transformer = tiny_pipeline().transformer
    transformer.add_adapter(peft.LoraConfig(**{**SETTINGS, **settings}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=peft.utils.get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    [file] = folder.glob("*.safetensors")
    return file


def fuse(transformer: FluxTransformer2DModel, folder: Path, file: Path) -> Path:
    """The transformer's folder, in shards, with the LoRA in it."""
    transformer.save_pretrained(folder / "dense", max_shard_size="50KB")
    (folder / "fused").mkdir()
    changes = lora.read_lora(file, dense_shapes(transformer.config))
    fused: set[str] = set()
    for shard in checkpoint.weight_files(folder / "dense"):
        fused |= lora.fuse_file(shard, folder / "fused" / shard.name, changes, SCALE)
    assert fused == changes.keys()
    for name in (checkpoint.CONFIG, checkpoint.INDEX):
        shutil.copy(folder / "dense" / name, folder / "fused" / name)
    return folder / "fused"


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rank-stabilised"])
def test_as_diffusers_fuses_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    pipeline = tiny_pipeline()
    file = save_lora(tmp_path / "lora", **settings)
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    found = load(fuse(pipeline.transformer, tmp_path, file))

    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.unload_lora_weights()
    expected = pipeline.transformer.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    changed = {name for name in expected if not torch.equal(expected[name], before[name])}
    assert len(changed) > 10
    assert changed == {name for name in found if not torch.equal(found[name], before[name])}


def test_in_bfloat16_within_one_rounding_of_the_sum(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    file = save_lora(tmp_path / "lora")
    pipeline.transformer.bfloat16()
    found = load(fuse(pipeline.transformer, tmp_path, file))
    # In float32, from the same rounded weights: what diffusers makes before it rounds.
    pipeline.transformer.float()
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.unload_lora_weights()
    for name, exact in pipeline.transformer.state_dict().items():
        assert found[name].dtype == torch.bfloat16
        assert ((found[name].float() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-7).all(), name


def test_answers_as_the_teacher_with_the_adapter_beside_it(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    file = save_lora(tmp_path / "lora")
    fused = FluxTransformer2DModel.from_pretrained(fuse(pipeline.transformer, tmp_path, file))
    generator = torch.Generator().manual_seed(2)
    config = fused.config
    inputs = {
        "hidden_states": torch.randn(2, 9, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(2, 4, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([0.2, 0.9]),
        "guidance": torch.full((2,), 3.5),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(4, 3),
    }
    with torch.no_grad():
        before = pipeline.transformer(**inputs).sample
        pipeline.load_lora_weights(tmp_path / "lora", adapter_name="beside")
        pipeline.set_adapters("beside", SCALE)
        expected = pipeline.transformer(**inputs).sample
        found = fused(**inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (expected - before).abs().max() > 0.05


def test_a_folder_that_peft_saves_itself_gives_the_same(tmp_path: Path) -> None:
    transformer = tiny_pipeline().transformer
    shapes = dense_shapes(transformer.config)
    by_diffusers = lora.read_lora(save_lora(tmp_path / "lora"), shapes)
    model = peft.get_peft_model(transformer, peft.LoraConfig(**SETTINGS))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "peft")
    by_peft = lora.read_lora(tmp_path / "peft" / "adapter_model.safetensors", shapes)
    assert by_peft.keys() == by_diffusers.keys()
    for layer, change in by_diffusers.items():
        assert change.factor == by_peft[layer].factor
        assert torch.equal(change.down_RI, by_peft[layer].down_RI)
        assert torch.equal(change.up_OR, by_peft[layer].up_OR)
