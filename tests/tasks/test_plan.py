"""The plan: its memory against tensors counted while the real stages run, its FLOPs against the accounting, what it says and refuses."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml

from moe_core import accounting, pipelines, sampling, small_flux
from moe_core.config import OptimizerConfig, Params, StudyConfig, parse
from moe_core.data.shard_files import LatentRow, write_manifest, write_shard
from moe_core.data.sources.samples import RejectCount
from moe_core.errors import ConfigError
from moe_core.memory import LiveMemory, parameters_and_buffers
from tasks import command, importance, latency, plan, plan_suites, source, training
from tasks.generate import source_of
from tasks.inspection import Inspector
from tasks.params import compose
from tasks.phase import Phase
from tasks.plan_costs import Costs, StageCost
from tasks.plan_studies import studies
from tasks.plan_teacher import describe
from tasks.shard_workers import Encoder
from tests.tasks import sharded_kd

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SAMPLES = 16
WITHIN = 0.15
"""How far a planned peak may be from a measured one."""


def params(*overrides: str) -> Params:
    return parse(Params, yaml.safe_load(compose(ROOT, list(overrides))))


@pytest.fixture(scope="module")
def small() -> Params:
    """The demo with few samples and steps, both double blocks' groups and compression included."""
    batches = [
        f"kd.{stage}.optimizer.{key}"
        for stage in ("shared_expert", "moe", "mob")
        for key in ("batch_size=16", "steps=2")
    ]
    batches += [f"kd.{stage}.optimizer.warmup_steps=0" for stage in ("shared_expert", "moe", "mob")]
    checkpointing = ["kd.moe.gradient_checkpointing=true", "kd.moe.optimizer.optimizer=adamw"]
    data = [f"data.shard.{split}_samples={SAMPLES}" for split in ("validation", "calibration")]
    sizes = [f"kd.validation_samples={SAMPLES}", f"kd.importance_batch_size={SAMPLES}", f"eval.batch_size={SAMPLES}"]
    return params(*batches, *checkpointing, *data, *sizes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, small: Params) -> Path:
    """A checkout with a teacher and shards."""
    return checkout(tmp_path_factory.mktemp("checkout"), small)


def checkout(folder: Path, small: Params) -> Path:
    small_flux.build_pipeline(small.model, ["red seven"], 0).save_pretrained(folder / "data" / "teacher")
    shards = folder / "data" / "shards"
    shards.mkdir()
    rows = [LatentRow(f"k{i}", torch.randn(4, 8, 8), "red seven", {}) for i in range(SAMPLES)]
    written = {split: [write_shard(shards, split, 0, (16, 16), rows)] for split in ("train", "val", "calibration")}
    write_manifest(shards, written, RejectCount(), {})
    return folder


def checkout_with_importance(folder: Path, small: Params) -> Path:
    """The same, and what stage importance makes of it."""
    checkout(folder, small)
    (folder / "units").mkdir()
    importance.work(CPU, 1, folder, small.model_dump(mode="json"), folder / "units")
    (folder / "data" / "importance").mkdir()
    importance.merge(folder / "units", folder / "data" / "importance")
    return folder


@pytest.fixture(scope="module")
def planned(small: Params) -> dict[str, StageCost]:
    costs, kd = Costs(small, describe(small.model)), small.kd
    stages = [
        costs.importance(),
        costs.distillation("shared_expert_kd", kd.shared_expert, costs.configs["shared"]),
        costs.distillation("moe_kd", kd.moe, costs.configs["L"]),
        costs.distillation("mob_kd@M", kd.mob, costs.configs["M"]),
        costs.generation("teacher"),
        costs.generation("L"),
        Costs(two_models(small), describe(small.model)).latency(),
    ]
    return {stage.stage: stage for stage in stages}


