"""Where does the loss of a conversion come from? Answers for the checkout's own teacher, before training and after it.

    dvc exp run -S experiment=scenes importance          a teacher with its shards, scores and tokens
    python -m benchmarks.loss_sources layers             what each choice leaves of an FFN's output, and what the best routing would; a minute
    python -m benchmarks.loss_sources shapes             the same of `plus` with other experts
    python -m benchmarks.loss_sources train --steps 300 --seeds 0 --rows plus pruned_1_5
    python -m benchmarks.loss_sources gather             benchmarks/results/loss_sources.json, and a table

`train` runs the stages' own training loop in this process, on one thread; call it twice with other rows or seeds to use two cores. A run that was
killed goes on, a finished one is passed over. Without `--rows`, all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import routing_bounds
from moe_core import convert, experts, fit, noise, sampling
from moe_core.config import KDStageConfig, MoEConfig, Params, parse
from moe_core.metrics import paired
from tasks import importance_files, training
from tasks.phase import METRICS, PRODUCT, Phase
from tasks.places import IMPORTANCE, SHARDS, SHARED_EXPERT, TEACHER
from tasks.project import read_params

RESULTS = Path("benchmarks/results/loss_sources.json")
WORK = Path(".resume/loss_sources")
CPU = torch.device("cpu")
PAPER = {
    "split": "taylor", "deal": "round_robin", "router_init": "normal", "refit": False, "gate_norm": "renormalize",
    "shared_ratio": 1.0, "normal_ratio": 0.25, "num_experts": 12, "top_k": 2,
}  # fmt: skip
LADDER: dict[str, dict[str, Any]] = {
    "joint_gates": {"gate_norm": "scale_to_k"},
    "joint_gates_deal": {"deal": "coactivation"},
    "joint_gates_deal_router": {"router_init": "norms"},
    "joint_gates_deal_router_refit": {"refit": True},
    "plus": {"split": "greedy"},
}
PLUS = PAPER | {key: value for step in LADDER.values() for key, value in step.items()}


SHAPES = ((1.0, 12, 0.25, 2), (1.0, 24, 0.125, 4), (1.25, 11, 0.25, 1), (1.25, 22, 0.125, 2), (0.75, 13, 0.25, 3), (0.75, 26, 0.125, 6),
          (0.5, 14, 0.25, 4), (0.5, 28, 0.125, 8), (0.25, 30, 0.125, 10))  # fmt: skip
"""r_s, n, r_n, k."""


@dataclass(frozen=True)
class Row:
    """One training: a MoE model, or FFNs cut to `cut`."""

    moe: dict[str, Any]
    kd: dict[str, Any]
    """changes of kd.moe; of its optimizer under `optimizer`"""
    staged: bool = False
    """shared experts first, for half of the steps"""
    cut: float | None = None
    fitted: bool = False


def _rows() -> dict[str, Row]:
    joint = {"train": ["all"], "lambda_balance": 0.0}
    rows = {
        "staged": Row(PAPER, {"train": ["experts", "router"], "lambda_balance": 0.01}, staged=True),
        "joint": Row(PAPER, joint),
    }
    # One step after the other, from the paper's conversion to `plus`.
    moe = PAPER
    for name, step in LADDER.items():
        moe = moe | step
        rows[name] = Row(moe, joint)
    rows |= {
        "plus_unit_gates": Row(PLUS | {"gate_norm": "unit"}, joint),
        "plus_round_robin": Row(PLUS | {"deal": "round_robin"}, joint),
        "plus_importance": Row(PLUS | {"deal": "importance"}, joint),
        "plus_drawn_router": Row(PLUS | {"router_init": "normal"}, joint),
        "plus_no_refit": Row(PLUS | {"refit": False}, joint),
        "plus_taylor": Row(PLUS | {"split": "taylor"}, joint),
        "plus_14e4a": Row(PLUS | {"shared_ratio": 0.5, "num_experts": 14, "top_k": 4}, joint),
        "plus_balance": Row(PLUS, joint | {"lambda_balance": 0.01}),
        "plus_no_features": Row(PLUS, joint | {"lambda_feature": 0.0}),
        "plus_ffns_only": Row(PLUS, joint | {"train": ["shared", "conditioning", "experts", "router"]}),
        "plus_router_fixed": Row(PLUS, joint | {"train": ["shared", "conditioning", "experts", "rest"]}),
        "plus_half_rate": Row(PLUS, joint | {"optimizer": {"learning_rate": 5e-3}}),
        "plus_double_rate": Row(PLUS, joint | {"optimizer": {"learning_rate": 2e-2}}),
        "pruned_1_5": Row({}, joint, cut=1.5),
        "pruned_1_5_half_rate": Row({}, joint | {"optimizer": {"learning_rate": 5e-3}}, cut=1.5),
        "pruned_1_5_double_rate": Row({}, joint | {"optimizer": {"learning_rate": 2e-2}}, cut=1.5),
        "pruned_1_5_fitted": Row({}, joint, cut=1.5, fitted=True),
        "pruned_2": Row({}, joint, cut=2.0),
    }
    return rows


ROWS = _rows()


# -- before training


def layers(root: Path) -> dict[str, dict[str, float]]:
    """Choice -> squared error of the FFNs' outputs over their squared norm, on tokens that no fit has seen: mean and largest of all FFNs."""
    params, found = read_params(root), importance_files.load(root / IMPORTANCE)
    teacher = sampling.load_transformer(root / TEACHER / "transformer")
    weights, seed = teacher.state_dict(), noise.derive_seed(params.seed, "conversion")
    errors: dict[str, list[float]] = {}
    for name in convert.ffn_names(teacher, params.moe.dense_double_blocks):
        names = experts.dense_ffn(name, teacher.inner_dim)
        ffn = weights[names.w1], weights[names.b1], weights[names.w2][:, names.first :]
        tokens_ND = found.tokens[name]
        # Halves of the samples, which stand one after the other: the fit has seen no token of the other half's pictures.
        seen_ND, other_ND = tokens_ND.double().chunk(2)
        for choice, error in _choices(name, ffn, seen_ND, other_ND, found.scores, params.moe, seed):
            errors.setdefault(choice, []).append(error)
    return {choice: {"mean": statistics.mean(values), "max": max(values)} for choice, values in errors.items()}


