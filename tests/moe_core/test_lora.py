"""A LoRA fused from file to file: against W + scale * alpha / rank * B A in float64, in the formats that trainers write, and bad ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_core import checkpoint, lora, lora_shapes
from moe_core.errors import CheckpointError
from moe_core.flux_shapes import dense_shapes
from moe_core.references import FLUX1_DEV
from tests.moe_core.small_models import SIZES, make_teacher

SCALE, RANK = 0.125, 3
SHAPES = dense_shapes(SIZES)
LAYERS = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.4.ff_context.net.0.proj",
    "transformer_blocks.2.norm1.linear",
    "single_transformer_blocks.5.proj_out",
    "single_transformer_blocks.0.proj_mlp",
    "x_embedder",
    "time_text_embed.guidance_embedder.linear_2",
]
"""Of every kind, in several shards."""

Tensors = dict[str, Tensor]


def matrices(layers: list[str] = LAYERS, rank: int = RANK, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random A [R, I] and B [O, R] by layer; every second layer has another rank."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, layer in enumerate(layers):
        rows, columns = SHAPES[f"{layer}.weight"]
        own = rank + number % 2
        found[layer] = (
            torch.randn(own, columns, generator=generator),
            torch.randn(rows, own, generator=generator),
        )
    return found


def plain(pairs: dict[str, tuple[Tensor, Tensor]], prefix: str = "transformer.") -> Tensors:
    """In the names of diffusers."""
    return {
        f"{prefix}{layer}.lora_{letter}.weight": tensor
        for layer, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


def write(folder: Path, tensors: Tensors, metadata: dict[str, Any] | None = None) -> Path:
    """A LoRA file."""
    file = folder / "lora.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)
    return file


def check_header(file: Path, expected: dict[str, tuple[int, ...]] | None = SHAPES) -> None:
    """The check before any work."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.read_header(file).items()}
    lora_shapes.check_header(file, shapes, expected)


def fuse(source: Path, target: Path, file: Path, scale: float = SCALE) -> set[str]:
    """Fuses all shards of a folder; returns the layers changed."""
    changes = lora.read_lora(file, SHAPES)
    target.mkdir()
    fused: set[str] = set()
    for shard in checkpoint.weight_files(source):
        done = lora.fuse_file(shard, target / shard.name, changes, scale)
        assert not fused & done
        fused |= done
    return fused