def peak(run: Callable[[], Any]) -> int:
    """The most bytes of tensors alive at once while `run` ran, what it loaded included.

    What loading itself takes for a moment does not count: it lies in the host's memory, whatever the device.
    """
    memory = LiveMemory()

    def uncounted(load: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        before = memory.peak
        loaded = load(*arguments, **more)
        gc.collect()  # what conversion wrote, the files' writer may still hold
        memory.peak = before
        return loaded

    with pytest.MonkeyPatch.context() as patch, memory:
        for name in ("load_pipeline", "load_transformer"):
            patch.setattr(sampling, name, partial(uncounted, getattr(sampling, name)))
        run()
    return memory.peak.total


@pytest.fixture(scope="module")
def measured(root: Path, small: Params) -> dict[str, int]:
    """Stage -> peak of the real stage's work, in this process."""
    values, place = small.model_dump(mode="json"), str(root)
    units = root / "units"
    units.mkdir()
    found = {"importance": peak(lambda: importance.work(CPU, 1, root, values, units))}
    (root / "data" / "importance").mkdir()
    importance.merge(units, root / "data" / "importance")

    def stage(module: str, checkpoint: str, config: Any, **more: Any) -> int:
        arguments = {"root": place, "params": values, "made": str(root / "made" / checkpoint), **more}
        phase = Phase("train", f"tasks.{module}:build", arguments, config.optimizer, 100, 100, 100)
        folder = root / "resume" / checkpoint
        (root / "made" / checkpoint).parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True)
        most = peak(lambda: training.run([phase], folder, CPU, 1, 0))
        target = root / "data" / "checkpoints" / checkpoint
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / "product").rename(target)
        return most

    found["shared_expert_kd"] = stage("shared_expert_kd", "shared_expert", small.kd.shared_expert)
    found["moe_kd"] = stage("moe_kd", "moe", small.kd.moe)
    found["mob_kd@M"] = stage("mob_kd", "mob/M", small.kd.mob, level="M")
    for name in ("teacher", "L"):
        folder = root / small.models[name].checkpoint
        found[f"generate@{name}"] = peak(partial(_evaluate, root, small, folder, name == "teacher"))
    (root / "data" / "prompts.jsonl").write_text(json.dumps({"prompt": "red seven"}))
    found["latency"] = peak(partial(latency.latency, quiet_stage(root, two_models(small))))
    return found


def two_models(small: Params) -> Params:
    """Timed, 8 pictures at once, one round; of the models only those that `measured` makes and judges."""
    timing = small.eval.model_copy(update={"latency_batch_sizes": [8], "latency_rounds": 1})
    return small.model_copy(update={"models": {name: small.models[name] for name in ("teacher", "L")}, "eval": timing})


def quiet_stage(root: Path, values: Params) -> Any:
    """A stage that tells nobody of what it does."""
    nothing = SimpleNamespace(update=lambda *given: None, tag=lambda *given: None, metrics=lambda *given: None)
    return SimpleNamespace(params=values, root=root, progress=nothing, run=nothing, summary=lambda *given, **more: None)


def _evaluate(root: Path, small: Params, folder: Path, dense: bool) -> None:
    # One process each in the stage, one after the other.
    source = source_of(root, small, None if dense else folder)
    pipelines.paint(pipelines.load(source, CPU), ["red seven"] * SAMPLES, range(SAMPLES), source.arguments or {})
    gc.collect()
    Inspector(root, small, folder, dense).validation()


@pytest.mark.slow
def test_planned_memory_is_near_what_the_stages_really_take(
    planned: dict[str, StageCost], measured: dict[str, int]
) -> None:
    ratios = {stage: planned[stage].peak / bytes_ for stage, bytes_ in measured.items()}
    assert {stage: ratio for stage, ratio in ratios.items() if abs(ratio - 1) > WITHIN} == {}, ratios