def _choices(
    name: str,
    ffn: tuple[Tensor, Tensor, Tensor],
    seen_ND: Tensor,
    other_ND: Tensor,
    scores: Any,
    moe: MoEConfig,
    seed: int,
) -> Iterator[tuple[str, float]]:
    w1_FD, b1_F, w2_DF = (value.double() for value in ffn)
    width, hidden = w2_DF.shape
    h_NF = F.gelu(F.linear(other_ND, w1_FD, b1_F), approximate="tanh")
    target_ND = F.linear(h_NF, w2_DF)

    def error(output_ND: Tensor) -> float:
        return ((output_ND - target_ND).square().sum() / target_ND.square().sum()).item()

    def fitted(alone: bool = False, **changes: Any) -> tuple[fit.LayerFit, MoEConfig]:
        chosen = moe.model_copy(update={**PAPER, **changes})
        order_F = experts.ranks(name, hidden, width, scores, chosen, seed)
        drawn_ED = experts.drawn_router(name, torch.Size((chosen.num_experts, width)), chosen, seed)
        made = experts.generator(seed, "deal", name)
        return fit.fit_layer(seen_ND, ffn, order_F, drawn_ED, chosen, made, alone), chosen

    for ratio in (1.0, 1.5, 2.0):
        for how, changes in (("", {}), (", fitted", {"split": "greedy", "refit": True})):
            found, _ = fitted(True, **{"shared_ratio": ratio, "num_experts": 1, "top_k": 1, **changes})
            yield f"cut to r = {ratio:g}{how}", error(F.linear(h_NF[:, found.split.shared], found.shared_DS))
    for deal in ("round_robin", "importance", "coactivation"):
        found, chosen = fitted(deal=deal, router_init="norms", gate_norm="unit")
        for routing, output_ND in routing_bounds.layer_outputs(found, h_NF, other_ND, target_ND, chosen, seed):
            yield f"{deal}: {routing}", error(output_ND)
        halved = routing_bounds.gated(found, h_NF, routing_bounds.learned(found, other_ND, chosen.top_k) / chosen.top_k)
        yield f"{deal}: fitted router, gates that sum to 1", error(halved)
        for split in ("taylor", "greedy"):
            found, chosen = fitted(deal=deal, router_init="norms", gate_norm="unit", refit=True, split=split)
            output_ND = routing_bounds.gated(found, h_NF, routing_bounds.learned(found, other_ND, chosen.top_k))
            yield f"{deal}: fitted router, W2 refitted, split {split}", error(output_ND)
    # The last layer again, its W2 fitted in two steps: the shared expert's first, then the others' to what is left.
    seen_h_NF = F.gelu(F.linear(seen_ND, w1_FD, b1_F), approximate="tanh")
    first_DS = fit.regress(seen_h_NF[:, found.split.shared], F.linear(seen_h_NF, w2_DF), chosen.ridge)
    left_ND = F.linear(seen_h_NF, w2_DF) - F.linear(seen_h_NF[:, found.split.shared], first_DS)
    routed_NF = _routed(found, seen_h_NF, seen_ND, chosen.top_k)
    rest_DF = fit.regress(routed_NF, left_ND, chosen.ridge)
    shared_ND = F.linear(h_NF[:, found.split.shared], first_DS)
    yield (
        "the last, shared and normal experts refitted one after the other",
        error(shared_ND + F.linear(_routed(found, h_NF, other_ND, chosen.top_k), rest_DF)),
    )


