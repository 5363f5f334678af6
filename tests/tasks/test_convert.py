"""The command that converts a folder without the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from moe_core import convert, noise
from moe_core.transformer import FluxMoETransformer2DModel
from tasks import importance_files
from tasks.convert import main
from tasks.params import compose
from tasks.project import read_params
from tests.moe_core.small_models import conditioning_bank, make_scores, make_teacher
from tests.tasks.imports import ROOT

OVERRIDES = ["moe.conditioning_dim=8", "moe.dense_double_blocks=[0]"]


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FluxTransformer2DModel:
    """A dense folder, importance and params.yaml in the working directory."""
    monkeypatch.chdir(tmp_path)
    teacher = make_teacher()
    teacher.save_pretrained("dense")
    blocks = [f"transformer_blocks.{i}" for i in range(5)] + [f"single_transformer_blocks.{i}" for i in range(6)]
    rows = [{"key": "a", "sigma": 0.5, "relative": [float(i) for i in range(11)], "mse": [1.0] * 11}] * 8
    Path("importance").mkdir()
    importance_files.save(Path("importance"), make_scores(teacher), conditioning_bank(teacher), blocks, rows)
    generator = torch.Generator().manual_seed(0)
    tokens = {name: torch.randn(200, teacher.inner_dim, generator=generator) for name in make_scores(teacher)}
    save_file(tokens, "unit.safetensors")
    importance_files.save_tokens(Path("importance"), [Path("unit.safetensors")])
    Path("params.yaml").write_text(compose(ROOT, OVERRIDES))
    return teacher


def same(folder: str, model: FluxMoETransformer2DModel) -> bool:
    found, expected = FluxMoETransformer2DModel.from_pretrained(folder).state_dict(), model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_from_the_dense_folder_to_a_level(teacher: FluxTransformer2DModel):
    params, found = read_params(Path.cwd()), importance_files.load(Path("importance"))
    seed = noise.derive_seed(params.seed, "conversion")
    assert params.moe.needs_tokens
    assert main(["L", "dense", "out/L", "--importance", "importance"]) == 0
    moe = convert.to_moe_joint(teacher, found.scores, params.moe, found.conditioning, seed, found.tokens)
    assert same("out/L", moe)
    assert main(["M", "out/L", "out/M", "--importance", "importance"]) == 0
    assert same("out/M", convert.to_mob(moe, params.mob.levels["M"], params.mob, found.block_change, seed))


def test_a_random_split_needs_no_importance(teacher: FluxTransformer2DModel, capsys: pytest.CaptureFixture[str]):
    assert main(["shared", "dense", "shared"]) == 2
    assert "importance scores lack transformer_blocks.1.ff" in capsys.readouterr().err
    Path("params.yaml").write_text(
        compose(ROOT, [*OVERRIDES, "moe=1s12e2a", "moe.split=random", "moe.conditioning_dim=null"])
    )
    params = read_params(Path.cwd())
    assert main(["shared", "dense", "shared"]) == 0
    seed = noise.derive_seed(params.seed, "conversion")
    assert same("shared", convert.to_shared(teacher, {}, params.moe, None, seed))


def test_mistakes_are_one_line(teacher: FluxTransformer2DModel, capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (["XXL", "dense", "out"], "level is XXL; it must be one of shared, L, M"),
        (["L", "nowhere", "out", "--importance", "importance"], "nowhere: there is no such checkpoint folder"),
        (["L", "dense", "out", "--importance", "nowhere"], "scores.safetensors is missing"),
        (["L", "dense", "dense", "--importance", "importance"], "must lie apart from the source"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not Path("out").exists()