@pytest.mark.slow
def test_planned_memory_of_training_a_teacher_and_of_encoding_is_near_what_they_really_take(
    tmp_path: Path,
) -> None:
    sizes = [f"{phase}.{key}" for phase in ("vae", "text", "transformer") for key in ("steps=2", "batch_size=16")]
    values = params(
        *(
            f"model.training.{size}"
            for size in (*sizes, *(f"{p}.warmup_steps=0" for p in ("vae", "text", "transformer")))
        ),
        *("data.embedded.samples=150", f"data.shard.batch_size={SAMPLES}", "data.shard.text_embeddings=stored"),
        *(f"{key}={SAMPLES}" for key in ("data.shard.validation_samples", "data.shard.calibration_samples")),
        f"kd.validation_samples={SAMPLES}",
    )
    (tmp_path / "data").mkdir()
    source.source(quiet_stage(tmp_path, values))
    shared = {"root": str(tmp_path), "params": values.model_dump(mode="json")}
    finished = {name: str(tmp_path / name / "product") for name in ("vae", "text")}
    training_of, costs = values.model.training, Costs(values, describe(values.model))
    assert training_of is not None

    def phase(name: str, **more: str) -> int:
        config = getattr(training_of, name)
        job = Phase(name, f"tasks.teacher:build_{name}", {**shared, **more}, config, 100, 100, 100)
        return peak(lambda: training.run([job], tmp_path, CPU, 1, 0))

    phases = {"vae": phase("vae"), "text": phase("text"), "transformer": phase("transformer", **finished)}
    planned = {"vae": costs._vae_step(training_of.vae).most.total, "teacher": costs.teacher_stage().peak}
    measured = {"vae": phases["vae"], "teacher": max(phases.values())}
    encoder = Encoder(str(tmp_path / "transformer" / "product"), str(tmp_path / "parts"), ((16, 16),), SAMPLES, 1, 8)
    encoder.parts.begin(0)
    records = json.dumps([{"key": f"k{i}", "caption": "red seven", "meta": {}} for i in range(SAMPLES)]).encode()
    pictures = bytes(SAMPLES * 16 * 16 * 3)
    row = {"unit": 0, "chunk": 0, "bucket": 0, "pictures": pictures, "records": records}
    memory, text = LiveMemory(), encoder.text
    assert text is not None
    for module in (encoder.vae, text.pipeline.text_encoder, text.pipeline.text_encoder_2):
        memory.watch(parameters_and_buffers(module), "weights")
    with memory:
        encoder._chunk({name: pa.scalar(value) for name, value in row.items()})
    planned["shard"], measured["shard"] = costs.shard().peak, memory.peak.total
    ratios = {stage: planned[stage] / bytes_ for stage, bytes_ in measured.items()}
    assert {stage: ratio for stage, ratio in ratios.items() if abs(ratio - 1) > WITHIN} == {}, ratios


@pytest.mark.slow
def test_planned_memory_is_near_what_sharded_weights_really_take(tmp_path: Path) -> None:
    """Two processes train by the real loop; wide models and few samples, so that it is weights that count."""
    wide = ["attention_head_dim=32", "num_attention_heads=4", "axes_dims_rope=[8,12,12]"]
    batches = [f"{key}={value}" for key, value in {"batch_size": 4, "steps": 2, "warmup_steps": 0}.items()]
    values = params(
        *(f"model.transformer.{key}" for key in wide),
        *(f"kd.{stage}.optimizer.{key}" for stage in ("moe", "mob") for key in batches),
        *("moe=1s12e2a", "kd.joint=true", "kd.moe.optimizer.precision=bf16", "kd.moe.gradient_checkpointing=true"),
        *("kd.moe.optimizer.optimizer=adamw", "kd.mob.optimizer.optimizer=adamw", "mob.levels.M.init=teacher"),
        *(f"{key}=4" for key in ("data.shard.validation_samples", "data.shard.calibration_samples")),
        *("kd.validation_samples=2", "kd.importance_batch_size=4"),
        *("compute.num_workers=2", "compute.sharding=full", "compute.text_encoders=sharded"),
        # Muon gathers whole matrices.
        *("kd.shared_expert.optimizer.batch_size=2", "kd.shared_expert.optimizer.optimizer=muon"),
        *("kd.shared_expert.optimizer.steps=2", "kd.shared_expert.optimizer.warmup_steps=0"),
    )
    place = checkout(tmp_path / "checkout", values)
    (place / "units").mkdir()
    importance.work(CPU, 1, place, values.model_dump(mode="json"), place / "units")
    (place / "data" / "importance").mkdir()
    importance.merge(place / "units", place / "data" / "importance")

    def phase(module: str, optimizer: OptimizerConfig, **more: str) -> Phase:
        shared = {"root": str(place), "params": values.model_dump(mode="json"), "made": str(place / module)}
        return Phase(module, f"tasks.{module}:build", {**shared, **more}, optimizer, 100, 100, 100)

    kd, costs = values.kd, Costs(values, describe(values.model))
    jobs = [phase("shared_expert_kd", kd.shared_expert.optimizer), phase("moe_kd", kd.moe.optimizer)]
    jobs.append(phase("mob_kd", kd.mob.optimizer, level="M"))
    sharded_kd.train(jobs, tmp_path / "resume", 2, counted=True)
    planned = {
        "shared_expert_kd": costs.distillation("shared_expert_kd", kd.shared_expert, costs.configs["shared"]).peak,
        "moe_kd": costs.distillation("moe_kd", kd.moe, costs.configs["L"]).peak,
        "mob_kd": costs.distillation("mob_kd@M", kd.mob, costs.configs["M"]).peak,
    }
    ratios = [
        {name: planned[name] / bytes_ for name, bytes_ in found.items()}
        for found in sharded_kd.peaks(tmp_path / "resume", 2)
    ]
    assert all(set(found) == set(planned) for found in ratios)
    assert all(abs(ratio - 1) <= WITHIN for found in ratios for ratio in found.values()), ratios