def load(folder: Path) -> Tensors:
    """All tensors of a folder's files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense transformer's folder, in shards."""
    folder = tmp_path_factory.mktemp("dense")
    make_teacher().to(request.param).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_fused_is_the_sum_rounded_once(dense: Path, tmp_path: Path) -> None:
    pairs = matrices()
    assert fuse(dense, tmp_path / "out", write(tmp_path, plain(pairs))) == set(LAYERS)
    before, after = load(dense), load(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, old in before.items():
        layer = name.removesuffix(".weight")
        if name == layer or layer not in pairs:
            assert torch.equal(old, after[name]), name
            continue
        down, up = pairs[layer]
        exact = old.double() + SCALE * (up.double() @ down.double())
        assert after[name].dtype == old.dtype
        # Half a unit in the last place of a number near `exact`, and what float32 adds before that.
        unit = torch.finfo(old.dtype).eps / 2
        assert ((after[name].double() - exact).abs() <= exact.abs() * unit * 1.001 + 1e-5 * 2**-6).all(), name
        assert not torch.equal(after[name], old)


def test_all_else_in_a_file_stays_byte_for_byte(dense: Path, tmp_path: Path) -> None:
    fuse(dense, tmp_path / "out", write(tmp_path, plain(matrices(["x_embedder"]))))
    changed = 0
    for file in checkpoint.weight_files(dense):
        old, new = file.read_bytes(), (tmp_path / "out" / file.name).read_bytes()
        length = 8 + int.from_bytes(old[:8], "little")
        assert new[:length] == old[:length]
        assert len(new) == len(old)
        changed += new != old
    assert changed == 1


def test_a_fused_folder_answers_as_the_layers_with_their_low_rank_paths(tmp_path: Path) -> None:
    teacher = make_teacher()
    teacher.save_pretrained(tmp_path / "dense")
    pairs = matrices()
    fuse(tmp_path / "dense", tmp_path / "out", write(tmp_path, plain(pairs)))
    (tmp_path / "out" / "config.json").write_bytes((tmp_path / "dense" / "config.json").read_bytes())
    fused = FluxTransformer2DModel.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)

    def path(down: Tensor, up: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, out: out + SCALE * (args[0] @ down.T @ up.T)

    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 9, SIZES["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(2, 4, SIZES["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(2, SIZES["pooled_projection_dim"], generator=generator),
        "timestep": torch.tensor([0.2, 0.9]),
        "guidance": torch.full((2,), 3.5),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(4, 3),
    }
    with torch.no_grad():
        before = teacher(**inputs).sample
        for layer, pair in pairs.items():
            teacher.get_submodule(layer).register_forward_hook(path(*pair))
        expected, found = teacher(**inputs).sample, fused(**inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 0.05


ATTENTION = ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.3.attn.to_out.0"]


def kohya(pairs: dict[str, tuple[Tensor, Tensor]], alpha: float) -> Tensors:
    """As sd-scripts writes: names of Black Forest Labs with underscores, an alpha a layer."""
    found: Tensors = {}
    for layer, (down, up) in pairs.items():
        name = f"lora_unet_double_blocks_{layer.split('.')[1]}_img_attn_proj"
        found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return found


def xlabs(pairs: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    """As XLabs' trainer writes: no alpha."""
    found: Tensors = {}
    for layer, (down, up) in pairs.items():
        name = f"double_blocks.{layer.split('.')[1]}.processor.proj_lora1"
        found |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return found


def with_alphas(pairs: dict[str, tuple[Tensor, Tensor]], alpha: float) -> Tensors:
    """diffusers' names with an alpha a layer."""
    return plain(pairs) | {f"transformer.{layer}.alpha": torch.tensor(alpha) for layer in pairs}


def adapter(name: str, **settings: Any) -> dict[str, str]:
    """PEFT's settings as diffusers keeps them in a file."""
    return {"lora_adapter_metadata": json.dumps({f"{name}.{key}": value for key, value in settings.items()})}


@pytest.mark.parametrize(
    ("make", "metadata", "factors"),
    [
        (plain, None, (1, 1)),
        (lambda pairs: with_alphas(pairs, 6.0), None, (6 / 3, 6 / 4)),
        (lambda pairs: kohya(pairs, 6.0), None, (6 / 3, 6 / 4)),
        (xlabs, None, (1, 1)),
        (plain, adapter("transformer", r=3, lora_alpha=6), (6 / 3, 6 / 4)),
        (plain, adapter("transformer", r=3, lora_alpha=6, use_rslora=True), (6 / 3**0.5, 6 / 4**0.5)),
        (
            plain,
            adapter("transformer", r=3, lora_alpha=6, alpha_pattern={"3.attn.to_out.0": 8}),
            (6 / 3, 8 / 4),
        ),
    ],
    ids=["diffusers", "alphas", "kohya", "xlabs", "settings", "rslora", "alpha_pattern"],
)
def test_formats_of_trainers(
    tmp_path: Path, make: Callable[..., Tensors], metadata: dict[str, str] | None, factors: tuple[float, float]
) -> None:
    pairs = matrices(ATTENTION)
    file = write(tmp_path, make(pairs), metadata)
    check_header(file)
    found = lora.read_lora(file, SHAPES)
    assert found.keys() == pairs.keys()
    for (layer, (down, up)), factor in zip(pairs.items(), factors, strict=True):
        zeros = torch.zeros(SHAPES[f"{layer}.weight"])
        torch.testing.assert_close(found[layer].add_to(zeros, 1.0), factor * up @ down)


def test_a_folder_that_peft_saved(tmp_path: Path) -> None:
    pairs = matrices(ATTENTION)
    file = write(tmp_path, plain(pairs, "base_model.model."))
    for look in (check_header, lambda path: lora.read_lora(path, SHAPES)):
        with pytest.raises(CheckpointError, match=r"adapter_config.json: the checkpoint lacks this file"):
            look(file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 12}))
    check_header(file)
    assert {layer: change.factor for layer, change in lora.read_lora(file, SHAPES).items()} == {
        ATTENTION[0]: 12 / 3,
        ATTENTION[1]: 12 / 4,
    }


Q = "transformer.transformer_blocks.3.attn.to_q"


def without(name: str) -> Tensors:
    """A good LoRA less one tensor."""
    return {key: tensor for key, tensor in plain(matrices()).items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA; it must have matrices lora_A and lora_B"),
        (
            {f"{Q}.lora_A.weight": torch.zeros(3, 31), f"{Q}.lora_B.weight": torch.zeros(32, 3)},
            "lora_A of transformer_blocks.3.attn.to_q has 31 columns; the layer has 32",
        ),
        (
            {f"{Q}.lora_A.weight": torch.zeros(3, 32), f"{Q}.lora_B.weight": torch.zeros(30, 3)},
            "lora_B of transformer_blocks.3.attn.to_q has 30 rows; the layer has 32",
        ),
        (
            {f"{Q}.lora_A.weight": torch.zeros(3, 32), f"{Q}.lora_B.weight": torch.zeros(32, 4)},
            "lora_A of transformer_blocks.3.attn.to_q has rank 3, lora_B 4; they must be equal",
        ),
        (without("transformer.x_embedder.lora_B.weight"), "has lora_A of x_embedder, but no lora_B"),
        (without("transformer.x_embedder.lora_A.weight"), "has lora_B of x_embedder, but no lora_A"),
        (
            plain({"transformer_blocks.5.attn.to_q": (torch.zeros(3, 32), torch.zeros(32, 3))}),
            "changes transformer_blocks.5.attn.to_q, but the transformer has no linear layer of that name",
        ),
        (
            plain({"transformer_blocks.0.attn.norm_q": (torch.zeros(3, 16), torch.zeros(16, 3))}),
            "changes transformer_blocks.0.attn.norm_q, but the transformer has no linear layer of that name",
        ),
        (
            plain(matrices()) | {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(3, 3)},
            "text_encoder.text_model.* changes no layer of the transformer; only the transformer takes a LoRA here",
        ),
        (plain(matrices()) | {f"{Q}.lora_B.bias": torch.zeros(32)}, r"to_q.lora_B.bias \[32\] is no matrix of a LoRA"),
        (plain(matrices()) | {f"{Q}.dora_scale": torch.zeros(32)}, "to_q.dora_scale belongs to a DoRA"),
        (
            plain(matrices()) | {"transformer.x_embedder.alpha": torch.tensor(1.0)},
            "has an alpha for 1 of 8 layers, none for single_transformer_blocks.0.proj_mlp; all must have one, or none",
        ),
        (
            plain(matrices(["x_embedder"])) | {"transformer.proj_out.alpha": torch.tensor(1.0)},
            "has an alpha of proj_out, but no matrices of it",
        ),
        (
            plain({"x_embedder": (torch.full((3, 8), torch.nan), torch.zeros(32, 3))}),
            "x_embedder.lora_A.weight has values that are infinite or not a number",
        ),
        (plain({"x_embedder": (torch.zeros(3, 8).int(), torch.zeros(32, 3))}), "lora_A.weight is I32; it must be F32"),
        (
            {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(3, 32)},
            "diffusers cannot read its names as those of a FLUX LoRA",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path, tensors: Tensors, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        lora.read_lora(write(tmp_path, tensors), SHAPES)


TEXT = {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(3, 3)}
RANKS = {"transformer_blocks.3.attn.to_out.0": (torch.zeros(4, 32), torch.zeros(32, 8))}
RANKS_TOLD = "lora_A of transformer_blocks.3.attn.to_out.0 has rank 4, lora_B 8; they must be equal"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (plain(RANKS, "base_model.model."), RANKS_TOLD),
        (
            plain({"transformer_blocks.5.attn.to_q": RANKS[ATTENTION[1]]}, "base_model.model."),
            "changes transformer_blocks.5.attn.to_q, but the transformer has no linear layer of that name",
        ),
        (
            plain(matrices(), "base_model.model.") | TEXT,
            "changes text_encoder.text_model.encoder.layers.0.mlp.fc1, but",
        ),
        (plain(matrices()) | TEXT, f"{next(iter(TEXT))} changes no layer of the transformer"),
        (with_alphas(RANKS, 4.0), RANKS_TOLD),
        (plain(matrices()) | {f"{Q}.lora_B.bias": torch.zeros(32)}, r"to_q.lora_B.bias [32] is no matrix of a LoRA"),
    ],
    ids=["peft", "peft: layer", "peft: text", "text", "alphas", "bias"],
)
def test_a_header_is_refused_in_the_words_of_the_whole_file(tmp_path: Path, tensors: Tensors, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    file = write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=re.escape(f"{file}: ") + ".*" + re.escape(message)) as early:
        check_header(file)
    with pytest.raises(CheckpointError) as late:
        lora.read_lora(file, SHAPES)
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize("expected", [SHAPES, None], ids=["known", "unknown"])
@pytest.mark.parametrize(
    ("tensors", "down", "up"),
    [
        (kohya(RANKS, 4.0), "lora_unet_double_blocks_3_img_attn_proj.lora_down", "lora_unet_.*lora_up"),
        (xlabs(RANKS), "double_blocks.3.processor.proj_lora1.down", "double_blocks.3.*up"),
    ],
    ids=["kohya", "xlabs"],
)
def test_ranks_of_other_trainers_files_are_compared_in_the_header(
    tmp_path: Path, tensors: Tensors, down: str, up: str, expected: dict[str, tuple[int, ...]] | None
) -> None:
    file = write(tmp_path, tensors)
    message = rf"{down}.weight has shape \[4, 32\], {up}.weight \[32, 8\]; the rows of the first must be as many as the columns"
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}: {message}"):
        check_header(file, expected)
    with pytest.raises(CheckpointError, match=RANKS_TOLD):
        lora.read_lora(file, SHAPES)


