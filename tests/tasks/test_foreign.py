"""`dense2moe evaluate` on pipelines that are not ours: Stable Diffusion and PixArt of random weights, a text file of prompts, real scorers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPVisionConfig

from moe_core.config import Params, parse
from moe_core.errors import CheckpointError, ConfigError, DataError, EvaluationError
from moe_core.small_flux import clip_tokenizer
from tasks import comparison, foreign, foreign_claim, generation, outs
from tasks.measures import SuiteResult
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
    """What the stages would have left of a model: pictures, tables, results; and the parameters that they are of."""
    shutil.copytree(root / out / "images", root / IMAGES / name)
    (root / EVALUATIONS / name).mkdir(parents=True)
    for file in (root / out).glob("*.parquet"):
        shutil.copy(file, root / EVALUATIONS / name)
    told = json.loads((root / out / foreign.RESULT).read_text())
    outs.write_json(root / EVALUATIONS / f"{name}.json", {"model": name, "suites": told["suites"]})
    seed = json.loads((root / out / foreign_claim.ASKED).read_text())["seed"]
    (root / "params.yaml").write_text(yaml.safe_dump({"seed": seed}))


def change(file: Path, tensor: str, by: float = 0.5) -> None:
    """One tensor of a model, trained further in place: the file keeps its size."""
    tensors = load_file(file)
    tensors[tensor] = tensors[tensor] + by * torch.randn(tensors[tensor].shape, generator=torch.Generator())
    save_file(tensors, file, {"format": "pt"})


def measured(told: dict[str, Any], suite: str = "mine") -> dict[str, float]:
    return {name: value["value"] for name, value in told["suites"][suite]["measures"].items()}


def times(folder: Path, pattern: str) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob(pattern)}


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


@pytest.fixture
def against(root: Path, params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an evaluated teacher, in which no picture may be made: what is refused is refused before."""
    evaluate(root, "sd", params(), "first")
    as_evaluated(root, "first", "teacher")

    def make(*_: Any) -> float:
        raise AssertionError("pictures are made")

    monkeypatch.setattr(generation, "make", make)
    return root