def shapes(root: Path) -> dict[str, float]:
    """Shape of `plus` (`1S24E4A`) -> the same error of its fit, mean of all FFNs; all have r_a = 1.5."""
    params, found = read_params(root), importance_files.load(root / IMPORTANCE)
    teacher = sampling.load_transformer(root / TEACHER / "transformer")
    weights, seed = teacher.state_dict(), noise.derive_seed(params.seed, "conversion")
    errors: dict[str, float] = {}
    for shared, number, normal, top_k in SHAPES:
        shape = {"shared_ratio": shared, "num_experts": number, "normal_ratio": normal, "top_k": top_k}
        for norm in ("scale_to_k", "unit"):
            moe = params.moe.model_copy(update={**PLUS, **shape, "gate_norm": norm})
            each = []
            for name in convert.ffn_names(teacher, moe.dense_double_blocks):
                names = experts.dense_ffn(name, teacher.inner_dim)
                w1_FD, b1_F, w2_DF = (
                    value.double()
                    for value in (weights[names.w1], weights[names.b1], weights[names.w2][:, names.first :])
                )
                seen_ND, other_ND = found.tokens[name].double().chunk(2)
                order_F = experts.ranks(name, len(w1_FD), len(w2_DF), found.scores, moe, seed)
                drawn_ED = experts.drawn_router(name, torch.Size((number, len(w2_DF))), moe, seed)
                made = experts.generator(seed, "deal", name)
                layer = fit.fit_layer(seen_ND, (w1_FD, b1_F, w2_DF), order_F, drawn_ED, moe, made, False)
                h_NF = F.gelu(F.linear(other_ND, w1_FD, b1_F), approximate="tanh")
                wanted_ND = F.linear(h_NF, w2_DF)
                given_ND = routing_bounds.gated(layer, h_NF, routing_bounds.gates(layer, other_ND, moe))
                each.append(((given_ND - wanted_ND).square().sum() / wanted_ND.square().sum()).item())
            errors[f"{shared:g}S{number}E{top_k}A, gates {norm}"] = statistics.mean(each)
    return errors