def test_what_only_diffusers_can_tell_is_left_to_it(tmp_path: Path) -> None:
    """Of diffusers' layers in kohya's ends it drops all that is not the transformer's."""
    tensors = {
        name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for name, tensor in {**plain(matrices()), **TEXT}.items()
    }
    file = write(tmp_path, tensors)
    check_header(file)
    assert lora.read_lora(file, SHAPES).keys() == set(LAYERS)


def test_another_kind_of_file_is_never_unpickled(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    torch.save({"transformer.x_embedder.lora_A.weight": torch.zeros(3, 8)}, file)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        lora.read_lora(file, SHAPES)


def test_a_sum_that_overflows_is_refused(tmp_path: Path) -> None:
    make_teacher().half().save_pretrained(tmp_path / "dense")
    file = write(tmp_path, plain({"x_embedder": (torch.full((3, 8), 300.0), torch.full((32, 3), 300.0))}))
    with pytest.raises(CheckpointError, match=r"x_embedder.weight with the LoRA at scale 1 does not fit into F16"):
        fuse(tmp_path / "dense", tmp_path / "out", file, 1.0)


@pytest.mark.slow
def test_memory_is_that_of_the_lora_and_a_matrix(tmp_path: Path) -> None:
    """Four single blocks of FLUX.1's width, 1.3 GB in one file; the largest matrix has 0.1 GB, in float32 0.2."""
    config = {**FLUX1_DEV, "num_layers": 0, "num_single_layers": 4}
    shapes = dense_shapes(config)
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        tmp_path / "dense.safetensors",
    )
    layers = [
        name.removesuffix(".weight") for name in shapes if ".proj_out.weight" in name or ".norm.linear.weight" in name
    ]
    pairs = {
        layer: (torch.ones(2, shapes[f"{layer}.weight"][1]), torch.ones(shapes[f"{layer}.weight"][0], 2))
        for layer in layers
    }
    file = write(tmp_path, plain(pairs))
    code = (
        "import resource; from pathlib import Path; from moe_core import lora; from moe_core.flux_shapes import dense_shapes;"
        f"folder = Path({str(tmp_path)!r}); changes = lora.read_lora(folder / {file.name!r}, dense_shapes({dict(config)!r}));"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "done = lora.fuse_file(folder / 'dense.safetensors', folder / 'out.safetensors', changes, 0.5);"
        "print(len(done), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    root = Path(lora.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    fused, kilobytes = map(int, done.stdout.split())
    assert fused == len(layers) == 8
    assert kilobytes < 0.5 * 2**20 < (tmp_path / "dense.safetensors").stat().st_size / 2**10
    with safe_open(tmp_path / "out.safetensors", framework="pt") as out:
        assert (out.get_tensor(f"{layers[-1]}.weight") == 2).all()
        assert (out.get_tensor("single_transformer_blocks.3.proj_mlp.weight") == 1).all()
