"""Conversion from folder to folder: the bits of the one in memory, whole folders or none, and every bad folder named."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_core import convert, stream
from moe_core.buffers import PAGE
from moe_core.checkpoint import CONFIG, INDEX
from moe_core.errors import CheckpointError, ConfigError
from moe_core.recipe import Recipe, Ref, unchanged
from moe_core.shards import ModelFolder
from moe_core.transformer import FluxMoETransformer2DModel, on_meta
from tests.moe_core.small_models import (
    SIZES,
    conditioning_bank,
    make_level,
    make_mob,
    make_moe,
    make_scores,
    make_teacher,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = 250_000
"""Bytes a shard: several of them, of sources and results alike."""
CHANGE = {
    f"{kind}.{i}": float(value)
    for kind, values in {"transformer_blocks": [0, 5, 1, 1, 1], "single_transformer_blocks": [1, 9, 2, 2, 9, 0]}.items()
    for i, value in enumerate(values)
}
M, S = make_level({"groups": 1, "size": 3}), make_level({"groups": 1, "size": 3}, {"groups": 2, "size": 2})


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_is(folder: Path, model: FluxMoETransformer2DModel) -> None:
    """The folder holds this very model, and no more."""
    found, expected = weights(folder), model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    config = json.loads((folder / CONFIG).read_text())
    assert on_meta(config).config["moe"] == model.config["moe"]
    assert on_meta(config).config["mob"] == model.config["mob"]
    loaded = FluxMoETransformer2DModel.from_pretrained(folder, torch_dtype=model.dtype)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert not list(folder.parent.glob(".*"))


def saved(model: FluxTransformer2DModel, folder: Path, shard: int | None = SMALL) -> Path:
    model.save_pretrained(folder, max_shard_size=shard or "10GB")
    assert (folder / INDEX).exists() == (shard is not None)
    return folder


@pytest.mark.parametrize(
    ("dtype", "split", "shard"),
    [(torch.float32, "taylor", SMALL), (torch.bfloat16, "random", SMALL), (torch.float16, "taylor", None)],
    ids=["fp32, shards", "bf16, shards", "fp16, one file"],
)
def test_folder_to_folder_gives_the_bits_of_memory(tmp_path: Path, dtype: torch.dtype, split: str, shard: int | None):
    teacher = make_teacher().to(dtype)
    scores, bank = make_scores(teacher), conditioning_bank(make_teacher())
    moe = make_moe(split=split, conditioning_dim=8, dense_double_blocks=(0,))
    dense, limit = saved(teacher, tmp_path / "dense", shard), shard or stream.MAX_SHARD_BYTES
    shared, joint = tmp_path / "shared", tmp_path / "joint"

    stream.to_shared(dense, shared, scores, moe, bank, 3, max_shard_bytes=limit)
    in_memory = convert.to_shared(teacher, scores, moe, bank, 3)
    assert_is(shared, in_memory)
    stream.to_moe(shared, dense, tmp_path / "moe", scores, moe, 3, max_shard_bytes=limit)
    assert_is(tmp_path / "moe", convert.to_moe(in_memory, teacher, scores, moe, 3))
    stream.to_moe_joint(dense, joint, scores, moe, bank, 3, max_shard_bytes=limit)
    in_memory = convert.to_moe_joint(teacher, scores, moe, bank, 3)
    assert_is(joint, in_memory)
    assert (len(list(joint.glob("*.safetensors"))) > 1) == (shard is not None)

    stream.to_mob(joint, tmp_path / "M", M, make_mob(), CHANGE, 3, limit)
    in_memory = convert.to_mob(in_memory, M, make_mob(), CHANGE, 3)
    assert_is(tmp_path / "M", in_memory)
    stream.to_mob(tmp_path / "M", tmp_path / "S", S, make_mob(), CHANGE, 3, limit)
    assert_is(tmp_path / "S", convert.to_mob(in_memory, S, make_mob(), CHANGE, 3))
    stream.to_mob(dense, tmp_path / "dense-mob", M, make_mob(), CHANGE, 3, limit)
    assert_is(tmp_path / "dense-mob", convert.to_mob(teacher, M, make_mob(), CHANGE, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_to_tokens_has_the_bits_of_memory_too(tmp_path: Path, dtype: torch.dtype):
    teacher = make_teacher().to(dtype)
    scores = make_scores(teacher)
    generator = torch.Generator().manual_seed(0)
    tokens = {name: torch.randn(200, teacher.inner_dim, generator=generator).to(dtype) for name in scores}
    moe = make_moe(split="greedy", deal="coactivation", router_init="norms", refit=True, dense_double_blocks=(0,))
    dense = saved(teacher, tmp_path / "dense", SMALL)
    stream.to_moe_joint(dense, tmp_path / "L", scores, moe, None, 3, tokens, max_shard_bytes=SMALL)
    assert_is(tmp_path / "L", convert.to_moe_joint(teacher, scores, moe, None, 3, tokens))
    stream.to_shared(dense, tmp_path / "shared", scores, moe, None, 3, tokens, max_shard_bytes=SMALL)
    assert_is(tmp_path / "shared", convert.to_shared(teacher, scores, moe, None, 3, tokens))


def test_a_fit_keeps_the_precision_of_each_matrix(tmp_path: Path):
    teacher = make_teacher().to(torch.bfloat16)
    for block in teacher.transformer_blocks:
        block.ff.net[2].float()
    scores = make_scores(teacher)
    generator = torch.Generator().manual_seed(0)
    tokens = {name: torch.randn(200, teacher.inner_dim, generator=generator) for name in scores}
    moe = make_moe(split="greedy", deal="coactivation", router_init="norms", refit=True)
    dense = saved(teacher, tmp_path / "dense")
    stream.to_moe_joint(dense, tmp_path / "L", scores, moe, tokens=tokens, max_shard_bytes=SMALL)
    found, expected = weights(tmp_path / "L"), convert.to_moe_joint(teacher, scores, moe, tokens=tokens).state_dict()
    assert found["transformer_blocks.1.ff.shared.proj_out.weight"].dtype == torch.float32
    assert found["transformer_blocks.1.ff.shared.proj_in.weight"].dtype == torch.bfloat16
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in expected.items())


def test_shards_are_diffusers_own(tmp_path: Path):
    """Which tensor goes to which file, and the index, are what `save_pretrained` makes of the same model."""
    teacher = make_teacher()
    scores, moe = make_scores(teacher), make_moe()
    dense = saved(teacher, tmp_path / "dense")
    stream.to_moe_joint(dense, tmp_path / "streamed", scores, moe, max_shard_bytes=SMALL)
    saved(convert.to_moe_joint(teacher, scores, moe), tmp_path / "saved")
    ours, theirs = (json.loads((tmp_path / name / INDEX).read_text()) for name in ("streamed", "saved"))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def test_a_trained_student_keeps_its_precision_and_its_experts_take_it(tmp_path: Path):
    teacher = make_teacher()
    scores, moe = make_scores(teacher), make_moe()
    shared = convert.to_shared(teacher, scores, moe)
    teacher = teacher.to(torch.bfloat16)
    folders = saved(shared, tmp_path / "shared"), saved(teacher, tmp_path / "dense")
    stream.to_moe(*folders, tmp_path / "moe", scores, moe, 3)
    expected = convert.to_moe(shared, teacher, scores, moe, 3)
    assert {parameter.dtype for parameter in expected.parameters()} == {torch.float32}
    assert_is(tmp_path / "moe", expected)


def test_layers_of_a_model_may_differ_in_precision(tmp_path: Path):
    teacher = make_teacher().to(torch.bfloat16)
    for block in teacher.transformer_blocks:
        block.norm1.linear.float()
    scores, moe, bank = make_scores(teacher), make_moe(conditioning_dim=8), conditioning_bank(make_teacher())
    dense = saved(teacher, tmp_path / "dense")
    stream.to_shared(dense, tmp_path / "shared", scores, moe, bank, max_shard_bytes=SMALL)
    found, expected = weights(tmp_path / "shared"), convert.to_shared(teacher, scores, moe, bank).state_dict()
    assert found["transformer_blocks.1.norm1.linear.weight"].dtype == torch.float32
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in expected.items())


# -- killed

KILLED = """
import os, signal, sys
from pathlib import Path
from moe_core import shards, stream
from tests.moe_core.small_models import make_moe, make_scores, make_teacher
moment, dense, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "tensor":
    write, calls = shards.ShardWriter._write, []
    def cut_short(self, number, raw, last):
        calls.append(number)
        write(self, number, raw[: len(raw) // 2] if len(calls) == 100 else raw, last)
        if len(calls) == 100:
            die()
    shards.ShardWriter._write = cut_short
elif moment == "configuration":
    stream.FluxMoETransformer2DModel.save_config = die
elif moment == "rename":
    stream.folders.flush_tree = die
stream.to_moe_joint(dense, out, make_scores(make_teacher()), make_moe(), max_shard_bytes=250_000)
"""


@pytest.mark.parametrize(
    "moment", ["tensor", *(pytest.param(moment, marks=pytest.mark.slow) for moment in ("configuration", "rename"))]
)
def test_a_killed_conversion_leaves_nothing_that_loads_and_the_next_succeeds(tmp_path: Path, moment: str):
    teacher = make_teacher()
    dense, out = saved(teacher, tmp_path / "dense"), tmp_path / "moe"
    command = [sys.executable, "-c", KILLED, moment, str(dense), str(out)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    [left] = tmp_path.glob(".*")
    assert list(left.glob("*.safetensors"))
    if moment != "rename":  # whole by then, but for its name
        for model in (FluxTransformer2DModel, FluxMoETransformer2DModel):
            with pytest.raises((CheckpointError, OSError)):
                model.from_pretrained(left)
    stream.to_moe_joint(dense, out, make_scores(teacher), make_moe(), max_shard_bytes=SMALL)
    assert_is(out, convert.to_moe_joint(teacher, make_scores(teacher), make_moe()))


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher = make_teacher()
    dense, out = saved(teacher, tmp_path / "dense"), tmp_path / "moe"
    recipe = convert.joint_recipe

    def breaks(*arguments, **more) -> Recipe:
        made = recipe(*arguments, **more)
        last = list(made.made)[-1]
        made.made[last] = made.made[last]._replace(make=lambda tensor: tensor[:-1])
        return made

    monkeypatch.setattr(convert, "joint_recipe", breaks)
    with pytest.raises(CheckpointError, match=r"made proj_out\.bias, torch.float32 \[7\]; it must be .*\[8\]"):
        stream.to_moe_joint(dense, out, make_scores(teacher), make_moe(), max_shard_bytes=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_memory_is_used_again_only_when_nobody_holds_it(tmp_path: Path):
    teacher = make_teacher()
    names = [f"transformer_blocks.{i}.attn.to_q.weight" for i in range(4)]
    with ModelFolder(saved(teacher, tmp_path / "dense"), FluxTransformer2DModel) as folder:
        first, view = folder.read(names[0]), folder.read(names[1])[:, :3]
        place = first.data_ptr() // PAGE  # where in a page it begins depends on its place in the file
        del first
        again, other = folder.read(names[2]), folder.read(names[3])
    assert again.data_ptr() // PAGE == place
    assert torch.equal(view, teacher.get_parameter(names[1])[:, :3])
    assert torch.equal(again, teacher.get_parameter(names[2]))
    assert torch.equal(other, teacher.get_parameter(names[3]))


def test_tensors_may_start_at_any_byte(tmp_path: Path):
    teacher = make_teacher()
    dense = saved(teacher, tmp_path / "dense")
    for path in dense.glob("*.safetensors"):
        whole = path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        path.write_bytes((end - 7).to_bytes(8, "little") + whole[8:end] + b" " + whole[end:])
    with ModelFolder(dense, FluxTransformer2DModel) as folder:
        assert all(torch.equal(folder.read(name), tensor) for name, tensor in teacher.state_dict().items())


# -- bad input

NAME = "transformer_blocks.2.ff.net.0.proj.weight"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return saved(make_teacher(), tmp_path / "dense")


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def refused(folder: Path, kind: type[Exception], message: str, out: str = "out") -> None:
    with pytest.raises(kind, match=message):
        stream.to_shared(folder, folder.parent / out, make_scores(make_teacher()), make_moe())
    assert not (folder.parent / "out").exists()
    assert not list(folder.parent.glob(".*"))


def test_folders_that_are_no_flux(dense: Path):
    refused(dense.parent / "nothing", CheckpointError, "there is no such checkpoint folder")
    config = json.loads((dense / CONFIG).read_text())
    (dense / CONFIG).write_text(json.dumps({**config, "_class_name": "SD3Transformer2DModel"}))
    refused(dense, CheckpointError, "describes a SD3Transformer2DModel; it must be a FluxTransformer2DModel")
    (dense / CONFIG).write_text(json.dumps({**config, "num_layers": 6}))
    refused(dense, CheckpointError, r"lack \d+ tensors of the model, first transformer_blocks\.5")


def test_shards_that_are_missing_cut_or_elsewhere(dense: Path):
    path = shard_of(dense, NAME)
    whole = path.read_bytes()
    path.unlink()
    refused(dense, CheckpointError, f"{path.name}: the checkpoint lacks this file")
    path.write_bytes(whole[:-10])
    refused(dense, CheckpointError, f"{path.name}: is not a whole safetensors file")
    path.write_bytes(whole)
    index = json.loads((dense / INDEX).read_text())
    shutil.copy(path, dense.parent / "outside.safetensors")
    for file in ("../outside.safetensors", str(dense.parent / "outside.safetensors"), "", "..", 3):
        index["weight_map"][NAME] = file
        (dense / INDEX).write_text(json.dumps(index))
        refused(dense, CheckpointError, f"tensor {NAME} is in .*it must be a file name in this folder")
    other = next(file.name for file in sorted(dense.glob("*.safetensors")) if file != path)
    index["weight_map"][NAME] = other
    (dense / INDEX).write_text(json.dumps(index))
    refused(dense, CheckpointError, f"says that tensor {NAME} is in {other}, but it is not")


def test_tensors_that_are_unknown_twice_missing_or_of_another_shape(dense: Path):
    path = shard_of(dense, NAME)
    whole = path.read_bytes()
    rewrite(path, lambda tensors: {**tensors, "transformer_blocks.2.lora": torch.zeros(2)})
    refused(dense, CheckpointError, r"tensor transformer_blocks\.2\.lora belongs to no parameter")
    path.write_bytes(whole)
    rewrite(path, lambda tensors: {**tensors, NAME: torch.zeros(3, 3)})
    refused(dense, CheckpointError, rf"tensor {NAME} has shape \[3, 3\].*has \[128, 32\]")
    path.write_bytes(whole)
    rewrite(path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != NAME})
    refused(dense, CheckpointError, f"says that tensor {NAME} is in {path.name}, but it is not")
    path.write_bytes(whole)
    other = next(file for file in sorted(dense.glob("*.safetensors")) if file != path)
    rewrite(other, lambda tensors: {**tensors, NAME: torch.zeros(128, 32)})
    refused(dense, CheckpointError, f"tensor {NAME} is also in")


def test_precisions_that_cannot_be_meant(dense: Path):
    path = shard_of(dense, NAME)
    whole = path.read_bytes()
    rewrite(path, lambda tensors: {**tensors, NAME: tensors[NAME].to(torch.int8)})
    refused(dense, CheckpointError, f"tensor {NAME} is I8; it must be F32, BF16, F16")
    path.write_bytes(whole)
    rewrite(path, lambda tensors: {**tensors, NAME: tensors[NAME].double()})
    refused(dense, CheckpointError, f"tensor {NAME} is F64; it must be F32, BF16, F16")
    path.write_bytes(whole)
    rewrite(path, lambda tensors: {**tensors, NAME: tensors[NAME].half()})
    refused(dense, CheckpointError, r"net\.0\.proj\.\w+ is F\d+, but .* of the same layer is F\d+")
    path.write_bytes(whole)

    def cast(module: str, dtype: torch.dtype) -> None:
        for file in sorted(dense.glob("*.safetensors")):
            rewrite(file, lambda ts: {name: t.to(dtype) if name.startswith(module) else t for name, t in ts.items()})

    cast("norm_out", torch.bfloat16)
    cast("x_embedder", torch.float16)
    refused(
        dense, CheckpointError, r"norm_out\S+ is BF16.*x_embedder\S+ is F16|x_embedder\S+ is F16.*norm_out\S+ is BF16"
    )


def test_outputs_that_cannot_be_written(dense: Path, monkeypatch: pytest.MonkeyPatch):
    before = weights(dense)
    for out in ("dense", "dense/below", "."):
        refused(dense, ConfigError, "output folder .* must lie apart from the source", out)
    (dense.parent / "there").mkdir()
    refused(dense, ConfigError, "there exists already", "there")
    total, used, _ = shutil.disk_usage(dense)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=total, used=used, free=100_000))
    refused(dense, ConfigError, r"out needs 0\.00 GB, but its disk has 0\.00 GB left")
    after = weights(dense)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_teacher_of_another_size(dense: Path, tmp_path: Path):
    teacher = make_teacher(num_single_layers=4)
    scores, moe = make_scores(make_teacher()), make_moe()
    shared = saved(convert.to_shared(teacher, scores, moe), tmp_path / "shared")
    with pytest.raises(ConfigError, match="teacher's num_single_layers is 6, but the shared-expert student's is 4"):
        stream.to_moe(shared, dense, tmp_path / "out", scores, moe)


# -- recipes account for every tensor


def test_recipes_that_forget_repeat_or_invent_a_tensor():
    teacher = make_teacher()
    student = on_meta({**SIZES, "moe": None})

    def recipe() -> Recipe:
        return Recipe(student, {"teacher": teacher})

    whole = recipe()
    whole.keep("teacher")
    assert whole.finished().made.keys() == teacher.state_dict().keys()
    first, second = list(recipe().shapes)[:2]
    twice = recipe()
    twice.add(first, [Ref("teacher", first)], unchanged)
    with pytest.raises(CheckpointError, match=f"makes {first} twice"):
        twice.add(first, [Ref("teacher", first)], unchanged)
    with pytest.raises(CheckpointError, match="makes nothing, which the student does not have"):
        twice.add("nothing", [Ref("teacher", first)], unchanged)
    with pytest.raises(CheckpointError, match="needs the teacher's nothing, which is not there"):
        twice.add(second, [Ref("teacher", "nothing")], unchanged)
    with pytest.raises(CheckpointError, match=rf"does not make \d+ tensors of the student, first {second}"):
        twice.finished()
    lossy = recipe()
    lossy.add(first, [Ref("teacher", second)], unchanged)
    lossy.keep("teacher")
    with pytest.raises(CheckpointError, match=f"would lose 1 tensors, first the teacher's {first}"):
        lossy.finished()
    lossy.leave("teacher")
    lossy.finished()
    other = Recipe(student, {"teacher": make_teacher(in_channels=4)})
    with pytest.raises(CheckpointError, match=r"teacher's x_embedder.weight has shape \[32, 4\]; the student's is"):
        other.keep("teacher")