def _routed(found: fit.LayerFit, h_NF: Tensor, tokens_ND: Tensor, top_k: int) -> Tensor:
    """The normal experts' hidden units, 0 where an expert does not run."""
    gates_NE = routing_bounds.learned(found, tokens_ND, top_k)
    return torch.cat([gates_NE[:, e, None] * h_NF[:, units] for e, units in enumerate(found.split.experts_EF)], dim=1)


# -- training


def train(root: Path, name: str, steps: int, seed: int) -> dict[str, Any]:
    """The KD loss of a row along its training, and with other routings after it."""
    row, params = ROWS[name], read_params(root)
    place = root / WORK / _identity(root, params) / f"{name}-{steps}-{seed}"
    done = place / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    (place / "data" / "checkpoints").mkdir(parents=True, exist_ok=True)
    for folder in (TEACHER, SHARDS, IMPORTANCE):
        if not (place / folder).exists():
            (place / folder).symlink_to((root / folder).resolve())
    whole = _changed(params, row, steps, seed)
    if row.staged:
        half = {
            "shared_expert": _stage(params.kd.shared_expert, steps // 2, {}),
            "moe": _stage(params.kd.moe, steps - steps // 2, row.kd),
        }
        whole = whole.model_copy(update={"kd": whole.kd.model_copy(update=half)})
        if not (place / SHARED_EXPERT).exists():
            _run(place, whole, "shared", "tasks.shared_expert_kd:build", whole.kd.shared_expert)
            (place / "shared" / PRODUCT).rename(place / SHARED_EXPERT)
    if row.cut is None:
        _run(place, whole, "train", "tasks.moe_kd:build", whole.kd.moe)
    else:
        _run(place, whole, "train", "tasks.baseline:build", whole.baselines["cut"].kd, name="cut")
    records = [json.loads(line) for line in (place / "train" / METRICS).read_text().splitlines()]
    result = {
        "row": name, "steps": steps, "seed": seed,
        # Of a staged run, what follows its shared experts.
        "losses": {
            str(record["step"] + steps // 2 * row.staged): record["distill"]
            for record in records
            if record["split"] == "validation"
        },
        "seconds_a_step": statistics.median(record["seconds"] for record in records if record["split"] == "train"),
    }  # fmt: skip
    if row.cut is None:
        result["routing"] = routing_bounds.model_losses(place, whole, place / "train" / PRODUCT)
    done.write_text(json.dumps(result))
    return result


def _identity(root: Path, params: Params) -> str:
    """Of the teacher and the parameters: after another experiment nothing of this one is taken for its own."""
    digest = hashlib.sha256(params.model_dump_json().encode())
    for file in sorted((root / TEACHER / "transformer").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _changed(params: Params, row: Row, steps: int, seed: int) -> Params:
    values = params.model_dump(mode="json") | {"seed": seed}
    values["moe"] |= row.moe
    values["kd"]["joint"] = not row.staged
    values["kd"]["moe"] = _stage(params.kd.moe, steps, row.kd).model_dump(mode="json")
    values["baselines"], values["models"] = (
        {},
        {name: model for name, model in values["models"].items() if name not in params.baselines},
    )
    if row.cut is not None:
        cut = {"method": "diff_pruning", "ratio": row.cut, "compress_conditioning": True, "fitted": row.fitted}
        values["baselines"] = {"cut": cut | {"init": "teacher", "kd": values["kd"]["moe"]}}
        values["models"]["cut"] = {"checkpoint": "data/checkpoints/baselines/cut", "reference": "data/images/teacher"}
    return parse(Params, values)


def _stage(base: KDStageConfig, steps: int, changes: dict[str, Any]) -> KDStageConfig:
    """The stage with so many steps; its warm-up a tenth of them at most."""
    optim = base.optimizer.model_dump() | {
        "steps": steps,
        "warmup_steps": min(base.optimizer.warmup_steps, steps // 10),
    }
    # One rate for all parts, whatever the preset has.
    values = base.model_dump() | {"rates": {}} | {key: value for key, value in changes.items() if key != "optimizer"}
    values |= {"optimizer": optim | changes.get("optimizer", {}), "validate_every": max(1, steps // 10)}
    return KDStageConfig.model_validate(values)


def _run(place: Path, params: Params, phase: str, build: str, stage: KDStageConfig, **arguments: Any) -> None:
    given = {
        "root": str(place),
        "params": params.model_dump(mode="json"),
        "made": str(place / f"{phase}-student"),
        **arguments,
    }
    training.run(
        [Phase(phase, build, given, stage.optimizer, stage.validate_every, 50, 100)], place, CPU, 1, params.seed
    )


# -- results


def gather(root: Path) -> None:
    """Joins what is finished into the results, and prints it."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    identity = _identity(root, read_params(root))
    # Runs of another teacher or other parameters are no company for these.
    earlier = results.get("runs", []) if results.get("identity") == identity else []
    results["identity"] = identity
    runs = {(run["row"], run["steps"], run["seed"]): run for run in earlier}
    for path in sorted((root / WORK / identity).glob("*/result.json")):
        run = json.loads(path.read_text())
        runs[run["row"], run["steps"], run["seed"]] = run
    results["runs"] = [runs[key] for key in sorted(runs)]
    _write(results)
    for steps in sorted({steps for _, steps, _ in runs}):
        print(f"\n{steps} steps\n")
        print(
            "| row | seeds | before | a tenth | half | end | random routing | largest experts |\n|---|--:|--:|--:|--:|--:|--:|--:|"
        )
        for row in (name for name in ROWS if any(key[:2] == (name, steps) for key in runs)):
            own = [run for key, run in runs.items() if key[:2] == (row, steps)]
            at = ("0", str(max(1, steps // 10)), str(steps // 2), str(steps))
            points = [[run["losses"][step] for run in own if step in run["losses"]] for step in at]
            bounds = [[run["routing"][kind] for run in own if "routing" in run] for kind in ("random", "largest")]
            cells = [f"{statistics.mean(values):.4f}" if values else "" for values in (*points, *bounds)]
            print(f"| {row} | {len(own)} | {' | '.join(cells)} |")
        _ratios(runs, steps)


def _ratios(runs: dict[tuple[str, int, int], dict[str, Any]], steps: int) -> None:
    """Prints the loss of `plus` over that of `pruned_1_5`, paired by seed, with its 95 % interval."""
    both = [seed for row, own, seed in runs if (row, own) == ("plus", steps) and ("pruned_1_5", steps, seed) in runs]
    if len(both) < 2:
        return
    print("\nplus over pruned_1_5, paired by seed:")
    for step in runs["plus", steps, both[0]]["losses"]:
        ratios = [
            runs["plus", steps, seed]["losses"][step] / runs["pruned_1_5", steps, seed]["losses"][step] for seed in both
        ]
        found = paired.interval(ratios)
        print(f"step {step}: {found.mean:.3f} +- {found.half:.3f} ({len(both)} seeds)")


def _write(results: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["layers", "shapes", "train", "gather"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    chosen, root = parser.parse_args(), Path.cwd()
    torch.set_num_threads(1)
    if chosen.command == "layers":
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results["layers"] = layers(root)
        _write(results)
        for choice, values in results["layers"].items():
            print(f"| {choice} | {values['mean']:.4f} | {values['max']:.4f} |")
    elif chosen.command == "shapes":
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results["shapes"] = {"identity": _identity(root, read_params(root)), "errors": shapes(root)}
        _write(results)
        for name, error in results["shapes"]["errors"].items():
            print(f"| {name} | {error:.4f} |")
    elif chosen.command == "train":
        for seed in chosen.seeds:
            for row in chosen.rows:
                found = train(root, row, chosen.steps, seed)
                print(row, seed, {step: round(loss, 5) for step, loss in found["losses"].items()}, flush=True)
    else:
        gather(root)


if __name__ == "__main__":
    main()
