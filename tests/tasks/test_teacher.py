"""A teacher that is given: taken as it is, if the other parameters fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_core import small_flux
from moe_core.config import Params, parse
from moe_core.data.embedded import captions_vocabulary
from moe_core.errors import ConfigError
from tasks import teacher
from tasks.project import read_params
from tests.moe_core.tiny_pipeline import SIZES, tiny_config


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline folder."""
    folder = tmp_path_factory.mktemp("given") / "flux"
    shape = {**SIZES["transformer"], "num_layers": 5, "num_single_layers": 12}
    small_flux.build_pipeline(tiny_config(transformer=shape), captions_vocabulary(), 0).save_pretrained(folder)
    return folder


def with_teacher(project: Path, folder: Path, **moe: Any) -> Params:
    """The project's parameters with a given teacher; they are written, too."""
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["model"] |= {"source": "folder", "path": str(folder)}
    values["moe"] |= moe
    (project / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return parse(Params, values)


def test_a_given_folder_is_taken_as_it_is(project: Path, given: Path) -> None:
    params = with_teacher(project, given)
    out = project / "data" / "teacher"
    teacher._given(params, out)
    files = {path.relative_to(given): path.read_bytes() for path in given.rglob("*") if path.is_file()}
    assert files == {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_what_does_not_fit_it_is_said_before_any_stage_runs(project: Path, given: Path) -> None:
    with_teacher(project, given, dense_double_blocks=[99])
    with pytest.raises(ConfigError, match=r"flux/transformer/config.json: moe.dense_double_blocks has 99"):
        read_params(project)
    with_teacher(project, given / "vae", dense_double_blocks=[0])
    with pytest.raises(ConfigError, match=r"model.path is \S+/vae, but .*model_index.json does not exist"):
        read_params(project)
