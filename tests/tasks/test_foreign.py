"""`dense2moe evaluate` on pipelines that are not ours: Stable Diffusion and PixArt of random weights, a text file of prompts, real scorers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPVisionConfig

from moe_core.config import Params, parse
from moe_core.errors import CheckpointError, ConfigError, DataError, EvaluationError
from moe_core.small_flux import clip_tokenizer
from tasks import foreign
from tasks.places import EVALUATIONS, IMAGES, PROMPTS, SUITES
from tasks.scoring import read_picture
from tests.moe_core.other_pipelines import CAPTIONS, save_pixart, save_stable_diffusion
from tests.moe_core.tiny_clip import text_config

# NumPy 2 on diffusers' DPM-Solver, which PixArt has.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

ROOT = Path(__file__).resolve().parents[2]
OWN = [{"tag": "colors", "include": [{"class": "seven", "count": 1}], "prompt": text} for text in CAPTIONS]


def save_clip(folder: Path) -> None:
    """A CLIP of random weights that reads the captions' words."""
    tokenizer = clip_tokenizer(CAPTIONS, 12)
    text = text_config(tokenizer, 16, 12)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    for parameter in model.parameters():
        parameter.data += 0.3 * parameter.data.new_tensor(
            np.random.default_rng(parameter.numel()).normal(size=parameter.shape)
        )
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout after stage `source`, with pipelines beside it; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    (root / PROMPTS).parent.mkdir(parents=True)
    (root / PROMPTS).write_text("".join(json.dumps(record) + "\n" for record in OWN))
    (root / "mine.txt").write_text("a red four\na blue one\n")
    save_stable_diffusion(root / "sd")
    save_pixart(root / "pixart")
    save_clip(root / "clip")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return shutil.copytree(made, tmp_path / "root")


@pytest.fixture
def params() -> Callable[..., Params]:
    """Makes parameters with the own suite and one of a text file, scored by what is there."""

    def make(steps: int = 2, seed: int = 0, **suite: Any) -> Params:
        values = yaml.safe_load((ROOT / "params.yaml").read_text())
        values["seed"] = seed
        values["compute"].update(num_workers=0, cpus_per_worker=1)
        values["model"].update(num_inference_steps=steps, resolution=16)
        values["eval"] |= {"batch_size": 2, "scoring_batch_size": 4, "models": {"clip": "clip"}}
        mine = {"prompts": "text", "path": "mine.txt", "images_per_prompt": 2, "scorers": ["clip_score", "similarity"]}
        values["eval"]["suites"] = {
            "own": {"prompts": "own", "scorers": ["clip_score", "scenes"]},
            "mine": mine | suite,
        }
        return parse(Params, values)

    return make


def evaluate(root: Path, place: str, params: Params, out: str = "out", against: str | None = None) -> dict[str, Any]:
    return foreign.evaluate(root, str(root / place), root / out, params, against)


def as_evaluated(root: Path, out: str, name: str) -> None:
    """What the stages would have left of a model: pictures and tables."""
    shutil.copytree(root / out / "images", root / IMAGES / name)
    (root / EVALUATIONS / name).mkdir(parents=True)
    for file in (root / out).glob("*.parquet"):
        shutil.copy(file, root / EVALUATIONS / name)


@pytest.mark.parametrize("kind", ["sd", "pixart"])
def test_a_pipeline_of_another_kind_is_evaluated_and_a_second_run_says_the_same(
    root: Path, params: Callable[..., Params], kind: str
) -> None:
    told = evaluate(root, kind, params())
    assert told["pipeline"] == str(root / kind)
    own, mine = told["suites"]["own"], told["suites"]["mine"]
    assert (own["prompts"], mine["prompts"], mine["images_per_prompt"]) == (3, 2, 2)
    pictures = pd.read_parquet(root / "out" / "mine.pictures.parquet")
    assert list(zip(pictures["id"], pictures["index"], strict=True)) == [
        (f"0000{i}", j) for i in (1, 2) for j in (0, 1)
    ]
    assert mine["measures"]["clip_score"]["value"] == pytest.approx(pictures["clip_score.clip_score"].mean())
    assert mine["measures"]["clip_score"]["count"] == 2
    prompts = pd.read_parquet(root / "out" / "mine.prompts.parquet")
    assert list(prompts["prompt"]) == ["a red four", "a blue one"]
    assert "eval.models.scene_judge" in own["not_measured"]["scenes"]
    assert "reference" in mine["not_measured"]["similarity"]
    assert "differences" not in told
    assert read_picture(root / "out" / "images" / "mine" / "00001-01.png").size == (16, 16)
    assert json.loads((root / "out" / foreign.RESULT).read_text()) == told
    # What stage `source` has made is left alone.
    assert not (root / SUITES).exists()
    # Killed in the middle and run again; and from the start.
    times = {file: file.stat().st_mtime_ns for file in (root / "out" / "images").rglob("*.png")}
    gone = root / "out" / "images" / "mine" / "00001-00.png"
    content = gone.read_bytes()
    gone.unlink()
    (root / "out" / "rows" / "mine" / "clip_score" / "0000000.parquet").unlink()
    assert evaluate(root, kind, params()) == told
    assert gone.read_bytes() == content
    again = {file for file in times if file.stat().st_mtime_ns != times[file]}
    assert again == {gone, gone.with_name("00001-01.png")}
    assert evaluate(root, kind, params(), "anew") == told
    lines = foreign.table(told).splitlines()
    assert lines[0] == "| suite | measure | value | 95 % interval | difference |"
    assert any(line.startswith("| own | scenes | not measured | scenes needs") for line in lines)
    assert sum("| clip_score |" in line for line in lines) == 2


