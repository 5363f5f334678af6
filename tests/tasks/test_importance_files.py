"""The files of stage `importance`: what is written is read back, FFN by FFN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tasks import importance_files
from tasks.importance_files import Tokens


def test_tokens_of_units_are_joined_in_order(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    units = [{name: torch.randn(5, 4, generator=generator) for name in ("a.ff", "b.moe")} for _ in range(3)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, unit in zip(paths, units, strict=True):
        save_file(unit, path)
    importance_files.save_tokens(tmp_path, paths)
    tokens = Tokens(tmp_path / importance_files.TOKENS, torch.device("cpu"))
    assert list(tokens) == ["a.ff", "b.moe"]
    assert len(tokens) == 2
    for name in tokens:
        assert torch.equal(tokens[name], torch.cat([unit[name] for unit in units]))
    assert "c.ff" not in tokens
    with pytest.raises(KeyError):
        tokens["c.ff"]
