"""Made-up inputs of the report, shaped as the stages write them. For tests only: the numbers mean nothing.

The report itself is the real one; only what it reads is invented here, because the real inputs take minutes to make.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from moe_core.config import Params, parse
from moe_core.metrics.scene_scorers import FEATURES_FILE

MODELS = ("teacher", "shared", "L", "M", "S", "XS")
PROMPTS = 12
STEPS = 20
SEEN = {"rising": True, "blind_to_swap": None} | {kind: [0.9, 0.8, 0.7, 0.7, 0.2] for kind in ("blur", "noise", "swap")}
ACCURACY = dict(zip(MODELS, (0.965, 0.90, 0.945, 0.92, 0.87, 0.81), strict=True))
ACTIVATED = dict(zip(MODELS, (1_903_424, 905_216, 1_012_480, 861_184, 733_952, 611_072), strict=True))
GROUPS = {
    "M": {"double": [[1, 2, 3]], "single": []},
    "S": {"double": [[1, 2, 3]], "single": [[4, 5, 6, 7]]},
    "XS": {"double": [[1, 2, 3]], "single": [[2, 3, 4, 5], [7, 8, 9, 10]]},
}


def params() -> Params:
    """The committed parameters' structure, with fewer prompts."""
    values = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text(encoding="utf-8"))
    values["eval"]["prompts"] = values["eval"]["sanity"] = PROMPTS
    return parse(Params, values)


def write_inputs(root: Path) -> None:
    """Writes every input of the report below `root`."""
    rng = np.random.default_rng(0)
    for index, model in enumerate(MODELS):
        _write(root / "data" / "evaluations" / f"{model}.json", evaluation(model, index, rng))
        _pictures(root / "data" / "images" / model / "own", root / "data" / "evaluations" / model, index, rng)
    save_file({"features": rng.normal(size=(40, 4))}, _inside(root / "data" / "evaluator") / FEATURES_FILE)
    _write(
        root / "reports" / "sanity.json",
        {
            "pictures": 10,
            "measures": {"exact": SEEN, "psnr": SEEN | {"blind_to_swap": "does not read the prompt"}},
            "not_measured": {"mps": "mps needs a folder"},
        },
    )
    for stage in ("teacher", "shared_expert_kd", "moe_kd", *(f"mob_kd-{level}" for level in GROUPS)):
        summary: dict[str, Any] = {"stage": stage, "fingerprint": "0123456789ab", "metrics": {"steps": 150}}
        if stage.startswith("mob_kd-"):
            summary["groups"] = GROUPS[stage.removeprefix("mob_kd-")]
        _write(root / "reports" / "stages" / f"{stage}.json", summary)
    evaluator = {"train_digits": 377.0, "test_digits": 162.0, "accuracy": 0.981, "detector_accuracy": 0.974}
    _write(
        root / "reports" / "stages" / "evaluator.json",
        {"stage": "evaluator", "fingerprint": "ba9876543210", "metrics": evaluator},
    )
    (root / "reports" / "curves").mkdir()
    for stage in (
        "teacher-vae",
        "teacher-text",
        "teacher",
        "shared_expert_kd",
        "moe_kd",
        "mob_kd-M",
        "mob_kd-S",
        "mob_kd-XS",
    ):
        curve(rng, with_distill="kd" in stage).to_csv(root / "reports" / "curves" / f"{stage}.csv", index=False)
    ratios = dict(zip(MODELS, (1.0, 0.83, 1.21, 1.02, 0.88, 0.71), strict=True))
    times = {
        m: {"1": {"median_s": 0.42 * r, "low_s": 0.41 * r, "high_s": 0.44 * r, "ratio": r}} for m, r in ratios.items()
    }
    _write(
        root / "reports" / "latency.json",
        {"device": "x86_64 CPU, 2 threads", "rounds": 5, "batch_sizes": [1], "models": times},
    )
    blocks = [f"transformer_blocks.{i}" for i in range(5)] + [f"single_transformer_blocks.{i}" for i in range(12)]
    mean = rng.uniform(0.02, 0.6, len(blocks))
    by_sigma = [(mean * rng.uniform(0.6, 1.6, len(blocks))).tolist() for _ in range(8)]
    by_prompt = [(mean * rng.uniform(0.7, 1.4, len(blocks))).tolist() for _ in range(32)]
    sigmas = np.linspace(0.96, 0.06, 8).tolist()
    change = {
        "blocks": blocks,
        "sigmas": sigmas,
        "by_sigma": by_sigma,
        "by_prompt": by_prompt,
        "relative": mean.tolist(),
    }
    _write(root / "data" / "importance" / "block_change.json", change)
    splits = {
        n: {"samples": s, "shards": [{"file": f"{n}-00000.safetensors"}]}
        for n, s in (("train", 7488), ("val", 256), ("calibration", 256))
    }
    rejects = {"missing caption": {"count": 3, "examples": [{"key": "000017", "detail": "no .txt"}]}}
    _write(root / "data" / "shards" / "manifest.json", {"splits": splits, "rejects": rejects})


