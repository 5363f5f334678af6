"""Which of two things a place names: a folder, there or not, or a hub id."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_core import folders


@pytest.mark.parametrize(
    ("place", "is_folder"),
    [
        ("stabilityai/stable-diffusion", False),
        ("gpt2", False),
        ("data/llava", True),
        ("there", True),
        ("./gone", True),
        ("~/gone", True),
        ("/gone", True),
        ("one/two/three", True),
    ],
)
def test_a_folder_or_a_hub_id(tmp_path: Path, place: str, is_folder: bool) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "there").mkdir()
    found = folders.meant(place, tmp_path)
    assert (found is not None) == is_folder
    if found is not None:
        assert found == tmp_path / place
