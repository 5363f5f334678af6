"""Bad parameters: one line each, with the key, the value and the rule; and what every preset must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_core.config import Params, parse
from moe_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def _values(changes: dict[str, Any]) -> dict[str, Any]:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section[name]
        section[last] = value
    return values


KD = {
    "optimizer": {"steps": 10, "batch_size": 8, "learning_rate": 1e-3},
    "train": ["all"],
    "validate_every": 5,
}


def suite(prompts: str, path: str | None) -> dict[str, Any]:
    return {"prompts": prompts, "path": path, "scorers": ["clip_score"]}


def cut(ratio: float | None) -> dict[str, Any]:
    return {"method": "diff_pruning", "ratio": ratio, "kd": KD}


def shallow(**values: Any) -> dict[str, Any]:
    return {"method": "lite", "kd": {**KD, "train": ["gap_blocks"]}, **values}


def baseline(values: dict[str, Any], name: str = "cut") -> dict[str, Any]:
    model = {"checkpoint": f"data/checkpoints/baselines/{name}", "reference": "data/images/teacher"}
    return {f"baselines.{name}": values, f"models.{name}": model}


def doubles(**groups: int) -> dict[str, Any]:
    """The same groups of double blocks at every level."""
    return {f"mob.levels.{level}.double": groups for level in ("M", "S", "XS")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe.num_experts": 11}, r"1 \+ 11 \* 0.25 = 3.75; they must be equal"),
        ({"moe.top_k": 13}, "moe: top_k is 13, but there are 12 experts"),
        ({"moe.topk": 1}, "unknown parameter moe.topk = 1"),
        ({"moe.shared_ratio": -1}, "moe.shared_ratio = -1"),
        ({"moe.dense_double_blocks": [5]}, "moe.dense_double_blocks has 5, but the model's double blocks are 0 to 4"),
        ({"moe.conditioning_dim": 49}, "moe.conditioning_dim is 49; it must be at most the model's width, 48"),
        (
            {"mob.levels.M.double": {"blocks": [[1, 3, 4]]}},
            r"mob.levels.M.double: group \[1, 3, 4\] must be two or more consecutive block indices",
        ),
        ({"mob.levels.M.double": {"blocks": [[1, 2], [2, 3]]}}, r"blocks \[2\] stand in two groups"),
        ({"mob.levels.M.double": {"blocks": [[4, 5]]}}, r"has \[4, 5\], but the model's double blocks are 0 to 4"),
        (
            {"mob.levels.XS.single": {"groups": 5, "size": 3}},
            "5 groups of 3 consecutive blocks do not fit: there is room for 4 among 12",
        ),
        (
            doubles(groups=1, size=5),
            "mob.levels.M.double: 1 groups of 5 consecutive blocks do not fit: there is room for 0",
        ),
        (
            {"mob.levels.M.double": {"blocks": [[0, 1, 2]]}},
            r"mob.levels.M.double.blocks has \[0, 1, 2\], but moe.dense_double_blocks keeps \[0\] dense",
        ),
        ({"mob.levels.S.init": "checkpoints/mob/Q"}, "mob.levels.S.init is 'checkpoints/mob/Q'; it must be one of"),
        ({"mob.active": 4}, "mob.active is 4, but mob.levels.M.double has groups of 3 blocks"),
        ({"data.embedded": None}, "kind is 'embedded'; then embedded must be given"),
        ({"data.kind": "webdataset"}, "kind is 'webdataset'; then path must be given"),
        ({"data.kind": "webdataset", "data.path": "/x"}, "kind is 'webdataset'; then embedded must be null"),
        (
            {"data.kind": "webdataset", "data.path": "/x", "data.embedded": None},
            "eval.classifier is set, but data.kind is webdataset; .*: eval.classifier=null",
        ),
        ({"model.source": "folder"}, "source is 'folder'; then path must be given"),
        ({"model.lora": {"path": "x", "scale": 1.0}}, "lora is 'x', but source is 'train'; .* lora must be null"),
        ({"model.lora": {"path": "x", "scale": float("nan")}}, "model.lora.scale = nan"),
        (
            {"model.lora": {"path": "x", "weight_name": "x.bin", "scale": 1.0}},
            "weight_name is 'x.bin'; it must be a .safetensors file",
        ),
        (
            {"model.lora": {"path": "x", "weight_name": "../x.safetensors", "scale": 1.0}},
            "weight_name is '../x.safetensors'; it must be a .safetensors file within path",
        ),
        ({"model.guidance_scale": None}, "guidance_scale is null, but transformer.guidance_embeds is true"),
        (
            {"model.transformer.guidance_embeds": False},
            "guidance_scale is 3.5, but transformer.guidance_embeds is false: the model takes none; it must be null",
        ),
        ({"kd.moe.train": ["router", "gates"]}, r"kd.moe.train.1 = 'gates': Input should be 'shared'"),
        (
            {"kd.shared_expert.train": ["router"]},
            "kd: shared_expert.train has router; the model of that stage has none",
        ),
        (
            {"kd.moe.train": ["group_blocks"], "kd.moe.rates": {}},
            "kd: moe.train has group_blocks; the model of that stage has none",
        ),
        (
            {"kd.moe.train": ["router"], "kd.moe.rates": {"shared": 2.0}},
            "kd.moe: rates has shared, which does not train; train is router",
        ),
        ({"kd.moe.rates": {"all": 2.0}}, "kd.moe: rates has all; the rate of all parts is optimizer.learning_rate"),
        (
            {"kd.moe.train": ["all"], "kd.moe.rates": {"gap_blocks": 2.0}},
            "kd: moe.rates has gap_blocks; the model of that stage has none",
        ),
        (
            {"kd.validation_samples": 99999},
            "kd.validation_samples is 99999, but data.shard.validation_samples keeps only",
        ),
        ({"data.embedded.samples": 9}, "embedded.samples is 9; .* leave none to train on"),
        (
            {"mob.levels.M.double": {"groups": 1, "size": 2, "blocks": [[1, 2]]}},
            "groups is 1 and blocks are written out",
        ),
        ({"model.vae.norm_num_groups": 7}, "it must be a multiple of norm_num_groups, which is 7"),
        ({"model.text.num_heads": 5}, "it must be a multiple of num_heads, which is 5"),
        ({"moe.expansion_ratio": 3, "moe.num_experts": 8}, "moe.expansion_ratio is 3; the FFNs of FLUX have 4"),
        (
            {"mob.levels.S.double": {"groups": 0}},
            "mob.levels.S.double.groups is 0, but level M, .* has 1, and they stay",
        ),
        (
            {"mob.levels.XS.double": {"groups": 1, "size": 2}},
            "XS.double.size is 2, but the groups of level M, .* have 3",
        ),
        (
            {"mob.levels.XXS": {"init": "checkpoints/mob/M"}},
            "models.XXS is missing; with mob.levels M, S, XS, XXS models",
        ),
        ({"mob.levels.L": {"init": "checkpoints/moe"}}, "mob.levels has L; that is the name of another model"),
        (
            {"models.S": {"checkpoint": "data/checkpoints/moe", "reference": "data/images/teacher"}},
            "models.S is data/checkpoints/moe; .*, and S's checkpoint data/checkpoints/mob/S",
        ),
        (
            {"models.lite": {"checkpoint": "data/lite", "reference": "data/images/teacher"}},
            "models.lite is data/lite; .* models must be teacher, shared, L, M, S, XS and baselines, and lite's checkpoint"
            " data/baselines/lite",
        ),
        (
            {"models.lite": {"checkpoint": "data/baselines/lite", "reference": "data/images/L"}},
            "models.lite.reference is data/images/L; a baseline's must be data/images/teacher",
        ),
        (
            {"models.flux-lite": {"checkpoint": "data/baselines/flux-lite", "reference": "data/images/teacher"}},
            "models has 'flux-lite'; a baseline's name must be of letters",
        ),
        ({"baselines.L": cut(1.5)}, "baselines has L; that is the name of another model"),
        ({"baselines.cut": cut(1.5)}, "models.cut is missing; .* models must be teacher, .*, cut and baselines"),
        (
            {
                "baselines.cut": cut(1.5),
                "models.cut": {"checkpoint": "data/baselines/cut", "reference": "data/images/teacher"},
            },
            "models.cut is data/baselines/cut; .* cut's checkpoint data/checkpoints/baselines/cut",
        ),
        (baseline(cut(4.0)), r"baselines.cut.ratio is 4; it must be below 4, and times the width \d+ a whole number"),
        (baseline(cut(1.51)), r"baselines.cut.ratio is 1.51; it must be .* not \d+\.\d+"),
        (baseline(cut(None)), "baselines.cut: method is diff_pruning, but ratio is missing"),
        (
            baseline({**cut(1.5), "double_blocks": 3}),
            "method is diff_pruning, but double_blocks is 3; it drops no blocks",
        ),
        (baseline({**cut(1.5), "method": "lite"}), "method is lite, which cuts nothing in a block: ratio"),
        (
            baseline({**shallow(double_blocks=3), "fitted": True}),
            "method is lite, which cuts nothing in a block: ratio",
        ),
        ({"kd.joint": False}, r"moe.refit is true, but kd.joint false; .* \(moe=1s12e2a is a recipe in two steps\)"),
        ({"kd.joint": False, "moe.refit": False}, "moe.split is greedy, but kd.joint false"),
        (baseline(shallow()), "method is lite, but neither double_blocks nor single_blocks is given"),
        (baseline(shallow(single_blocks=13)), "baselines.cut.single_blocks is 13; the model it starts from has 12"),
        (
            baseline(shallow(single_blocks=9, init="checkpoints/baselines/cut")),
            "baselines.cut.init is 'checkpoints/baselines/cut'; it must be one of those before it: teacher",
        ),
        (
            {**baseline(cut(1.5)), **baseline(shallow(single_blocks=9, init="checkpoints/baselines/cut"), "less")},
            "baselines.less.init is 'checkpoints/baselines/cut', whose FFNs are cut",
        ),
        (
            baseline({**cut(1.5), "kd": {**KD, "train": ["gap_blocks"]}}),
            "kd.train has gap_blocks; a model made by diff_pruning",
        ),
        (
            {"moe.dense_double_blocks": [1], **doubles(groups=2, size=2)},
            "mob.levels.M.double: 2 groups of 2 consecutive blocks do not fit: there is room for 1 among 5 blocks",
        ),
        ({"model.resolution": 20}, "model.resolution is 20; with data.embedded.grid 1 it must be a multiple of 8"),
        ({"model.max_sequence_length": 9}, "max_sequence_length is 9; it must be at most text.max_sequence_length"),
        (
            {"compute.stages": {"mob_kd": {"num_workers": 3}}},
            "kd.mob.optimizer.batch_size is 64; .* the 3 workers of mob_kd",
        ),
        ({"eval.prompts": 1}, "eval.prompts = 1"),
        ({"eval.sanity": 201}, "eval: sanity is 201, but prompts is 200; it takes the pictures of so many of them"),
        (
            {"eval.suites.own.images_per_prompt": 2},
            "suites.own is the first: its prompts must be 'own', one picture each",
        ),
        ({"eval.suites": {"dpg": suite("dpg", "d")}}, "suites.dpg is the first: its prompts must be 'own'"),
        ({"eval.suites.too": suite("own", None)}, "suites.too has own prompts, as own has; one suite has them"),
        ({"eval.suites.a-b": suite("dpg", "d")}, "suites has 'a-b'; a name must be of letters, digits and _ alone"),
        (
            {"eval.suites.dpg": suite("dpg", None)},
            "path is None with prompts 'dpg'; prompts of a benchmark lie at a path",
        ),
        ({"eval.suites.own.path": "d"}, "path is d with prompts 'own'"),
        ({"eval.suites.own.scorers": ["scenes", "scenes"]}, "scorers is .*; each may come once"),
        ({"model.resolution": 18}, "resolution is 18; it must be a multiple of 4"),
        (
            {"kd.moe.optimizer.micro_batch": 7},
            "kd.moe.optimizer: micro_batch is 7; it must divide batch_size, which is 64",
        ),
        (
            {"kd.moe.optimizer.micro_batch": 8, "compute.num_workers": 16},
            "kd.moe.optimizer.micro_batch is 8; it must be a multiple of the 16 workers of moe_kd",
        ),
        ({"compute.text_encoders": "sharded"}, "text_encoders is sharded, but sharding is none; it must be full"),
        (
            {"compute.sharding": "full", "compute.num_workers": 0},
            "compute.sharding is full, but shared_expert_kd has num_workers 0",
        ),
        ({"kd.moe.optimizer.ema_decay": 1.0}, "kd.moe.optimizer.ema_decay = 1.0"),
        ({"eval.latency_batch_sizes": [0]}, "eval.latency_batch_sizes.0 = 0"),
        ({"compute.stages": {"techer": {}}}, r"compute.stages.techer.\[key\] = 'techer': Input should be 'teacher'"),
        ({"seed": "seven"}, "seed = 'seven'"),
    ],
)
def test_bad_parameters_are_named_with_value_and_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"params\.yaml: .*{message}"):
        parse(Params, _values(changes))


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Params, _values({"moe.topk": 1, "eval.prompts": 0, "seed": -1}))
    assert len(str(caught.value).splitlines()) == 3


def test_the_committed_parameters_are_good() -> None:
    parse(Params, _values({}))


def test_a_stage_can_have_other_workers_than_the_rest() -> None:
    own = {"mob_kd": {"num_workers": 4, "use_gpu": True}}
    compute = parse(Params, _values({"compute.stages": own, "compute.cpus_per_worker": 3})).compute
    assert (compute.of("mob_kd@XS").num_workers, compute.of("mob_kd@XS").use_gpu) == (4, True)
    assert compute.of("mob_kd@XS").cpus_per_worker == 3
    assert compute.of("moe_kd") == compute
