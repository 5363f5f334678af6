"""The official folder's files as prompts, and what the specs say of the eight categories."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pandas as pd
import pytest

from moe_core.errors import DataError
from moe_core.metrics import aggregate, compbench
from moe_core.metrics.scorer import MissingAsset, check_assets

FILES = {
    "color_val.txt": "a green bench and a blue bowl\na green bench and a blue bowl\n",
    "shape_val.txt": "a round cookie and a square tin.\tseen\r\n",
    "texture_val.txt": "rubber gloves and a glass jar",
    "spatial_val.txt": "a cat on the left of a lamp\na airplane next to a dog\n",
    "3d_spatial_val.txt": "a vase hidden by a candle\n",
    "numeracy_val.txt": "two boys\na cup, three ships, and two fish were in a pantry\n",
    "non_spatial_val.txt": "A person is looking at a rainbow.\n",
    "complex_val.txt": "The red hat was on top of the brown coat rack.\n",
    "new_objects.txt": "cup - cups\nboy - boys\nship - ships\nfish - fish\ncup - cups\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def test_prompts(folder: Path):
    prompts = compbench.read_prompts(folder)
    assert [(p.id, p.kind, p.text) for p in prompts] == [
        ("color/1", "color", "a green bench and a blue bowl"),
        ("color/2", "color", "a green bench and a blue bowl"),
        ("shape/1", "shape", "a round cookie and a square tin."),
        ("texture/1", "texture", "rubber gloves and a glass jar"),
        ("spatial/1", "spatial", "a cat on the left of a lamp"),
        ("spatial/2", "spatial", "a airplane next to a dog"),
        ("3d_spatial/1", "3d_spatial", "a vase hidden by a candle"),
        ("numeracy/1", "numeracy", "two boys"),
        ("numeracy/2", "numeracy", "a cup, three ships, and two fish were in a pantry"),
        ("non_spatial/1", "non_spatial", "A person is looking at a rainbow."),
        ("complex/1", "complex", "The red hat was on top of the brown coat rack."),
    ]
    assert {p.id: dict(p.record) for p in prompts if p.record} == {
        "spatial/1": {"relation": ("cat", "on the left of", "lamp")},
        "spatial/2": {"relation": ("airplane", "next to", "dog")},
        "3d_spatial/1": {"relation": ("vase", "hidden by", "candle")},
        "numeracy/1": {"counts": [("boy", 2)]},
        "numeracy/2": {"counts": [("cup", 1), ("ship", 3), ("fish", 2)]},
    }


def test_missing_files_are_named(folder: Path):
    (folder / "3d_spatial_val.txt").unlink()
    (folder / "new_objects.txt").unlink()
    with pytest.raises(MissingAsset, match=r"has no 3d_spatial_val\.txt, new_objects\.txt; fetch examples/dataset"):
        compbench.read_prompts(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("shape_val.txt", "", r"shape_val\.txt is empty"),
        ("shape_val.txt", "a round cookie\n\na square tin\n", r"shape_val\.txt, line 2 has no prompt"),
        ("shape_val.txt", "\tseen\n", r"shape_val\.txt, line 1 has no prompt"),
        ("spatial_val.txt", "a cat behind a dog\n", r"spatial_val\.txt, line 1: 'a cat behind a dog' is not"),
        ("3d_spatial_val.txt", "a cat behind dogs\n", r"3d_spatial_val\.txt, line 1: 'a cat behind dogs' is not"),
        ("numeracy_val.txt", "two cups\nmany cups\n", r"numeracy_val\.txt, line 2: 'many cups' asks for no number"),
        ("new_objects.txt", "cup - cups\nfish\n", r"line 2 is 'fish'"),
    ],
)
def test_broken_files_are_named(folder: Path, name: str, text: str, message: str):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        compbench.read_prompts(folder)


def test_each_category_has_one_scorer():
    assert set(compbench.SCORER_OF) == set(compbench.KINDS)
    assert len(compbench.KINDS) == len(set(compbench.KINDS)) == 8
    for spec in compbench.SPECS:
        headline = spec.measures[0]
        assert headline.name == spec.name
        assert headline.over_kinds
        assert set(headline.kinds) == {kind for kind, scorer in compbench.SCORER_OF.items() if scorer == spec.name}
        module, _, function = spec.load_from.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_missing_assets_say_what_to_fetch():
    for spec in compbench.SPECS:
        for asset in spec.assets:
            others = {other.key: "somewhere/else" for other in spec.assets if other is not asset}
            with pytest.raises(MissingAsset, match=f"eval.models.{asset.key}"):
                check_assets(spec, others)


def test_a_number_is_the_mean_of_its_categories():
    """Two grades a prompt, by hand: non-spatial (0.6 + 1.0) / 2 and (0.2 + 0.2) / 2, mean 0.5; complex 0.9; their mean is 0.7."""
    rows = [
        ("non_spatial/1", "non_spatial", 0, 0.6),
        ("non_spatial/1", "non_spatial", 1, 1.0),
        ("non_spatial/2", "non_spatial", 0, 0.2),
        ("non_spatial/2", "non_spatial", 1, 0.2),
        ("complex/1", "complex", 0, 0.8),
        ("complex/1", "complex", 1, 1.0),
        ("color/1", "color", 0, math.nan),
    ]
    pictures = pd.DataFrame(rows, columns=["id", "kind", "index", "scot"])
    measure = compbench.SPECS[2].measures[0]
    prompts = aggregate.by_prompt(pictures[pictures["kind"].isin(measure.kinds)], ["scot"])
    assert aggregate.estimate(prompts, measure, 0).value == pytest.approx(70)
    kinds = aggregate.by_kind(prompts, measure, 0)
    assert {kind: found.value for kind, found in kinds.items()} == pytest.approx({"non_spatial": 50, "complex": 90})