def test_a_folder_is_of_one_pipeline_one_set_of_parameters_and_of_prompts(
    root: Path, params: Callable[..., Params]
) -> None:
    told = evaluate(root, "sd", params())
    shutil.copytree(root / "sd", root / "sd2")
    for place, asked, key in (
        ("sd2", params(), "pipeline"),
        ("sd", params(steps=3), "arguments"),
        ("sd", params(seed=1), "seed"),
        ("sd", params(images_per_prompt=1), "eval"),
    ):
        with pytest.raises(
            ConfigError, match=rf"out has the evaluation of another '{key}' .*give --out another folder"
        ):
            evaluate(root, place, asked)
    (root / "mine.txt").write_text("a red four\na green one\n")
    with pytest.raises(ConfigError, match="out has pictures of other prompts in suite mine; give --out another folder"):
        evaluate(root, "sd", params())
    (root / "mine.txt").write_text("a red four\na blue one\n")
    assert evaluate(root, "sd", params()) == told


def test_a_suite_that_is_fetched_later_joins(root: Path, params: Callable[..., Params]) -> None:
    (root / "mine.txt").rename(root / "later.txt")
    told = evaluate(root, "sd", params())
    assert "mine.txt, where nothing lies" in told["suites"]["mine"]["missing"]
    assert told["suites"]["own"]["measures"]
    (root / "later.txt").rename(root / "mine.txt")
    joined = evaluate(root, "sd", params())
    assert joined["suites"]["own"] == told["suites"]["own"]
    assert joined["suites"]["mine"]["measures"]


def test_against_a_model_of_the_checkout(root: Path, params: Callable[..., Params]) -> None:
    evaluate(root, "sd", params(), "first")
    as_evaluated(root, "first", "teacher")
    save_stable_diffusion(root / "other", seed=5)
    told = evaluate(root, "other", params(), against="teacher")
    mine, less = told["suites"]["mine"]["measures"], told["differences"]["mine"]["clip_score"]
    ours, theirs = (
        pd.read_parquet(folder / "mine.prompts.parquet") for folder in (root / "out", root / EVALUATIONS / "teacher")
    )
    pairs = ours["clip_score.clip_score"] - theirs["clip_score.clip_score"]
    assert less["value"] == pytest.approx(pairs.mean())
    assert less["value"] != 0
    assert less["low"] <= less["value"] <= less["high"]
    assert told["against"] == "teacher"
    # The reference's pictures are the teacher's.
    one, other = (
        np.asarray(read_picture(folder / "mine" / "00000-00.png"), np.float64)
        for folder in (root / "out" / "images", root / IMAGES / "teacher")
    )
    rows = pd.read_parquet(root / "out" / "mine.pictures.parquet")
    assert rows["similarity.rmse"][0] == pytest.approx(np.sqrt(((one - other) ** 2).mean()) / 255, rel=1e-5)
    assert mine["rmse"]["value"] > 0
    assert f"| {less['value']:+.4g} (" in foreign.table(told)
    # The same pipeline differs by nothing, and is as like as can be.
    same = evaluate(root, "sd", params(), "second", "teacher")
    assert same["differences"]["own"]["clip_score"]["value"] == 0
    assert same["suites"]["mine"]["measures"]["ssim"]["value"] == pytest.approx(1)


def test_against_a_model_of_other_prompts_or_without_pictures(root: Path, params: Callable[..., Params]) -> None:
    evaluate(root, "sd", params(), "first")
    as_evaluated(root, "first", "teacher")
    table = root / EVALUATIONS / "teacher" / "mine.prompts.parquet"
    pd.read_parquet(table).assign(prompt=["a red four", "a green one"]).to_parquet(table)
    with pytest.raises(DataError, match="of other prompts in suite mine"):
        evaluate(root, "sd", params(), against="teacher")
    (root / IMAGES / "teacher" / "mine" / "00001-00.png").unlink()
    shutil.rmtree(root / "out" / "rows")
    with pytest.raises(EvaluationError, match=r"teacher/mine/00001-00\.png is missing"):
        evaluate(root, "sd", params(), against="teacher")


def test_what_is_missing_is_named(root: Path, params: Callable[..., Params]) -> None:
    with pytest.raises(CheckpointError, match=r"clip has no model_index\.json"):
        evaluate(root, "clip", params())
    for place in ("./no-such-pipeline", "clip/no-such-pipeline", "models/of/mine"):
        with pytest.raises(ConfigError, match=f"{place} is no folder here"):
            evaluate(root, place, params())
    (root / "clip" / "model.safetensors").unlink()
    with pytest.raises(
        EvaluationError,
        match=r"no scorer of any suite can be loaded: clip_score.*no model\.safetensors.*openai/clip-vit-large",
    ):
        evaluate(root, "sd", params())
    (root / PROMPTS).unlink()
    with pytest.raises(ConfigError, match=r"prompts\.jsonl is missing; `dvc repro source` makes the prompts"):
        evaluate(root, "sd", params())


def test_the_command_says_errors_in_one_line_and_results_as_a_table(
    root: Path, params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump(params().model_dump(mode="json"), sort_keys=False))
    monkeypatch.chdir(root)
    assert foreign.main(["nowhere/at/all"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("evaluate: ")
    assert foreign.main(["sd", "--out", "relative"]) == 0
    assert "| mine | clip_score |" in capsys.readouterr().out
    assert (root / "relative" / foreign.RESULT).is_file()
