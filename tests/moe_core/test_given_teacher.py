"""A teacher that is given: everything that is wrong with it is said by name and number, from headers alone."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file, save_file

from moe_core import references, small_flux
from moe_core.config import Params, TimestepConfig, parse
from moe_core.config.given_teacher import check_given, sampler_shift
from moe_core.data.embedded import captions_vocabulary
from moe_core.errors import CheckpointError, ConfigError
from moe_core.noise import sampler_sigmas
from tests.moe_core.tiny_pipeline import SIZES, tiny_config

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder, in two shards."""
    folder = tmp_path_factory.mktemp("given") / "flux"
    shape = {**SIZES["transformer"], "num_layers": 5, "num_single_layers": 12}
    pipeline = small_flux.build_pipeline(tiny_config(transformer=shape), captions_vocabulary(), 0)
    pipeline.save_pretrained(folder)
    shutil.rmtree(folder / "transformer")
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="1MB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) == 2
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "flux"))


def given(folder: Path, **changes: Any) -> Params:
    """The committed parameters with this teacher; changes by dotted key, a dot written as two underscores."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key, value in {"model__source": "folder", "model__path": str(folder), **changes}.items():
        *path, last = key.split("__")
        section = values
        for name in path:
            section = section[name]
        section[last] = value
    return parse(Params, values)


def edit(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None takes one away."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def shard_of(folder: Path, tensor: str) -> Path:
    """The file that holds a tensor."""
    index = json.loads((folder / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    return folder / "transformer" / index["weight_map"][tensor]


def rewrite(folder: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Puts another tensor into the transformer's files, or none."""
    file = shard_of(folder, tensor)
    tensors = load_file(file)
    changed = change(tensors.pop(tensor))
    save_file(tensors if changed is None else {**tensors, tensor: changed.contiguous()}, file)


BIAS = "transformer_blocks.0.ff.net.2.bias"