def test_eight_bit_moments_are_planned_without_torchao() -> None:
    plain, low = (params(f"kd.shared_expert.optimizer.optimizer={kind}") for kind in ("adamw", "adamw8bit"))
    stages = [
        costs.distillation("shared_expert_kd", values.kd.shared_expert, costs.configs["shared"])
        for values in (plain, low)
        for costs in (Costs(values, describe(values.model)),)
    ]
    trained = stages[0].memory["optimizer"] / (2 * 4)
    # Two bytes a weight, and two scales for each 256 of them.
    assert stages[1].memory["optimizer"] == pytest.approx(trained * (2 + 2 * 4 / 256), rel=0.02)
    assert stages[1].meanwhile == stages[0].meanwhile


def test_what_fits_and_what_does_not_is_said_by_name_and_number() -> None:
    values = params("compute.gpu_memory_gb=1", "compute.tflops=2", "compute.use_gpu=true")
    stages = [
        StageCost("importance", "work", 7.2e15, {"teacher": 0.2e9, "activations": 0.3e9}, 2e9, 5e9),
        StageCost("mob_kd@M", "work", 3.6e15, {"teacher": 0.5e9, "student": 0.5e9}, 1e9, gpus=4),
    ]
    text = plan.render(values, stages)
    assert "| `importance` | work | 7.2 | 1 | 1 | 0.5 | 2.0 | 5.0 |" in text
    assert "| all |  | 10.8 | 1.5 |  |  | 3.0 | 5.0 |" in text
    assert "**`mob_kd@M` does not fit**: it needs 1.0 GB of tensors, a GPU has 0.95 of 1 GB" in text
    assert "kd.mob.optimizer.micro_batch" in text
    assert plan.crowded(values, stages) == stages[1:]
    assert plan.crowded(params(), stages) == []
    assert "Whether it fits needs `compute.gpu_memory_gb`" in plan.render(params(), stages)


def test_benchmarks_are_planned_picture_by_picture_and_scorer_by_scorer() -> None:
    flux = ("experiment=flux1-moe-l", "data.path=/tars", "compute=h100x8")
    own, paper = params(*flux), params(*flux, "eval=paper")
    teacher = describe(own.model)
    costs = Costs(paper, teacher)
    pictures = 30_000 + 553 * 4 + 1065 * 4 + 2400 * 10
    [dense, sparse] = [costs.generation("teacher"), costs.generation("L")]
    assert dense.work == f"{own.eval.prompts + pictures} pictures of 28 steps, 8 at once"
    # The same a picture, whose steps are nearly all of it; the validation loss is taken once.
    alone = Costs(own, teacher).generation("L")
    assert costs.generation("L", benchmarks=False).flops == alone.flops
    assert sparse.flops - alone.flops == pytest.approx(pictures * 28 * sparse.step_flops, rel=0.05)
    assert sparse.memory == alone.memory
    scored = {stage.stage: stage for stage in costs.scoring()}
    assert list(scored) == ["evaluate@teacher", "evaluate@shared", "evaluate@L"]
    told = scored["evaluate@L"]
    scorers = "clip_score, image_reward, mps, geneval, dpg, compbench_bvqa, compbench_unidet, compbench_scot"
    assert told.work == f"{scorers}; {pictures} pictures; at the least"
    # Two FLOPs a parameter and token; of CompBench's pictures three eighths are attributes, which take two questions each.
    blip = 2 * 0.086e9 * 577
    found = plan_suites.scoring_flops(paper)
    assert found["dpg"] == pytest.approx(1065 * 4 * 13.5 * blip)
    assert found["compbench_bvqa"] == pytest.approx(24_000 * 3 / 8 * 2 * blip)
    assert told.flops == pytest.approx(sum(found.values()))
    text = plan.render(paper, [*scored.values(), sparse])
    hours = told.flops / 1e12 / paper.compute.tflops / 3600
    row = next(line for line in text.splitlines() if line.startswith("| `evaluate@L` |"))
    assert float(row.split("|")[4]) == pytest.approx(hours, rel=0.1)
    assert hours > 0.1
    assert Costs(own, teacher).scoring() == []


