"""What `dense2moe evaluate` goes on with in a folder that it finds, and what it compares with: checked before any picture is made.

- A model in a local folder is known by the SHA-256 of each of its files, not by its path alone: a folder is trained further in place. Hidden
  files and `__pycache__` do not count. A hub id is known by its name.
- Pictures of another pipeline, other parameters or prompts are refused. Rows of a scorer whose models have changed, or that compared with
  other pictures, are removed and made anew: they cost less than pictures.
- A model to compare with must have an evaluation here, of the same seed, prompts and pictures a prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from moe_core.config import Params
from moe_core.errors import ConfigError
from moe_core.metrics import registry
from moe_core.pipeline_source import PipelineSource
from tasks import outs, scoring, suites
from tasks.places import EVALUATIONS, IMAGES
from tasks.suites import Suite

ASKED, ASKED_PROMPTS, SCORED = "asked.json", "prompts.json", "scored.json"


@dataclass(frozen=True)
class Reference:
    """A model of the checkout to compare with."""

    name: str
    images: Path
    """a folder a suite"""
    rows: Path
    """folder of its evaluation's tables"""
    lacking: Mapping[str, str]
    """suite that it has no counterpart of -> why"""


def claim_folder(out: Path, source: PipelineSource, params: Params) -> None:
    """A folder with pictures or rows belongs to one pipeline and one set of parameters; raises ConfigError for others."""
    place = Path(source.place)
    asked: dict[str, Any] = json.loads(
        json.dumps(
            {
                "pipeline": source.place,
                "arguments": source.arguments,
                "precision": source.precision,
                "seed": params.seed,
                "eval": params.eval.model_dump(mode="json"),
                "files": files(place) if place.is_absolute() else None,
            }
        )
    )
    file = out / ASKED
    there = _read(file)
    used = any((out / "images").rglob("*.png")) or any((out / "rows").rglob("*.parquet"))
    if other := [key for key in asked if used and (key not in there or there[key] != asked[key])]:
        if other[0] == "files" and "files" in there:
            before, now = there["files"] or {}, asked["files"] or {}
            changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
            raise ConfigError(
                f"{source.place} has changed since {out} was made of it ({', '.join(changed[:3])}{', ...' * (len(changed) > 3)});"
                f" give --out another folder, or delete {out}"
            )
        raise ConfigError(
            f"{out} has the evaluation of another '{other[0]}' ({there.get(other[0])}); give --out another folder"
        )
    outs.write_json(file, asked)


def claim_prompts(out: Path, found: Sequence[Suite]) -> None:
    """Pictures have numbers for names: of a file of prompts that has changed since, they would be taken for the new ones'."""
    own = {suite.name: suites.fingerprint(suite) for suite in found if suite.missing is None}
    there = _read(out / ASKED_PROMPTS)
    if changed := [name for name in own if there.get(name, own[name]) != own[name]]:
        raise ConfigError(f"{out} has pictures of other prompts in suite {changed[0]}; give --out another folder")
    outs.write_json(out / ASKED_PROMPTS, there | own)


def reference_of(root: Path, name: str, found: Sequence[Suite], seed: int) -> Reference:
    """The model `name` of this checkout, as far as it can be compared with.

    A suite that it was not evaluated on is told in `lacking`. Raises ConfigError where it was evaluated on none, from another seed, with other
    prompts or numbers of pictures, or where files are missing.
    """
    file = root / EVALUATIONS / f"{name}.json"
    if not file.is_file():
        raise ConfigError(
            f"--against {name}: {file} is missing; one compares with a model that is evaluated here (`dvc repro evaluate@{name}`)"
        )
    own, told = _seed(root, name)
    if own != seed:
        raise ConfigError(
            f"--against {name}: its pictures are of seed {own} ({told}), these of {seed}; a comparison needs the same seed"
        )
    evaluated = _read(file).get("suites", {})
    reference = Reference(name, root / IMAGES / name, root / EVALUATIONS / name, {})
    lacking: dict[str, str] = {}
    for suite in found:
        if suite.missing is not None:
            continue
        if (theirs := evaluated.get(suite.name)) is None:
            lacking[suite.name] = f"{name} was not evaluated on suite {suite.name} ({file})"
        elif theirs["missing"] is not None:
            lacking[suite.name] = f"{name} was evaluated without suite {suite.name}: {theirs['missing']}"
        elif not theirs["measures"]:
            # Only rows say which prompts its pictures are of.
            lacking[suite.name] = f"no scorer measured anything of {name} in suite {suite.name} ({file})"
        else:
            _check(reference, suite, theirs["images_per_prompt"], file)
    if lacking and all(suite.name in lacking or suite.missing is not None for suite in found):
        raise ConfigError(f"--against {name}: there is no suite to compare in; {'; '.join(lacking.values())}")
    return Reference(name, reference.images, reference.rows, lacking)