def test_a_whole_one_passes(whole: Path) -> None:
    check_given(given(whole))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), r"model.path is \S+/flux, but .*model_index.json does not exist"),
        (lambda f: (f / "model_index.json").write_text("no json"), "model_index.json: is not JSON"),
        (
            lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"),
            "model_index.json: describes a StableDiffusionPipeline, not a FluxPipeline",
        ),
        (
            lambda f: edit(f / "model_index.json", vae=None),
            "model_index.json: lacks vae; a FluxPipeline has transformer",
        ),
        (lambda f: edit(f / "model_index.json", text_encoder_2=[None, None]), "model_index.json: lacks text_encoder_2"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "flux/text_encoder: there is no such folder"),
        (
            lambda f: edit(f / "transformer/config.json", _class_name="SD3Transformer2DModel"),
            "transformer/config.json: describes a SD3Transformer2DModel, not a FluxTransformer2DModel",
        ),
        (
            lambda f: edit(f / "transformer/config.json", num_layers=None),
            "transformer/config.json: 'num_layers' is missing",
        ),
        (lambda f: edit(f / "transformer/config.json", num_layers=3), "there is room for 0 among 3 blocks"),
        (
            lambda f: edit(f / "transformer/config.json", num_layers=4),
            "tensor transformer_blocks.4.* belongs to no parameter",
        ),
        (
            lambda f: edit(f / "transformer/config.json", num_single_layers=13),
            "lack 14 tensors .*first single_transformer_blocks.12",
        ),
        (
            lambda f: edit(f / "transformer/config.json", guidance_embeds=False),
            "guidance_scale is 3.5, but guidance_embeds is false: the model takes none; it must be null",
        ),
        (
            lambda f: edit(f / "transformer/config.json", joint_attention_dim=99),
            "joint_attention_dim is 99, but the pipeline's text_encoder_2 gives 16 channels",
        ),
        (
            lambda f: edit(f / "vae/config.json", latent_channels=5),
            "in_channels is 16, but the pipeline's vae gives 20",
        ),
        (
            lambda f: edit(f / "vae/config.json", block_out_channels=[8] * 5),
            "model.resolution is 16; it must be a multiple of 32: the VAE's factor 16 times the patch of 2",
        ),
        (
            lambda f: shard_of(f, BIAS).unlink(),
            r"model-0000\d-of-00002.safetensors: the checkpoint lacks this file, which .*index",
        ),
        (
            lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(),
            "vae/diffusion.*: the checkpoint lacks this file",
        ),
        (
            lambda f: (f / "text_encoder_2/model.safetensors").write_bytes(b"\x80\x04pickle"),
            "is not a whole safetensors file",
        ),
        (
            lambda f: shard_of(f, BIAS).write_bytes(shard_of(f, BIAS).read_bytes()[:-4]),
            r"transformer/\S+: is not a whole safetensors file",
        ),
        (
            lambda f: rewrite(f, BIAS, lambda t: t.to(torch.int32)),
            f"tensor {BIAS} is I32; it must be F32, BF16, F16",
        ),
        (lambda f: rewrite(f, BIAS, lambda t: t.to(torch.float8_e4m3fn)), f"tensor {BIAS} is F8_E4M3; it must be F32"),
        (
            lambda f: rewrite(f, BIAS, lambda t: t.bfloat16()),
            f"tensor {BIAS} is BF16, but {BIAS.replace('bias', 'weight')} of the same layer is F32",
        ),
        (lambda f: rewrite(f, BIAS, lambda t: t[:5]), rf"tensor {BIAS} has shape \[5\]; .* has \[32\]"),
        (lambda f: rewrite(f, BIAS, lambda t: None), rf"index.json: says that tensor {BIAS} is in \S+, but it is not"),
        (
            lambda f: edit(
                f / "transformer/diffusion_pytorch_model.safetensors.index.json",
                weight_map={BIAS: "../vae/x.safetensors"},
            ),
            "is in '../vae/x.safetensors'; it must be a file name in this folder",
        ),
        (
            lambda f: edit(
                f / "transformer/diffusion_pytorch_model.safetensors.index.json", weight_map={BIAS: "x.bin"}
            ),
            "is in 'x.bin'; it must be a .safetensors file",
        ),
    ],
)
def test_a_folder_that_is_none_is_refused(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        check_given(given(folder))


def test_without_guidance_the_scale_must_be_null(folder: Path) -> None:
    edit(folder / "transformer/config.json", guidance_embeds=False)
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for name in weight_map:
        if "guidance_embedder" in name:
            rewrite(folder, name, lambda t: None)
    edit(index, weight_map={name: file for name, file in weight_map.items() if "guidance_embedder" not in name})
    check_given(given(folder, model__guidance_scale=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe__dense_double_blocks": [99]}, r"flux/transformer/config.json: moe.dense_double_blocks has 99"),
        ({"moe__conditioning_dim": 33}, "moe.conditioning_dim is 33; it must be at most the model's width, 32"),
    ],
)
def test_parameters_that_do_not_fit_it_are_refused(whole: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_given(given(whole, **changes))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"path": "flux/none.safetensors"},
            "model.lora.path is 'flux/none.safetensors'; there is no such file or folder",
        ),
        ({"path": "/no/such/folder"}, "model.lora.path is '/no/such/folder'; there is no such file"),
        ({"path": "owner/name"}, "is the hub id 'owner/name' .* then weight_name must be given"),
        (
            {"path": "{flux}/model_index.json"},
            "it must be a .safetensors file: reading one of another kind can run code",
        ),
        ({"path": "{flux}/transformer"}, "has 2 .safetensors files .* model.lora.weight_name must name one"),
        (
            {"path": "{flux}/vae", "weight_name": "x.safetensors"},
            "weight_name is 'x.safetensors', but .*vae has no such file",
        ),
        (
            {"path": "{flux}/vae/diffusion_pytorch_model.safetensors", "weight_name": "x.safetensors"},
            "is a file; it must be null",
        ),
        ({"path": "{flux}/vae"}, "none of its .* tensors is a LoRA's; their names must have lora_A or lora_down"),
    ],
)
def test_a_lora_that_is_none_is_refused(whole: Path, lora: dict[str, Any], message: str) -> None:
    lora = {**lora, "path": lora["path"].format(flux=whole), "scale": 1.0}
    with pytest.raises((ConfigError, CheckpointError), match=message):
        check_given(given(whole, model__lora=lora))


Q = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("names", "down", "up", "message"),
    [
        ("transformer.{}.lora_A", (4, 31), (32, 4), f"lora_A of {Q} has 31 columns; the layer has 32"),
        ("base_model.model.{}.lora_A", (4, 32), (32, 8), f"lora_A of {Q} has rank 4, lora_B 8; they must be equal"),
        (
            "{}.lora_down",
            (4, 32),
            (32, 8),
            rf"{Q}.lora_down.weight has shape \[4, 32\], {Q}.lora_up.weight \[32, 8\]; the rows",
        ),
    ],
    ids=["diffusers", "peft", "kohya"],
)
def test_a_lora_of_other_shapes_is_refused_by_its_header(
    whole: Path, tmp_path: Path, names: str, down: tuple[int, int], up: tuple[int, int], message: str
) -> None:
    file = write_lora(tmp_path, names.format(Q), down, up)
    with pytest.raises(CheckpointError, match=f"{file}: {message}"):
        check_given(given(whole, model__lora={"path": str(file), "scale": 1.0}))


