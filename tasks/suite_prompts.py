"""The prompts of the benchmarks in `eval.suites`, read from where the user put their files, and kept for the stages that follow.

- Files that are not there are no error: the suite says what to get, and counts as not measured. Files that are wrong are one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_core import noise
from moe_core.config import Params, SuiteConfig
from moe_core.errors import DataError
from moe_core.metrics import compbench, dpg, geneval_verdict, mjhq, plain_prompts
from moe_core.metrics.scorer import MissingAsset, Prompt
from tasks import outs
from tasks.places import SUITES
from tasks.suites import INDEX

READERS: dict[str, Callable[[Path], list[Prompt]]] = {
    "geneval": geneval_verdict.read_prompts,
    "dpg": dpg.read_prompts,
    "compbench": compbench.read_prompts,
    "mjhq": mjhq.read_prompts,
    "text": plain_prompts.read_text,
    "jsonl": plain_prompts.read_jsonl,
}
"""Format of `eval.suites.*.prompts` -> who reads it."""


def collect(root: Path, params: Params, place: Path = SUITES) -> dict[str, int]:
    """Reads every benchmark's prompts from the user's files and writes them to data/suites/ or another place; returns their numbers.

    Raises DataError where a file is there and wrong.
    """
    told: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    with outs.folder(root / place) as folder:
        for name, config in params.eval.suites.items():
            if config.path is None:
                continue
            if not (root / config.path).exists():
                told[name] = {
                    "missing": f"eval.suites.{name}.path is {config.path}, where nothing lies; docs/metrics.md says what to fetch"
                }
                continue
            try:
                whole = READERS[config.prompts](root / config.path)
            except MissingAsset as error:
                told[name] = {"missing": str(error)}
                continue
            prompts = chosen(whole, config, noise.derive_seed(params.seed, name))
            check(name, prompts)
            told[name] = {"path": str(config.path), "sha256": _sha256(root / config.path)}
            counts[name] = len(prompts)
            lines = "".join(json.dumps(asdict(prompt), ensure_ascii=False, sort_keys=True) + "\n" for prompt in prompts)
            outs.write_text(folder / f"{name}.jsonl", lines)
        outs.write_json(folder / INDEX, told)
    return counts


def chosen(prompts: list[Prompt], config: SuiteConfig, seed: int) -> list[Prompt]:
    """All prompts, or `config.count` of them, of each kind equally many; DataError where these are fewer than there are kinds."""
    if config.count is None:
        return prompts
    if config.count < (kinds := len({prompt.kind for prompt in prompts})):
        raise DataError(f"count is {config.count}, but there are {kinds} kinds of prompts; each must have one at least")
    return mjhq.stratified(prompts, config.count, seed)


def check(name: str, prompts: Sequence[Prompt]) -> None:
    """Raises DataError for a suite without prompts, or two of one id."""
    if not prompts:
        raise DataError(f"suite {name} has no prompts; it must have one at least")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"suite {name} has the prompt id '{prompt.id}' twice; ids must be unique")
        if not prompt.text.strip():
            raise DataError(f"suite {name}: prompt '{prompt.id}' is empty")
        seen.add(prompt.id)


def _sha256(path: Path) -> dict[str, str]:
    """Of each file, so that a result says which edition of a benchmark it is of."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if len(files) > 50:
        # DPG's prompts are a file each: one hash of all.
        whole = hashlib.sha256()
        for file in files:
            whole.update(file.relative_to(path).as_posix().encode() + b"\0" + file.read_bytes())
        return {f"{path.name}/ ({len(files)} files)": whole.hexdigest()}
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