def test_what_cannot_be_compared_is_refused_before_any_picture_is_made(
    against: Path, params: Callable[..., Params]
) -> None:
    root, rows = against, against / EVALUATIONS / "teacher"

    def refused(message: str, **asked: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            evaluate(root, "sd", params(**asked), "new", "teacher")
        shutil.rmtree(root / "new")

    refused(r"--against teacher: .*teacher\.json is of 2 pictures a prompt in suite mine, .* 1;", images_per_prompt=1)
    refused(r"--against teacher: its pictures are of seed 0 \(.*params\.yaml\), these of 1;", seed=1)
    # What dvc.lock says made the pictures counts before what is asked for now.
    lock = root / "dvc.lock"
    lock.write_text(yaml.safe_dump({"stages": {"generate@teacher": {"params": {"params.yaml": {"seed": 7}}}}}))
    refused(
        r"its pictures are of seed 7 \(.*dvc\.lock, generate@teacher\), these of 0; a comparison needs the same seed"
    )
    lock.unlink()
    (root / "params.yaml").rename(root / "away.yaml")
    refused(r"neither .*dvc\.lock nor .*params\.yaml says of what seed")
    (root / "away.yaml").rename(root / "params.yaml")

    table = rows / "mine.prompts.parquet"
    whole = pd.read_parquet(table)
    whole.assign(prompt=["a red four", "a green one"]).to_parquet(table)
    refused(r"--against teacher: .*mine\.prompts\.parquet is of other prompts in suite mine; .* needs the same ones")
    whole.to_parquet(table)

    for gone in (
        root / IMAGES / "teacher" / "mine" / "00001-00.png",
        rows / "own.pictures.parquet",
        rows.with_suffix(".json"),
        root / IMAGES / "teacher",
    ):
        gone.rename(root / "away")
        refused(rf"--against teacher: {gone}.* is missing; ")
        (root / "away").rename(gone)
    # Nothing of all this is wrong now.
    with pytest.raises(AssertionError, match="pictures are made"):
        evaluate(root, "sd", params(), "new", "teacher")


def test_without_any_suite_in_common_a_comparison_is_refused(against: Path, params: Callable[..., Params]) -> None:
    outs.write_json(against / EVALUATIONS / "teacher.json", {"model": "teacher", "suites": {}})
    with pytest.raises(
        ConfigError, match=r"no suite to compare in; teacher was not evaluated on suite own .* suite mine"
    ):
        evaluate(against, "sd", params(), "new", "teacher")


def test_a_suite_that_the_other_model_was_not_evaluated_on_is_told_and_the_rest_goes_on(
    root: Path, params: Callable[..., Params]
) -> None:
    (root / "mine.txt").rename(root / "later.txt")
    evaluate(root, "sd", params(), "first")
    as_evaluated(root, "first", "teacher")
    (root / "later.txt").rename(root / "mine.txt")
    told = evaluate(root, "sd", params(), "new", "teacher")
    assert told["differences"]["own"]["clip_score"]["value"] == 0
    why = told["differences"]["mine"].pop("not_compared")
    assert why.startswith("teacher was evaluated without suite mine: eval.suites.mine.path is mine.txt")
    assert told["differences"]["mine"] == {}
    assert told["suites"]["mine"]["not_measured"]["similarity"] == why
    assert list(measured(told)) == ["clip_score"]
    assert f"| mine | difference | not compared | {why} | |" in foreign.table(
        told | {"differences": {"mine": {"not_compared": why}}}
    )


def test_pictures_of_other_sizes_are_compared_by_their_measures_alone(
    root: Path, params: Callable[..., Params]
) -> None:
    evaluate(root, "sd", params(), "first")
    as_evaluated(root, "first", "teacher")
    for file in (root / IMAGES / "teacher").rglob("*.png"):
        read_picture(file).resize((32, 32)).save(file)
    told = evaluate(root, "sd", params(), "new", "teacher")
    why = "pictures are of (16, 16) pixels, those of teacher of (32, 32)"
    assert told["suites"]["mine"]["not_measured"]["similarity"] == why
    assert told["differences"]["mine"]["clip_score"]["value"] == 0
    with pytest.raises(EvaluationError, match=r"nothing can be compared: pictures are of \(16, 16\)"):
        asked = params(scorers=["similarity"])
        asked.eval.suites.pop("own")
        evaluate(root, "sd", asked, "alone", "teacher")


def test_a_comparison_that_fails_loses_nothing(
    root: Path, params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(root, "sd", params(), "first")
    as_evaluated(root, "first", "teacher")

    def differences(*_: Any) -> dict[str, Any]:
        raise DataError("damaged")

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "differences", differences)
        with pytest.raises(DataError, match="damaged"):
            evaluate(root, "sd", params(), "new", "teacher")
    kept = json.loads((root / "new" / foreign.RESULT).read_text())
    told = evaluate(root, "sd", params(), "new", "teacher")
    assert kept == {key: value for key, value in told.items() if key != "differences"}
    assert "rmse" in measured(kept)


def test_a_folder_compares_with_the_model_that_is_asked_for_now(root: Path, params: Callable[..., Params]) -> None:
    for seed, name in ((5, "one"), (6, "two")):
        save_stable_diffusion(root / name, seed=seed)
        evaluate(root, name, params(), f"of-{name}")
        as_evaluated(root, f"of-{name}", name)
    one = evaluate(root, "sd", params(), against="one")
    kept = times(root / "out" / "images", "*.png") | times(root / "out" / "rows", "clip_score/*")
    two = evaluate(root, "sd", params(), against="two")
    assert measured(two)["rmse"] != measured(one)["rmse"]
    assert two == evaluate(root, "sd", params(), "anew", "two")
    # The same name with other pictures is another reference.
    shutil.rmtree(root / IMAGES / "two")
    shutil.copytree(root / IMAGES / "one", root / IMAGES / "two")
    assert measured(evaluate(root, "sd", params(), against="two"))["rmse"] == measured(one)["rmse"]
    # Without a reference its rows lie still, and nothing else was made again.
    rows = times(root / "out" / "rows", "similarity/*")
    assert list(measured(evaluate(root, "sd", params()))) == ["clip_score"]
    evaluate(root, "sd", params(), against="one")
    assert times(root / "out" / "rows", "similarity/*") == rows
    assert kept == times(root / "out" / "images", "*.png") | times(root / "out" / "rows", "clip_score/*")


def test_a_pipeline_that_has_changed_in_place_is_refused(root: Path, params: Callable[..., Params]) -> None:
    told = evaluate(root, "sd", params())
    weights = root / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy2(weights, root / "away")
    change(weights, "conv_in.weight")
    with pytest.raises(
        ConfigError,
        match=r"/sd has changed since .*/out was made of it \(unet/diffusion_pytorch_model\.safetensors\);"
        r" give --out another folder, or delete .*/out",
    ):
        evaluate(root, "sd", params())
    # The same files at another time, and what is no part of the model, are no change.
    shutil.copy(root / "away", weights)
    (root / "sd" / ".cache").mkdir()
    (root / "sd" / ".cache" / "download").write_text("x")
    assert evaluate(root, "sd", params()) == told
    # A transformer or UNet may lie elsewhere.
    (root / "sd" / "unet").rename(root / "elsewhere")
    (root / "sd" / "unet").symlink_to(root / "elsewhere")
    assert evaluate(root, "sd", params()) == told
    change(root / "elsewhere" / weights.name, "conv_in.weight")
    with pytest.raises(ConfigError, match="has changed since"):
        evaluate(root, "sd", params())


def test_rows_without_pictures_belong_to_their_pipeline_too(root: Path, params: Callable[..., Params]) -> None:
    evaluate(root, "sd", params())
    shutil.rmtree(root / "out" / "images")
    save_stable_diffusion(root / "other", seed=5)
    with pytest.raises(ConfigError, match="evaluation of another 'pipeline'"):
        evaluate(root, "other", params())


def test_a_scorer_whose_model_has_changed_in_place_scores_anew(root: Path, params: Callable[..., Params]) -> None:
    evaluate(root, "sd", params(), "first")
    as_evaluated(root, "first", "teacher")
    before = evaluate(root, "sd", params(), against="teacher")
    pictures, rows = times(root / "out" / "images", "*.png"), times(root / "out" / "rows", "similarity/*")
    change(root / "clip" / "model.safetensors", "text_projection.weight")
    after = evaluate(root, "sd", params(), against="teacher")
    assert measured(after)["clip_score"] != measured(before)["clip_score"]
    assert after == evaluate(root, "sd", params(), "anew", "teacher")
    # It alone.
    assert times(root / "out" / "images", "*.png") == pictures
    assert times(root / "out" / "rows", "similarity/*") == rows


def test_seconds_a_picture_are_of_what_this_run_has_made(root: Path, params: Callable[..., Params]) -> None:
    def costs() -> dict[str, Any]:
        return dict(json.loads((root / "out" / foreign.COSTS).read_text()))

    result = root / "out" / foreign.RESULT
    evaluate(root, "sd", params())
    first, told = costs(), result.read_bytes()
    # Three of suite own, two of two prompts of suite mine.
    assert first["generate"]["pictures"] == 7
    assert {suite: own["clip_score"]["pictures"] for suite, own in first["suites"].items()} == {"own": 3, "mine": 4}
    assert all(own["seconds_a_picture"] > 0 for own in (first["generate"], first["suites"]["mine"]["clip_score"]))
    # A unit of two pictures, and rows of four.
    (root / "out" / "images" / "mine" / "00001-00.png").unlink()
    (root / "out" / "rows" / "mine" / "clip_score" / "0000000.parquet").unlink()
    evaluate(root, "sd", params())
    assert costs()["generate"]["pictures"] == 2
    assert {suite: list(own) for suite, own in costs()["suites"].items()} == {"mine": ["clip_score"]}
    evaluate(root, "sd", params())
    assert costs() == {"suites": {}}
    assert result.read_bytes() == told


@pytest.mark.parametrize(
    "line",
    [
        "sd model.num_inference_steps=3 seed=4 --out there --against teacher",
        "sd --against teacher model.num_inference_steps=3 seed=4 --out there",
        "sd --out there --against teacher model.num_inference_steps=3 seed=4",
        "sd model.num_inference_steps=3 --out there seed=4 --against teacher",
        "--out there sd model.num_inference_steps=3 --against=teacher seed=4",
    ],
)
def test_overrides_stand_before_between_and_after_options(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    asked: dict[str, Any] = {}

    def record(root: Path, place: str, out: Path, params: Params, against: str | None) -> dict[str, Any]:
        asked.update(place=place, out=out, steps=params.model.num_inference_steps, seed=params.seed, against=against)
        return {"suites": {}}

    monkeypatch.setattr(foreign, "evaluate", record)
    assert foreign.main(line.split()) == 0
    assert asked == {"place": "sd", "out": Path("there"), "steps": 3, "seed": 4, "against": "teacher"}


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


def test_a_picture_costs_the_same_where_others_were_scored_before(tmp_path: Path) -> None:
    """The engine tells seconds a picture of what was scored now: nothing is to be shared out among the rest again."""
    rows = tmp_path / "mine" / "clip_score"
    rows.mkdir(parents=True)
    for name in ("there", "new"):
        pd.DataFrame({"id": ["p0", "p1"]}).to_parquet(rows / f"{name}.parquet")
    suite: Any = SimpleNamespace(name="mine")
    result = SuiteResult(suite, tables={"clip_score": pd.DataFrame({"id": range(4)})})
    result.seconds_a_picture["clip_score"] = 0.5
    found = foreign._scored([result], tmp_path, {rows / "there.parquet"})
    assert found == {"mine": {"clip_score": {"pictures": 2, "seconds_a_picture": 0.5}}}
