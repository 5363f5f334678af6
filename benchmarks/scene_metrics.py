"""What the metrics of the embedded data see: the small CLIP's separation of faults, and every measure on real scenes made worse in steps.

    python -m benchmarks.scene_metrics        presets digits and scenes; writes benchmarks/results/scene_metrics.json, prints docs/scenes.md's tables

Two to three minutes on one core. The pictures are scenes of the generator's digits that no data set has; FID and KID are taken to a
thousand others.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.numpy import save_file

from moe_core import noise
from moe_core.config import EmbeddedDataConfig, Params, parse
from moe_core.data import embedded
from moe_core.metrics import classifier, corruption, fid, registry, scene_clip, scene_scorers
from moe_core.metrics.scorer import Prompt
from tasks import sanity, scoring
from tasks.params import compose
from tasks.places import CLIP
from tasks.suites import Picture

RESULTS = Path("benchmarks/results/scene_metrics.json")
PRESETS = ("scenes", "digits")
SCORERS = ("scenes", "scene_features", "similarity", "scene_distance", "clip_score")
PICTURES, REAL, SEPARATED = 200, 1000, 4000
SEEDS = (0, 1)
"""Of the CLIP."""


def one_preset(name: str, folder: Path) -> dict[str, Any]:
    """Both tables of one preset."""

    params = parse(
        Params, yaml.safe_load(compose(Path.cwd(), [f"data={name}", f"model={name}", "eval=scenes", "experiment=demo"]))
    )
    config = params.data.embedded
    assert config is not None
    assert params.eval.classifier is not None
    assert params.eval.contrastive is not None
    judge, _ = classifier.train_classifier(
        *embedded.evaluator_digits(config), params.eval.classifier, noise.derive_seed(0, "evaluator")
    )
    judge.save(folder)
    (folder / scene_scorers.JUDGE_FILE).write_text(json.dumps({"grid": config.grid}))
    real = np.stack([embedded.make_scene(config, 77, i).image for i in range(REAL)])
    save_file({"features": fid.features(real, judge, config.grid)}, folder / scene_scorers.FEATURES_FILE)
    others = [embedded.make_scene(config, 78, i) for i in range(SEPARATED)]
    small, separation = params.eval.contrastive, {}
    for seed in SEEDS:
        clip, processor, _ = scene_clip.train(
            config, seed, small.steps, small.batch_size, small.learning_rate, small.scenes
        )
        separation[seed] = scene_clip.separation(clip, processor, others, config, seed)
        if seed == SEEDS[0]:
            scene_clip.save(clip, processor, folder / CLIP)
    return {"separation": separation, "corruption": corrupted(config, params, folder)}


def corrupted(config: EmbeddedDataConfig, params: Params, folder: Path) -> dict[str, Any]:
    """Measure -> kind of corruption -> a value a level, as stage `sanity` has it."""
    kinds = list(dict.fromkeys(config.kinds))
    scenes: list[embedded.Scene] = []
    index = 0
    while len(scenes) < PICTURES:
        # The kinds in turn, as evaluation's prompts have them.
        scene = embedded.make_scene(config, 79, index)
        index += 1
        if scene.record["tag"] == kinds[len(scenes) % len(kinds)]:
            scenes.append(scene)
    clean = folder / "clean"
    clean.mkdir()
    pictures = []
    for number, scene in enumerate(scenes):
        picture = Picture(Prompt(f"{number:05d}", scene.prompt, scene.record["tag"], scene.record), number, 0, 0)
        Image.fromarray(scene.image).save(clean / picture.file)
        pictures.append(picture)
    cells = sanity.corrupted(pictures, clean, folder / "corrupted")
    assets = {"scene_judge": str(folder), "clip": str(folder / CLIP)}
    compute = params.compute.model_copy(update={"num_workers": 0, "cpus_per_worker": 1})
    found: dict[str, Any] = {}
    with scoring.judges(assets, compute) as judges:
        for name in SCORERS:
            spec = registry.spec(name)
            units = [
                unit
                for cell in cells
                for unit in scoring.units(
                    spec, cell.pictures, cell.folder, clean, folder / "rows" / name / f"{cell.kind}-{cell.level}", 50
                )
            ]
            table, _ = scoring.run(units, judges, lambda done, of, rate: None)
            found |= sanity.values(spec, table, cells, assets, 0)
    return found


def markdown(name: str, result: dict[str, Any]) -> list[str]:
    """One preset's tables."""
    measures = result["corruption"]
    lines = [
        f"### {name}",
        "",
        "| fault | seed " + " | seed ".join(map(str, SEEDS)) + " |",
        "|---|" + "--:|" * len(SEEDS),
    ]
    for fault in ("class", "color", "count", "position", "binding"):
        shares = [result["separation"][seed].get(fault) for seed in SEEDS]
        if None not in shares:
            lines.append(f"| {fault} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    lines += ["", "| fault | " + " | ".join(measures) + " |", "|---|" + "--:|" * len(measures)]
    for kind in corruption.KINDS:
        for level in corruption.LEVELS:
            lines.append(f"| {kind} {level} | " + " | ".join(f"{m[kind][level]:.4g}" for m in measures.values()) + " |")
    return [*lines, ""]


def main() -> None:
    """Both presets."""
    torch.set_num_threads(1)
    results = {}
    for name in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = one_preset(name, Path(folder))
        print("\n".join(markdown(name, results[name])), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