def test_a_lora_for_the_hubs_flux1_is_compared_with_its_shapes(tmp_path: Path) -> None:
    model = yaml.safe_load((ROOT / "params" / "model" / "flux1-dev.yaml").read_text())

    def check(*shapes: tuple[int, int]) -> None:
        file = write_lora(tmp_path, f"transformer.{Q}.lora_A", *shapes)
        check_given(given(tmp_path, model={**model, "lora": {"path": str(file), "scale": 1.0}}))

    check((4, 3072), (3072, 4))
    with pytest.raises(CheckpointError, match=f"lora_B of {Q} has 3071 rows; the layer has 3072"):
        check((4, 3072), (3071, 4))


def write_lora(folder: Path, name: str, down: tuple[int, int], up: tuple[int, int]) -> Path:
    """One layer's; `name` is that of the first matrix, less `.weight`. PEFT's settings lie beside it."""
    (folder / "adapter_config.json").write_text(json.dumps({"r": down[0], "lora_alpha": down[0]}))
    other = name.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
    file = folder / "lora.safetensors"
    save_file({f"{name}.weight": torch.zeros(down), f"{other}.weight": torch.zeros(up)}, file)
    return file


def test_the_checks_need_no_torch(whole: Path) -> None:
    code = (
        "import sys, yaml; from moe_core.config import Params, parse; from moe_core.config.given_teacher import check_given;"
        f"values = yaml.safe_load(open({str(ROOT / 'params.yaml')!r}));"
        f"values['model'] |= dict(source='folder', path={str(whole)!r}); check_given(parse(Params, values));"
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("config", "resolution"),
    [
        (references.FLUX1_SCHEDULER, 1024),
        (references.FLUX1_SCHEDULER, 512),
        ({**references.FLUX1_SCHEDULER, "use_dynamic_shifting": False}, 1024),
        ({"shift": 1.0}, 256),
    ],
)
@pytest.mark.parametrize("steps", [8, 28])
def test_discrete_levels_are_those_that_the_sampler_visits(config: dict[str, Any], resolution: int, steps: int) -> None:
    tokens = (resolution // 16) ** 2
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(
        tokens,
        *(
            references.FLUX1_SCHEDULER[key]
            for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        ),
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    levels = sampler_sigmas(TimestepConfig(kind="discrete", steps=steps, shift=sampler_shift(config, tokens)))
    assert scheduler.sigmas[-1] == 0
    np.testing.assert_allclose(levels, scheduler.sigmas[:-1].numpy(), rtol=1e-6)


@pytest.mark.parametrize("preset", ["flux1", "hyperflux"])
def test_the_presets_shift_is_flux1s_at_1024_pixels(preset: str) -> None:
    timesteps = yaml.safe_load((ROOT / "params" / "kd" / f"{preset}.yaml").read_text())["timesteps"]
    assert timesteps["shift"] == pytest.approx(sampler_shift(references.FLUX1_SCHEDULER, 4096), rel=1e-12)
    assert timesteps["shift"] == pytest.approx(math.exp(1.15), rel=1e-12)


def test_discrete_levels_must_be_the_samplers_own(folder: Path) -> None:
    timesteps = {"kind": "discrete", "mean": 0.0, "std": 1.0, "shift": 1.0, "steps": 8}

    def check(steps: int = 8, **changes: Any) -> None:
        check_given(given(folder, model__num_inference_steps=steps, kd__timesteps={**timesteps, **changes}))

    check()
    with pytest.raises(ConfigError, match=r"kd.timesteps.steps is 8, but model.num_inference_steps is 20"):
        check(20)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(dict(references.FLUX1_SCHEDULER)))
    mu = calculate_shift((16 // 4) ** 2)
    with pytest.raises(
        ConfigError, match=f"kd.timesteps.shift is 1, but the teacher's sampler shifts by {math.exp(mu):.6f} at 16"
    ):
        check()
    check(shift=math.exp(mu))
    edit(folder / "scheduler/scheduler_config.json", use_karras_sigmas=True)
    with pytest.raises(
        ConfigError, match=r"has use_karras_sigmas = True; kd.timesteps.kind 'discrete' knows a shift only"
    ):
        check(shift=math.exp(mu))
