"""What is loaded for a scorer: whole, or an error that says what is wrong, and of which asset."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, BlipForQuestionAnswering

from moe_core.errors import DataError
from moe_core.metrics import registry
from moe_core.metrics.loading import Unloadable, load_model, load_part
from moe_core.metrics.scorer import Asset, MissingAsset, Scorer, ScorerSpec
from tests.moe_core import faulty_weights, tiny_blip

CPU = torch.device("cpu")
HERE = "tests.moe_core.test_loading"
DENSE = "vision_model.encoder.layers.0.mlp.fc1.bias"


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_blip.save(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1, which is read at import."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_tied_weights_are_not_missing(blip: str):
    weights = load_file(Path(blip) / "model.safetensors")
    assert "text_decoder.cls.predictions.decoder.weight" not in weights
    model = load_model(BlipForQuestionAnswering, blip, "BLIP")
    tied = model.text_decoder.cls.predictions.decoder.weight
    assert torch.equal(tied, weights["text_decoder.bert.embeddings.word_embeddings.weight"])


def test_what_a_tied_weight_is_tied_to_is_missed(blip: str, tmp_path: Path):
    place = faulty_weights.without(blip, tmp_path / "a", "text_decoder.bert.embeddings.word_embeddings.weight")
    with pytest.raises(DataError, match=r"lacks 2 of BLIP's weights, as text_decoder\.bert\.embeddings"):
        load_model(BlipForQuestionAnswering, place, "BLIP")


def test_missing_weights_are_named(blip: str, tmp_path: Path):
    names = sorted(name for name in load_file(Path(blip) / "model.safetensors") if name.startswith("vision_model"))[:7]
    place = faulty_weights.without(blip, tmp_path / "a", *names)
    said = f"{place} lacks 7 of BLIP's weights, as {', '.join(names[:5])}; it must have all"
    with pytest.raises(DataError, match=re.escape(said)):
        load_model(BlipForQuestionAnswering, place, "BLIP")


def test_only_what_is_unused_may_be_missing(blip: str, tmp_path: Path):
    place = faulty_weights.without(blip, tmp_path / "a", DENSE)
    load_model(BlipForQuestionAnswering, place, "BLIP", unused=re.compile(re.escape(DENSE)))
    with pytest.raises(DataError, match="lacks 1 of"):
        load_model(BlipForQuestionAnswering, place, "BLIP", unused=re.compile(r"vision_model"))


def test_another_shape_is_refused(blip: str, tmp_path: Path):
    place = faulty_weights.cut(blip, tmp_path / "a", DENSE)
    with pytest.raises(DataError, match=rf"BLIP's {re.escape(DENSE)} has shape \[47\]; the model of its .* has \[48\]"):
        load_model(BlipForQuestionAnswering, place, "BLIP")


def test_pickles_are_refused(blip: str, tmp_path: Path):
    place = Path(faulty_weights.without(blip, tmp_path / "a"))
    torch.save(load_file(Path(blip) / "model.safetensors"), place / "model.safetensors")
    with pytest.raises(DataError, match="no safetensors file"):
        load_model(BlipForQuestionAnswering, str(place), "BLIP")
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    with pytest.raises(Unloadable, match=r"model\.safetensors"):
        load_model(BlipForQuestionAnswering, str(place), "BLIP")


def test_a_folder_without_the_files_is_unloadable(tmp_path: Path):
    with pytest.raises(Unloadable, match=f"{tmp_path} cannot be loaded") as error:
        load_part(AutoImageProcessor, str(tmp_path), backend="pil")
    # As pickling makes it anew on its way between processes.
    assert str(copy.copy(error.value)) == str(error.value)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("clip_score", "clip"),
        ("geneval", "mask2former"),
        ("dpg", "blip_vqa"),
        ("compbench_unidet", "open_detector"),
    ],
)
def test_a_hub_id_that_cannot_be_reached_is_a_missing_asset(name: str, key: str):
    spec = registry.spec(name)
    assets = {asset.key: f"nobody/{asset.key}" for asset in spec.assets}
    what = next(asset.what for asset in spec.assets if asset.key == key)
    with pytest.raises(MissingAsset) as error:
        spec.load(assets, CPU)
    begin, end = f"{name}: eval.models.{key} is nobody/{key}, which cannot be loaded (", f"); it must hold {what}"
    said = str(error.value)
    assert said.startswith(begin)
    assert said.endswith(end)
    assert said[len(begin) : -len(end)] == str(error.value.__cause__.__cause__)
    assert "huggingface.co" in said


def load(assets: Mapping[str, str], device: torch.device) -> Scorer:
    raise FileNotFoundError("no such file: vocab.txt")


def test_an_error_that_names_no_place_is_told_of_all_assets():
    spec = ScorerSpec("two", f"{HERE}:load", assets=(Asset("a", "Model A"), Asset("b", "Model B")))
    said = r"two: eval\.models\.a is x/a and eval\.models\.b is x/b, .*\(no such file: vocab\.txt\); .* Model A and Model B"
    with pytest.raises(MissingAsset, match=said):
        spec.load({"a": "x/a", "b": "x/b"}, CPU)
    with pytest.raises(FileNotFoundError):
        ScorerSpec("none", f"{HERE}:load").load({}, CPU)
