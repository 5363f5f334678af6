"""The sparse FLUX as a diffusers model: files, pipeline, checkpointing, parts, and what it refuses."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file, save_file

from moe_core import convert
from moe_core.checkpoint import CONFIG, INDEX, WEIGHTS
from moe_core.errors import CheckpointError, ConfigError
from moe_core.moe import MoELayer
from moe_core.transformer import PARTS, FluxMoESingleTransformerBlock, FluxMoETransformer2DModel
from tests.moe_core.small_models import (
    SIZES,
    conditioning_bank,
    make_inputs,
    make_level,
    make_mob,
    make_moe,
    make_scores,
    make_teacher,
    predict,
)

LEVEL = make_level({"blocks": [[1, 2, 3]]}, {"blocks": [[0, 1], [3, 4]]})


def make_student(kind: str) -> FluxMoETransformer2DModel:
    """`shared`, `moe`, `moe+mob`, or `mob` on dense blocks."""
    teacher = make_teacher()
    scores, bank = make_scores(teacher), conditioning_bank(teacher)
    moe = make_moe(conditioning_dim=8, router_init_std=0.5)
    mob = make_mob(router_init_std=0.5)
    if kind == "mob":
        return convert.to_mob(teacher, LEVEL, mob)
    if kind == "shared":
        return convert.to_shared(teacher, scores, moe, bank)
    student = convert.to_moe_joint(teacher, scores, moe, bank)
    return convert.to_mob(student, LEVEL, mob) if kind == "moe+mob" else student


KINDS = ["shared", "moe", "moe+mob", "mob"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_the_same_model_to_the_bit(kind: str, dtype: torch.dtype, tmp_path: Path):
    student = make_student(kind).to(dtype)
    student.save_pretrained(tmp_path, max_shard_size="100KB" if kind == "moe" else "10GB")
    loaded = FluxMoETransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in student.state_dict().items())
    assert loaded.dtype == dtype
    for key in ("moe", "mob", "conditioning_dim", "num_layers", "num_single_layers"):
        assert loaded.config[key] == student.config[key]
    assert torch.equal(predict(loaded, make_inputs(dtype=dtype)), predict(student, make_inputs(dtype=dtype)))
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("kind", KINDS)
def test_runs_in_an_ordinary_flux_pipeline(kind: str):
    student = make_student(kind)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, student)
    pipe.set_progress_bar_config(disable=True)
    inputs = make_inputs(batch=2)
    latents = pipe(
        prompt_embeds=inputs["encoder_hidden_states"],
        pooled_prompt_embeds=inputs["pooled_projections"],
        latents=inputs["hidden_states"],
        height=48,
        width=48,
        num_inference_steps=2,
        output_type="latent",
    ).images
    assert latents.shape == inputs["hidden_states"].shape
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("kind", ["moe+mob", "mob"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str):
    student = make_student(kind).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            student.enable_gradient_checkpointing()
        student.zero_grad()
        student(**make_inputs(batch=4)).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    routers = [name for name in gradients[0] if ".router.w_" in name]
    assert len(routers) == 6
    assert all(gradients[0][name].abs().sum() > 0 for name in routers)


def test_a_sample_does_not_depend_on_its_batch():
    student = make_student("moe+mob").double()
    inputs = make_inputs(batch=6, dtype=torch.float64)
    whole = predict(student, inputs)
    for row in range(6):
        alone = {name: t if name.endswith("_ids") else t[row : row + 1] for name, t in inputs.items()}
        torch.testing.assert_close(predict(student, alone), whole[row : row + 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["controlnet_block_samples", "controlnet_single_block_samples"])
def test_controlnet_residuals_are_refused_where_there_are_groups(name: str):
    inputs = make_inputs()
    residuals = {name: [torch.zeros_like(predict(make_teacher(), inputs))[..., :1]]}
    with pytest.raises(ConfigError, match=f"{name} are given"):
        make_student("moe+mob")(**inputs, **residuals, return_dict=False)
    # Without groups they are diffusers' business.
    make_student("moe")(**inputs, **residuals, return_dict=False)


def test_set_top_k_from_0_to_n():
    student = make_student("moe")
    shared = make_student("shared")
    outputs = []
    for top_k in range(13):
        student.set_top_k(top_k)
        outputs.append(predict(student, make_inputs()))
    assert torch.equal(outputs[0], predict(shared, make_inputs()))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))
    with pytest.raises(ConfigError, match="top_k is 13, but there are 12"):
        student.set_top_k(13)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_one_part(kind: str):
    student = make_student(kind)
    parts = student.parts()
    assert tuple(parts) == PARTS
    assert sum(len(parameters) for parameters in parts.values()) == len(list(student.parameters()))
    filled = {part for part, parameters in parts.items() if parameters}
    assert (
        filled
        == {
            "shared": {"shared", "conditioning", "rest"},
            "moe": {"shared", "conditioning", "experts", "router", "rest"},
            "moe+mob": set(PARTS) - {"gap_blocks"},
            "mob": {"conditioning", "group_blocks", "block_router", "rest"},
        }[kind]
    )


def test_part_of_by_example():
    student = make_student("moe+mob")
    for name, part in {
        "transformer_blocks.0.ff.net.2.weight": "rest",
        "transformer_blocks.1.blocks.2.ff.w1_EFD": "group_blocks",
        "transformer_blocks.1.blocks.2.norm1.linear.weight": "group_blocks",
        "transformer_blocks.1.router.w_x.weight": "block_router",
        "transformer_blocks.2.ff_context.w2_EDF": "experts",
        "transformer_blocks.2.ff.router.weight": "router",
        "single_transformer_blocks.1.moe.shared.proj_in.bias": "shared",
        "single_transformer_blocks.1.proj_attn.weight": "rest",
        "single_transformer_blocks.1.norm.linear.weight": "conditioning",
        "time_text_embed.guidance_embedder.linear_1.weight": "conditioning",
        "norm_out.linear.bias": "conditioning",
    }.items():
        student.get_parameter(name)
        assert student.part_of(name) == part, name


def test_set_trainable():
    student = make_student("moe+mob")
    student.set_trainable(["experts", "router"])
    assert {student.part_of(n) for n, p in student.named_parameters() if p.requires_grad} == {"experts", "router"}
    student.set_trainable(["all"])
    assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(ConfigError, match="unknown part 'exprets'"):
        student.set_trainable(["exprets"])


def test_half_precision_overflow_is_clipped_as_in_diffusers():
    torch.manual_seed(0)
    block = FluxMoESingleTransformerBlock(16, 2, 8, MoELayer(16, 16, 8, 0, 0, out_bias=False))
    with torch.no_grad():
        block.norm.linear.weight.zero_()
        block.norm.linear.bias.fill_(1.0)  # gate 1
        block.proj_attn.bias.fill_(6e4)
    block.half()
    states = torch.full((1, 3, 16), 6e4, dtype=torch.float16)
    text, image = block(states[:, :2], states[:, :1], torch.zeros(1, 16, dtype=torch.float16))
    assert (text == 65504).all()
    assert (image == 65504).all()


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"moe": {"num_experts": 12, "top_k": 13}}, "top_k is 13, but there are 12 experts"),
        ({"moe": {"num_experts": 11}}, "mlp_ratio is 4, but shared_ratio.*3.75"),
        ({"moe": {"shared_ratio": 0.01, "num_experts": 0, "top_k": 0}}, "shared_ratio . width.*whole number"),
        ({"moe": {"experts": 3}}, "moe has the unknown key 'experts'"),
        ({"moe": {"dense_double_blocks": [5]}}, "dense_double_blocks has 5"),
        ({"mob": {"double_groups": [[1, 3]]}}, r"double_groups: group \[1, 3\].*consecutive"),
        ({"mob": {"single_groups": [[5, 6]]}}, r"single_groups: group \[5, 6\].*0 to 5"),
        ({"mob": {"single_groups": [[1, 2, 3], [3, 4]]}}, "block 3 stands in two groups"),
        ({"mob": {"single_groups": [[1, 2]], "active": 3}}, "active is 3, but the group has 2 blocks"),
    ],
)
def test_contradictory_configurations_are_refused(arguments: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        FluxMoETransformer2DModel(**SIZES, **arguments)


def test_unknown_backend():
    with pytest.raises(ConfigError, match="backend is 'fast'"):
        make_student("moe").set_expert_backend("fast")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_student("shared").save_pretrained(tmp_path)
    return tmp_path


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        FluxMoETransformer2DModel.from_pretrained(folder)


def test_missing_files_are_named(folder: Path):
    refused(folder / "nothing" / "here", "nothing/here: there is no such checkpoint folder")
    (folder / WEIGHTS).rename(folder / "elsewhere")
    refused(folder, f"{WEIGHTS}: the checkpoint lacks this file")
    (folder / CONFIG).unlink()
    refused(folder, f"{CONFIG}: the checkpoint lacks this file")


def test_a_missing_shard_is_named(tmp_path: Path):
    make_student("shared").save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / INDEX).exists()
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path, f"{shard.name}: the checkpoint lacks this file")


def test_a_truncated_file_is_named(folder: Path):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])
    refused(folder, f"{WEIGHTS}: is not a whole safetensors file")


def test_other_tensors_are_named(folder: Path):
    tensors = load_file(folder / WEIGHTS)
    name = "transformer_blocks.1.ff.shared.proj_in.weight"
    save_file({**tensors, name: torch.zeros(5, 5)}, folder / WEIGHTS)
    refused(folder, rf"{WEIGHTS}: tensor {name} has shape \[5, 5\].*\[32, 32\]")
    save_file({k: v for k, v in tensors.items() if k != name}, folder / WEIGHTS)
    refused(folder, f"{WEIGHTS} lack 1 tensors of the model, first {name}")
    save_file({**tensors, "stray": torch.zeros(1)}, folder / WEIGHTS)
    refused(folder, f"{WEIGHTS}: tensor stray belongs to no parameter")


def test_other_configurations_are_named(folder: Path):
    path = folder / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_class_name": "FluxTransformer2DModel"}))
    refused(folder, f"{CONFIG}: describes a FluxTransformer2DModel")
    path.write_text("{")
    refused(folder, f"{CONFIG}: is not JSON")
    path.write_text("[]")
    refused(folder, f"{CONFIG}: holds a list")