def test_a_share_of_a_benchmark_is_planned_as_such() -> None:
    flux = ("experiment=flux1-moe-l", "data.path=/tars", "eval=paper")
    whole, part = params(*flux), params(*flux, "eval.suites.mjhq.count=3000")
    assert plan_suites.more_pictures(whole) - plan_suites.more_pictures(part) == 27_000
    one, other = plan_suites.scoring_flops(whole), plan_suites.scoring_flops(part)
    assert {name for name in one if one[name] != other[name]} == {"clip_score", "image_reward", "mps"}
    assert one["mps"] == pytest.approx(10 * other["mps"])


def test_models_of_every_flux_preset_are_the_papers() -> None:
    counts = {"L": 5.15, "M": 4.01, "S": 3.19, "XS": 2.64}
    presets = {"flux1-moe-l": "L", "flux1-moe-m": "M", "flux1-moe-s": "S", "flux1-moe-xs": "XS"}
    presets |= {"hyperflux-moe-l": "L", "hyperflux-moe-xs": "XS"}
    for preset, last in presets.items():
        values = params(f"experiment={preset}", "data.path=/tars", "compute=h100x8")
        configs = Costs(values, describe(values.model)).configs
        assert list(configs)[-1] == last
        assert round(accounting.count(configs[last]).activated_paper / 1e9, 2) == counts[last]
        assert values.model.num_inference_steps == (8 if preset.startswith("hyperflux") else 28)


def test_parts_of_flux1() -> None:
    sizes = describe(params("experiment=flux1-moe-l", "data.path=/tars").model).parameters()
    millions = {part: round(size / 1e6) for part, size in sizes.items()}
    assert millions == {"transformer": 11901, "vae": 84, "text_encoder": 123, "text_encoder_2": 4762}


def test_a_teacher_that_nobody_knows_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = params("experiment=flux1-moe-l", "data.path=/tars", "model.path=nobody/knows").model
    with pytest.raises(ConfigError, match=r"model\.path is nobody/knows, whose configuration the hub does not give"):
        describe(model)


def test_bad_overrides_end_with_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert plan.main(["experiment=flux1-moe-l", "data.path=/tars", "moe.top_k=13"]) == 2
    assert capsys.readouterr().err == "params/: moe: top_k is 13, but there are 12 experts\n"
    monkeypatch.setattr("sys.argv", ["dense2moe", "plant"])
    assert command.main() == 2
    assert "usage: dense2moe plan" in capsys.readouterr().err


def test_a_study_takes_what_its_runs_take(small: Params) -> None:
    arm = {"stage": "moe_kd", "share": 1, "joint": True, "kd": {}, "moe": {}, "mob": {}}
    study = {
        "title": "t",
        "seeds": [0, 1],
        "budgets": {"short": 5, "long": 10},
        "batch_size": 16,
        "prompts": 8,
        "claims": {},
    }
    read = StudyConfig.model_validate(study | {"arms": {"one": arm | {"after": None, "level": None, "baseline": None}}})
    teacher = describe(small.model)
    [found] = studies(small.model_copy(update={"studies": {"some": read}}), teacher)
    optim = small.kd.moe.optimizer.model_copy(update={"steps": 10, "batch_size": 16})
    stage = small.kd.moe.model_copy(update={"optimizer": optim, "validate_every": 2})
    costs = Costs(small, teacher)
    training = costs.distillation("moe_kd", stage, costs.configs["L"])
    pictures = costs.generation("L").flops * 8 / small.eval.prompts
    assert found.stage == "study_runs@some"
    assert found.work == "4 trainings, 30 steps of 16; pictures"
    assert found.flops == pytest.approx(2 * (training.flops * 1.5 + 2 * pictures))
    assert found.peak >= training.peak