def not_alike(reference: Reference, found: Sequence[Suite], images: Path) -> dict[str, str]:
    """Suite -> why its pictures, which are made, cannot be compared one by one with the reference's: none, or of another size."""
    why = dict(reference.lacking)
    for suite in found:
        if suite.missing is not None or suite.name in why or not comparing(suite):
            continue
        # A pipeline may make other sizes than it is asked for, so this shows only now.
        file = Path(suite.name) / _names(suite)[0]
        ours, theirs = (scoring.read_picture(folder / file).size for folder in (images, reference.images))
        if ours != theirs:
            why[suite.name] = f"pictures are of {ours} pixels, those of {reference.name} of {theirs}"
    return why


def renew_rows(out: Path, found: Sequence[Suite], assets: Mapping[str, str], reference: Path | None) -> None:
    """Removes rows that were made with other files of a scorer's models, or in comparison with other pictures."""
    there = _read(out / SCORED)
    models = {
        key: _digest(files(Path(assets[key])))
        for key in sorted({a.key for suite in found for n in suite.config.scorers for a in registry.spec(n).assets})
        # A hub id is no absolute path.
        if key in assets and Path(assets[key]).is_absolute()
    }
    own: dict[str, Any] = {}
    for suite in found:
        pictures = ""
        if reference is not None and suite.missing is None and comparing(suite):
            pictures = _digest({name: _sha256(reference / suite.name / name) for name in _names(suite)})
        for name in suite.config.scorers:
            spec = registry.spec(name)
            if suite.missing is not None or (spec.needs_reference and reference is None):
                continue
            key = f"{suite.name}/{name}"
            own[key] = {"models": {a.key: models[a.key] for a in spec.assets if a.key in models}}
            if spec.needs_reference:
                own[key]["reference"] = pictures
            if there.get(key) != own[key] and (rows := out / "rows" / key).exists():
                shutil.rmtree(rows)
    outs.write_json(out / SCORED, there | own)


def files(place: Path) -> dict[str, str]:
    """Path in a model's folder -> SHA-256 of each of its files, or of the one file that it is; empty where nothing lies."""
    if place.is_file():
        return {place.name: _sha256(place)}
    found: dict[str, str] = {}
    # Links are followed: a pipeline's folder may have its transformer by a link.
    for folder, inner, names in os.walk(place, followlinks=True):
        # What loading and fetching leave there is not the model.
        inner[:] = [name for name in inner if not name.startswith(".") and name != "__pycache__"]
        paths = [Path(folder) / name for name in names if not name.startswith(".")]
        found |= {path.relative_to(place).as_posix(): _sha256(path) for path in paths if path.is_file()}
    return dict(sorted(found.items()))


def _check(reference: Reference, suite: Suite, images_per_prompt: int, file: Path) -> None:
    """Raises ConfigError where a suite's counterpart has other prompts or numbers of pictures, or lacks files."""
    name, where = reference.name, f"suite {suite.name}"
    if images_per_prompt != suite.config.images_per_prompt:
        raise ConfigError(
            f"--against {name}: {file} is of {images_per_prompt} pictures a prompt in {where}, asked for are"
            f" {suite.config.images_per_prompt}; a comparison needs the same number"
        )
    tables = [reference.rows / f"{suite.name}.{kind}.parquet" for kind in ("prompts", "pictures")]
    needed = [reference.images / suite.name / file_name for file_name in _names(suite)]
    for path in [*tables, *(needed if comparing(suite) else [])]:
        if not path.is_file():
            raise ConfigError(
                f"--against {name}: {path} is missing; a comparison needs the rows, and scorers that compare the pictures,"
                f" of all prompts (`dvc repro evaluate@{name}`, or `dvc pull`)"
            )
    texts = pd.read_parquet(tables[0], columns=["id", "prompt"])
    # Ids alone do not tell: in a text file they are the lines' numbers.
    if list(zip(texts["id"], texts["prompt"])) != [(prompt.id, prompt.text) for prompt in suite.prompts]:
        raise ConfigError(
            f"--against {name}: {tables[0]} is of other prompts in {where}; a paired difference needs the same ones"
        )


def _seed(root: Path, name: str) -> tuple[int, str]:
    """The seed of a model's pictures, and where it was read: what dvc.lock says made them, or params.yaml for want of it.

    An evaluation's own files do not have it.
    """
    lock, params = root / "dvc.lock", root / "params.yaml"
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {}) if lock.is_file() else {}
    made = stages.get(f"generate@{name}", {}).get("params", {}).get("params.yaml", {})
    if "seed" in made:
        return int(made["seed"]), f"{lock}, generate@{name}"
    if not params.is_file():
        raise ConfigError(
            f"--against {name}: neither {lock} nor {params} says of what seed its pictures are; a comparison needs the same seed"
        )
    return int(yaml.safe_load(params.read_text(encoding="utf-8"))["seed"]), str(params)


def comparing(suite: Suite) -> list[str]:
    """Its scorers that compare with the reference's pictures."""
    return [name for name in suite.config.scorers if registry.spec(name).needs_reference]


def _names(suite: Suite) -> list[str]:
    """Its pictures' files, which are the same of every seed."""
    return [picture.file for picture in suites.pictures(suite, 0)]


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _digest(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
