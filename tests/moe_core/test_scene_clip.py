"""The small CLIP: its loss, its wrong prompts, that it learns, and that its folder is a CLIP folder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from moe_core.config import EmbeddedDataConfig
from moe_core.data import embedded
from moe_core.data.embedded import Scene
from moe_core.errors import DataError
from moe_core.metrics import clip_score, scene_clip
from moe_core.metrics.scorer import Prompt, Sample

SINGLE = EmbeddedDataConfig(
    samples=10, kinds=("single_object", "colors"), canvas=16, grid=1, max_digits=1, generator_share=0.4
)
SCENES = EmbeddedDataConfig(
    samples=10,
    kinds=("single_object", "two_object", "counting", "colors", "position", "color_attr"),
    generator_share=0.4,
)

Trained = tuple[CLIPModel, CLIPProcessor, dict[str, float]]


@pytest.fixture(scope="module")
def trained() -> Trained:
    return scene_clip.train(SINGLE, seed=0, steps=150, batch_size=64, scenes=1000)


def test_it_tells_classes_and_colours_of_digits_that_it_has_not_seen(trained: Trained):
    model, processor, told = trained
    assert told["class"] > 0.8
    assert told["color"] > 0.95
    assert told["own_similarity"] > told["other_similarity"] + 0.2
    # The generator's digits are other people's too.
    scenes = [embedded.make_scene(SINGLE, 5, index) for index in range(300)]
    assert scene_clip.separation(model, processor, scenes, SINGLE, 0)["class"] > 0.8


def test_without_training_it_tells_nothing():
    told = scene_clip.train(SINGLE, seed=0, steps=1, batch_size=2, learning_rate=1e-9, scenes=50)[2]
    assert 0.3 < told["class"] < 0.7


def test_a_saved_folder_is_a_clip_folder(trained: Trained, tmp_path: Path):
    model, processor, _ = trained
    scene_clip.save(model, processor, tmp_path)
    loaded = CLIPModel.from_pretrained(tmp_path, use_safetensors=True).eval()
    again = CLIPProcessor.from_pretrained(tmp_path)
    scenes = [embedded.make_scene(SINGLE, 0, index) for index in range(4)]
    given = again(
        text=[scene.prompt for scene in scenes],
        images=[Image.fromarray(scene.image) for scene in scenes],
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=77,
    )
    # What is trained on is what the saved processor makes of a picture.
    pixels = np.stack([scene.image for scene in scenes]).transpose(0, 3, 1, 2) / 255
    assert given["pixel_values"].numpy() == pytest.approx(pixels, abs=1e-6)
    with torch.inference_mode():
        found = loaded(**given)
        # Padding changes nothing.
        short = again.tokenizer([scene.prompt for scene in scenes], padding=True, return_tensors="pt")
        own = model(pixel_values=given["pixel_values"], **short)
    torch.testing.assert_close(found.logits_per_image, own.logits_per_image)
    assert (again.tokenizer("a red seven and a blue three").input_ids) == processor.tokenizer(
        "a red seven and a blue three"
    ).input_ids


def test_clip_score_loads_it_as_any_clip(trained: Trained, tmp_path: Path):
    model, processor, _ = trained
    scene_clip.save(model, processor, tmp_path)
    scenes = [embedded.make_scene(SINGLE, 0, index) for index in range(100)]
    samples = [Sample(Prompt(str(i), scene.prompt), 0, Image.fromarray(scene.image)) for i, scene in enumerate(scenes)]
    rows = clip_score.load({"clip": str(tmp_path)}, torch.device("cpu")).score(samples)
    told = scene_clip.separation(model, processor, scenes, SINGLE, 0)
    # Clamped at 0, so not below.
    assert np.mean([row["clip_score"] for row in rows]) == pytest.approx(100 * told["own_similarity"], abs=1)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two = (scene_clip.train(SCENES, 3, steps=3, batch_size=8, scenes=20)[0].state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = scene_clip.train(SCENES, 4, steps=3, batch_size=8, scenes=20)[0].state_dict()
    assert not torch.equal(one["visual_projection.weight"], other["visual_projection.weight"])


def test_training_scenes_show_the_given_digits_alone():
    images, classes = embedded.evaluator_digits(SCENES)
    known = {(image * 255).round().astype(np.uint8).tobytes() for image in images[:700]}
    for index in range(30):
        scene = embedded.make_scene(SCENES, 0, index, (images[:700], classes[:700]))
        for top in (0, 8):
            for left in (0, 8):
                cell = scene.image[top : top + 8, left : left + 8].max(-1)
                assert not cell.any() or cell.tobytes() in known


def test_loss_is_clips_where_prompts_differ():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    rows = -torch.stack([logits[i].log_softmax(0)[i] for i in range(4)]).mean()
    columns = -torch.stack([logits[:, i].log_softmax(0)[i] for i in range(4)]).mean()
    assert scene_clip.contrastive_loss(logits, torch.arange(4)) == pytest.approx(float(rows + columns) / 2, rel=1e-5)


def test_equal_prompts_are_all_positives():
    # Pictures 0 and 2 have one prompt: the best there is splits evenly between them.
    logits = torch.tensor([[9.0, -9, 9], [-9, 9, -9], [9, -9, 9]])
    loss = scene_clip.contrastive_loss(logits, torch.tensor([4, 1, 4]))
    assert float(loss) == pytest.approx(2 / 3 * np.log(2), abs=1e-4)
    assert float(scene_clip.contrastive_loss(logits, torch.arange(3))) == pytest.approx(float(loss), abs=1e-4)
    lopsided = logits + torch.tensor([[0.0, 0, -4], [0, 0, 0], [-4, 0, 0]])
    assert scene_clip.contrastive_loss(lopsided, torch.arange(3)) < loss
    assert scene_clip.contrastive_loss(lopsided, torch.tensor([4, 1, 4])) > loss


def _object(name: str, count: int = 1, **more: object) -> dict[str, object]:
    return {"class": name, "count": count, **more}


@pytest.mark.parametrize(
    ("tag", "include", "prompt", "faults"),
    [
        ("single_object", [_object("eight")], "an eight", {"class": r"an? (?!eight)\w+"}),
        (
            "colors",
            [_object("one", color="red")],
            "a red one",
            {"class": r"a red (?!one)\w+", "color": r"a (?!red)\w+ one"},
        ),
        (
            "counting",
            [_object("six", 2)],
            "two sixes",
            {"class": r"two (?!sixes)\w+", "count": "(three|four) sixes"},
        ),
        (
            "position",
            [_object("two"), _object("eight", position=["above", 0])],
            "an eight above a two",
            {"class": r"an? \w+ above an? \w+", "position": "an eight below a two"},
        ),
        (
            "color_attr",
            [_object("two", color="red"), _object("eight", color="blue")],
            "a red two and a blue eight",
            {
                "class": r"a red \w+ and a blue \w+",
                "color": r"a \w+ two and a \w+ eight",
                "binding": "a blue two and a red eight",
            },
        ),
    ],
)
def test_wrong_prompts(tag: str, include: list[dict[str, object]], prompt: str, faults: dict[str, str]):
    record = {"tag": tag, "include": include, "prompt": prompt}
    for seed in range(20):
        found = scene_clip.wrong_prompts(record, SCENES, np.random.default_rng(seed))
        assert set(found) == set(faults)
        for fault, text in found.items():
            assert text != prompt
            assert re.fullmatch(faults[fault], text), (fault, text)


def test_every_kind_of_scene_has_its_prompt_from_its_record():
    for index in range(200):
        scene = embedded.make_scene(SCENES, 0, index)
        assert "class" in scene_clip.wrong_prompts(scene.record, SCENES, np.random.default_rng(0))


def test_faults_are_named(trained: Trained):
    model, processor, _ = trained
    with pytest.raises(DataError, match="batch_size 0"):
        scene_clip.train(SINGLE, 0, batch_size=0)
    with pytest.raises(DataError, match="no scene"):
        scene_clip.separation(model, processor, [], SINGLE, 0)
    scene = embedded.make_scene(SINGLE, 0, 0)
    with pytest.raises(DataError, match="'a cat'"):
        wrong = Scene(scene.image, {**scene.record, "prompt": "a cat"})
        scene_clip.separation(model, processor, [wrong], SINGLE, 0)
