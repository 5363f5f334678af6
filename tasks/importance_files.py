"""What stage `importance` leaves for the conversions, as files and as values.

- `scores.safetensors`: FFN name -> score of each segment, float64 [F] (eq. 6).
- `conditioning.safetensors`: `vectors` [N, D], from which AdaLN is compressed.
- `tokens/<FFN>.safetensors`: `inputs` [N, D], a sample of what the FFN takes (`kd.calibration_tokens`); a file each: all are 4 GB for
  FLUX.1.
- `block_change.json`: each block's relative change, in the mean, by noise level and by prompt (Fig. 3).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_core.errors import CheckpointError
from tasks import outs

SCORES, CONDITIONING, CHANGE = "scores.safetensors", "conditioning.safetensors", "block_change.json"
TOKENS = "tokens"
SIGMA_BINS = 8
PROMPTS_SHOWN = 32


@dataclass(frozen=True)
class Importance:
    """Scores a FFN, conditioning vectors, each block's mean relative change, and mean squared one, and tokens a FFN."""

    scores: dict[str, Tensor]
    conditioning: Tensor
    block_change: dict[str, float]
    block_error: dict[str, float]
    tokens: Mapping[str, Tensor]


class Tokens(Mapping[str, Tensor]):
    """FFN name -> tokens [N, D] on `device`, each read when it is asked for. Conversions are fitted where they lie."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device

    def __getitem__(self, name: str) -> Tensor:
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            raise KeyError(name)
        return load_file(path, str(self._device))["inputs"]

    def __contains__(self, name: object) -> bool:
        return (self._folder / f"{name}.safetensors").is_file()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in self._folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return len(list(self._folder.glob("*.safetensors")))


def save(
    folder: Path, scores: dict[str, Tensor], conditioning: Tensor, blocks: Sequence[str], rows: Sequence[dict[str, Any]]
) -> None:
    """Writes the three files. `rows`: a dict a sample with key, sigma, relative and mse (by block)."""
    save_file(scores, folder / SCORES)
    save_file({"vectors": conditioning}, folder / CONDITIONING)
    outs.write_json(folder / CHANGE, _change(blocks, rows))


def save_tokens(folder: Path, units: Sequence[Path]) -> None:
    """Joins the tokens of these files, FFN by FFN."""
    (folder / TOKENS).mkdir()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(unit, "pt")) for unit in units]
        for name in files[0].keys():  # noqa: SIM118 - not a mapping
            save_file(
                {"inputs": torch.cat([file.get_tensor(name) for file in files])},
                folder / TOKENS / f"{name}.safetensors",
            )


def load(folder: Path, device: torch.device | None = None) -> Importance:
    """Reads what `save` and `save_tokens` wrote; `device`: of the tokens; raises CheckpointError for a missing file."""
    for name in (SCORES, CONDITIONING, CHANGE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; stage importance writes it")
    change = json.loads((folder / CHANGE).read_text())
    means, errors = (dict(zip(change["blocks"], change[kind], strict=True)) for kind in ("relative", "mse"))
    return Importance(
        load_file(folder / SCORES),
        load_file(folder / CONDITIONING)["vectors"],
        means,
        errors,
        Tokens(folder / TOKENS, device or torch.device("cpu")),
    )


def _change(blocks: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over all samples, over each of eight equal shares of them by noise level, and over the samples of a prompt."""
    relative_NL = torch.tensor([row["relative"] for row in rows], dtype=torch.float64)
    mse_NL = torch.tensor([row["mse"] for row in rows], dtype=torch.float64)
    sigma_N = torch.tensor([row["sigma"] for row in rows], dtype=torch.float64)
    shares = [share for share in sigma_N.argsort(stable=True).tensor_split(SIGMA_BINS) if len(share)]
    prompts = list(dict.fromkeys(row["key"] for row in rows))[:PROMPTS_SHOWN]
    of_prompt = [torch.tensor([n for n, row in enumerate(rows) if row["key"] == prompt]) for prompt in prompts]
    return {
        "blocks": list(blocks),
        "samples": len(rows),
        "relative": relative_NL.mean(0).tolist(),
        "mse": mse_NL.mean(0).tolist(),
        "sigmas": [sigma_N[share].mean().item() for share in shares],
        "by_sigma": [relative_NL[share].mean(0).tolist() for share in shares],
        "mse_by_sigma": [mse_NL[share].mean(0).tolist() for share in shares],
        "prompts": prompts,
        "by_prompt": [relative_NL[chosen].mean(0).tolist() for chosen in of_prompt],
    }