def evaluation(model: str, index: int, rng: np.random.Generator) -> Mapping[str, Any]:
    """One `data/evaluations/<model>.json`."""
    layers = [f"transformer_blocks.{i}.{branch}" for i in range(1, 5) for branch in ("ff", "ff_context")]
    layers += [f"single_transformer_blocks.{i}.moe" for i in range(12)]
    routed = layers if model not in ("teacher", "shared") else []
    by_step = {layer: rng.dirichlet(np.full(12, 6.0), STEPS) for layer in routed}
    found = GROUPS.get(model, {"double": [], "single": []})
    names = [
        f"{stack}.{g[0]}-{g[-1]}"
        for stack, kind in (("transformer_blocks", "double"), ("single_transformer_blocks", "single"))
        for g in found[kind]
    ]
    sizes = [len(g) for kind in ("double", "single") for g in found[kind]]
    blocks = {name: rng.dirichlet(np.full(size, 4.0), STEPS) for name, size in zip(names, sizes, strict=True)}
    activated, accuracy = ACTIVATED[model], ACCURACY[model]
    return {
        "model": model,
        "prompts": PROMPTS,
        "nfe": STEPS,
        "judged": {
            "accuracy": accuracy,
            "accuracy_low": accuracy - 0.031,
            "accuracy_high": min(accuracy + 0.028, 1.0),
            "interval": "bootstrap over prompts, 2000 draws",
            "accuracy_by_kind": {"single_object": accuracy + 0.02, "colors": accuracy - 0.02},
            "prompts_by_kind": {"single_object": PROMPTS // 2, "colors": PROMPTS // 2},
            "fid": 3.1 + 1.7 * index,
            "fid_reference": "held-out scenes of the source",
        },
        "teacher_distance": 0.021 * index,
        "kd_loss": 0.0 if model == "teacher" else 0.004 + 0.0023 * abs(index - 1.6),
        "params": {
            "total": 1_903_424 - 200_000 * (index > 0),
            "activated": activated,
            "activated_paper": int(0.93 * activated) if index > 1 else activated,
            "by_module": {
                name: activated * share
                for name, share in (
                    ("double.attention", 0.13),
                    ("double.ffn", 0.15),
                    ("double.ffn_context", 0.15),
                    ("double.adaln", 0.05),
                    ("single.attention", 0.18),
                    ("single.ffn", 0.2),
                    ("single.adaln", 0.05),
                    ("block_routers", 0.01),
                    ("embedders", 0.06),
                    ("output", 0.02),
                )
            },
        },
        "flops": 1.21e8 * activated / ACTIVATED["teacher"],
        "expert_use": {layer: shares.mean(0).round(4).tolist() for layer, shares in by_step.items()},
        "expert_use_by_timestep": {layer: shares.round(4).tolist() for layer, shares in by_step.items()},
        "block_use": {group: shares.mean(0).round(4).tolist() for group, shares in blocks.items()},
        "block_use_by_timestep": {group: shares.round(4).tolist() for group, shares in blocks.items()},
        "suites": {
            "own": {
                "prompts": PROMPTS,
                "measures": {
                    "exact": {
                        "value": accuracy,
                        "low": accuracy - 0.04,
                        "high": accuracy + 0.02,
                        "count": PROMPTS,
                        "by_kind": {
                            kind: {"value": accuracy, "low": low, "high": 1.0, "count": PROMPTS // 2}
                            for kind, low in (("single_object", 0.125), ("colors", 0.25))
                        },
                    },
                    "scene_fid": {"value": 3.1, "low": 1.4, "high": 4.8, "count": PROMPTS},
                },
                "not_measured": {"clip_score": "clip_score needs CLIP; fetch it"},
            }
        },
    }


def curve(rng: np.random.Generator, with_distill: bool) -> pd.DataFrame:
    """A falling loss, train every 10 steps and validation every 50, as the stages' CSV has it."""
    steps = np.arange(10, 151, 10)
    loss = 0.4 * np.exp(-steps / 45) + 0.03
    train = pd.DataFrame({"step": steps, "split": "train", "loss": loss * rng.uniform(0.9, 1.1, len(steps))})
    validation = pd.DataFrame({"step": steps[4::5], "split": "validation", "loss": loss[4::5]})
    both = pd.concat([train, validation], ignore_index=True)
    if with_distill:
        both["distill"] = both["loss"] / 3
        both.loc[both["split"] == "train", "balance"] = 1.0
    return both


def _inside(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _pictures(folder: Path, told: Path, index: int, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    told.mkdir(parents=True)
    rows = []
    lines = []
    digits = load_digits().images
    for number in range(PROMPTS):
        shape = np.zeros((16, 16, 3))
        shape[4:12, 4:12, number % 3] = digits[number] * 15
        noise = rng.normal(0, 6 * index, (16, 16, 3))
        Image.fromarray(np.clip(shape + noise, 0, 255).astype(np.uint8)).save(folder / f"{number:05d}-00.png")
        tag = ("single_object", "colors")[number % 2]
        prompt = f"a {('red', 'green', 'blue')[number % 3]} digit {number % 10}"
        correct = bool(rng.uniform() < ACCURACY[MODELS[index]])
        lines.append(
            json.dumps(
                {"index": number, "file": f"own/{number:05d}-00.png", "tag": tag, "prompt": prompt, "correct": correct}
            )
        )
        rows.append(
            {"id": f"{number:05d}", "kind": tag, "index": 0, "scenes.exact": correct, "scenes.geneval": correct}
            | {"scene_features.features": rng.normal(size=4).tolist()}
        )
    (told / "pictures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pd.DataFrame(rows).to_parquet(told / "own.pictures.parquet", index=False)
    prompts = [
        {"id": row["id"], "kind": row["kind"], "prompt": json.loads(line)["prompt"]}
        for row, line in zip(rows, lines, strict=True)
    ]
    pd.DataFrame(prompts).to_parquet(told / "own.prompts.parquet", index=False)


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
